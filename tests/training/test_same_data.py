"""A resumed run reads what it read before, or says that it does not."""

import dataclasses

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.records import FeatureInfo, Manifest, ShardInfo, TaskCache
from vishwam_t5x.training import same_data
from vishwam_t5x.training.run_dir import RunDir

MANIFEST = Manifest(
    task="a", split="train", features={"text": FeatureInfo((None,), "int32")},
    length_columns=(("text", 0),), shards=(ShardInfo("shard", 3, 10, "abc"),),
    lengths_sha256="def", metadata={})


def mixture(rate=1.0, **changes):
    first = dataclasses.replace(MANIFEST, **changes)
    second = dataclasses.replace(MANIFEST, task="b")
    return Mixture([TaskCache(None, manifest, np.ones((3, 1), np.int32), {})
                    for manifest in (first, second)], [rate, 1.0])


@pytest.fixture
def run_dir(tmp_path):
    run_dir = RunDir.open(tmp_path)
    same_data.check(run_dir, mixture(), resuming=False)
    return run_dir


def test_the_same(run_dir, caplog):
    same_data.check(run_dir, mixture(), resuming=True)
    assert not caplog.records


@pytest.mark.parametrize(("changes", "words"), [
    ({"rate": 2.0}, "a: rate 1.0 -> 2.0"),
    ({"lengths_sha256": "xyz"}, "a: lengths def -> xyz"),
    ({"task": "c"}, r"a: records 3 -> \(not there\)"),
])
def test_another_order_is_refused(run_dir, changes, words):
    with pytest.raises(UserError, match=words):
        same_data.check(run_dir, mixture(**changes), resuming=True)
    same_data.check(run_dir, mixture(), resuming=True)  # the old record is still there
    same_data.check(run_dir, mixture(**changes), resuming=False)
    same_data.check(run_dir, mixture(**changes), resuming=True)


def test_other_bits_are_said(run_dir, caplog):
    written_again = mixture(shards=(ShardInfo("shard", 3, 10, "abd"),))
    same_data.check(run_dir, written_again, resuming=True)
    assert "cache of a was written again" in caplog.text


def test_files_read_with_other_settings_are_refused(run_dir):
    def read(resize):
        return mixture(metadata={"conversions": {"image: decode_picture": {"resize": resize}}})

    same_data.check(run_dir, read("exact"), resuming=True)  # the run knew of none so far
    assert same_data.order(read("exact")) != same_data.order(read("fast"))
    for _ in range(2):
        with pytest.raises(UserError) as found:
            same_data.check(run_dir, read("fast"), resuming=True)
        assert "a: image: decode_picture.resize = 'exact', now 'fast'" in str(found.value.got)
        same_data.check(run_dir, mixture(), resuming=True)  # an older cache does not say


def test_a_live_stream_has_no_record(tmp_path):
    run_dir = RunDir.open(tmp_path)
    same_data.check(run_dir, object(), resuming=True)
    assert run_dir.data.read_text() == "{}\n"
