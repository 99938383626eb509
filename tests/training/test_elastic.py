"""Fewer devices, more microbatches, the same batch."""

import types

import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
from vishwam_t5x.training.elastic import microbatches, say_if_masks_change
from vishwam_t5x.training.ledger import Ledger


@pytest.mark.parametrize(("asked", "batch", "limit", "cut"), [
    (1, 24, None, 1), (3, 24, None, 3), (1, 24, 24, 1), (1, 24, 12, 2), (1, 24, 5, 6),
    (1, 24, 7, 4), (3, 24, 24, 3), (1, 24, 1, 24)])
def test_on_one_device(asked, batch, limit, cut):
    assert microbatches(asked, batch, limit)(make_mesh(MeshConfig(data=1)), None) == cut


def test_on_eight_devices(eight_devices):
    eight_devices("""
        from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
        from vishwam_t5x.training.elastic import microbatches
        cut = microbatches(1, 48, 6)
        assert cut(make_mesh(MeshConfig(data=8)), None) == 1
        assert cut(make_mesh(MeshConfig(data=2, tensor=4)), None) == 4
        """)


def test_other_masks_are_said(tmp_path, caplog):
    path = tmp_path / "ledger.jsonl"
    with_dropout, without = (types.SimpleNamespace(dropout_rate=rate) for rate in (0.1, 0.0))
    say_if_masks_change(path, 2, with_dropout)  # a first session
    Ledger(path).start(0)  # of a version that did not know
    say_if_masks_change(path, 2, with_dropout)
    Ledger(path).start(0, microbatches=2)
    say_if_masks_change(path, 2, with_dropout)
    say_if_masks_change(path, 4, without)
    assert not caplog.records
    say_if_masks_change(path, 4, with_dropout)
    assert "4 microbatches instead of 2" in caplog.text


def test_no_rows():
    with pytest.raises(UserError, match="at least 1 row"):
        microbatches(1, 8, 0)
