"""The ids of Unified-IO 2, and the same layout behind a small tokenizer."""

from __future__ import annotations

import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives.vocabulary import PREFIXES, VocabularyLayout


def test_ids_of_unified_io_2():
    layout = VocabularyLayout(32_000)
    assert [layout.location(v) for v in (0.0, 0.5, 1.0)] == [32_999, 32_999 - 499, 32_000]
    assert (layout.sentinel(0), layout.sentinel(199)) == (33_199, 33_000)
    assert layout.sentinels.tolist() == [layout.sentinel(i) for i in range(200)]
    ids = layout.special_ids
    assert ids["<extra_id_0>"] == 33_199 and ids["<extra_id_199>"] == 33_000
    assert ids["<extra_id_200>"] == 32_999 and ids["<extra_id_1199>"] == 32_000
    assert [ids[f"<image_history_{i}>"] for i in (1, 8)] == [33_200, 33_214]
    assert [ids[f"<audio_history_{i}>"] for i in (1, 8)] == [33_201, 33_215]
    assert (ids["<image_input>"], ids["<audio_input>"]) == (33_216, 33_217)
    assert [ids[name] for name in PREFIXES] == list(range(33_218, 33_225))
    assert layout.prefix("text", "X") == 33_220 and layout.prefix("audio", "R") == 33_224
    assert (layout.size, layout.table_size) == (33_225, 33_280)


@pytest.mark.parametrize("options", [
    {}, {"num_sentinels": 100, "num_location_bins": 0, "num_history": 0}, {"num_sentinels": 1}])
def test_every_extra_id_is_used_once(options):
    layout = VocabularyLayout(1_024, **options)
    ids = list(layout.special_ids.values())
    assert sorted(ids) == list(range(1_024, layout.size))
    assert layout.table_size % 128 == 0 and 0 <= layout.table_size - layout.size < 128
    for name, token in layout.special_ids.items():
        assert layout.name(token) == name
    assert layout.name(5) is None


def test_from_pieces():
    pieces = ["<pad>", "</s>", "<unk>", "a", "b"]
    layout = VocabularyLayout.from_pieces(pieces, num_sentinels=4, num_location_bins=0)
    assert (layout.base_size, layout.num_sentinels, layout.sentinel(0)) == (5, 4, 8)
    with pytest.raises(UserError, match="piece 1 must be </s>"):
        VocabularyLayout.from_pieces(["<unk>", "<s>", "</s>"])
    with pytest.raises(UserError, match="already holds extra tokens"):
        VocabularyLayout.from_pieces([*pieces, "<extra_id_0>"])


@pytest.mark.parametrize("options", [
    {"base_size": 2}, {"num_sentinels": 0}, {"num_location_bins": -1}, {"table_multiple": 0},
    {"base_size": 32_000.0}])
def test_unusable_sizes_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        VocabularyLayout(**options)


def test_what_does_not_exist_is_refused():
    layout = VocabularyLayout(1_024, num_sentinels=10, num_location_bins=0)
    with pytest.raises(UserError, match="0 to 9"):
        layout.sentinel(10)
    with pytest.raises(UserError, match="no such prefix"):
        layout.prefix("image", "X")
    with pytest.raises(UserError, match="bins"):
        layout.location(0.5)
