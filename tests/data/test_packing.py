"""Packed batches: hosts agree, rows hold their examples, damage leaves holes, resume is exact."""

from __future__ import annotations

import numpy as np
import pytest
from data.small_data import PATCHES, HideSome, batches, small_spec, small_tasks

from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import synthetic
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing import PackedBatches
from vishwam_t5x.data.records import DamagedRecord
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask
from vishwam_t5x.objectives.masking import patchify


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_hosts_together_hold_the_batch_of_one_host(hosts, packed):
    whole, share = batches(8, packed), 8 // hosts
    parts = [batches(8, packed) for _ in range(hosts)]
    position = DataPosition()
    for _ in range(6):
        expected = whole.batch(position)
        got = [part.batch(position, slice(host * share, (host + 1) * share))
               for host, part in enumerate(parts)]
        for key, array in expected.arrays.items():
            joined = np.concatenate([one.arrays[key] for one in got])
            np.testing.assert_array_equal(joined, array, err_msg=key)
        assert all(one.plan == expected.plan for one in got)
        position = expected.plan.end


def test_rows_may_be_picked_in_any_order():
    whole = batches(8).batch(DataPosition())
    some = batches(8).batch(DataPosition(), [6, 1])
    for key, array in whole.arrays.items():
        np.testing.assert_array_equal(some.arrays[key], array[[6, 1]])


def test_resumed_anywhere_the_batches_are_those_of_the_straight_run():
    straight, position, positions, expected = batches(), DataPosition(), [], []
    for _ in range(15):
        positions.append(position)
        expected.append(straight.batch(position).arrays)
        position = straight.packer.plan(position).end
    for start in (1, 7, 14):
        resumed, position = batches(), positions[start]
        for arrays in expected[start:]:
            got = resumed.batch(position)
            for key in arrays:
                np.testing.assert_array_equal(got.arrays[key], arrays[key])
            position = got.plan.end


def unpack(arrays, spec, row, side):
    """Reads a row the way the model does: through row/index, split by segment."""
    modalities = spec.input_capacities if side == "inputs" else spec.target_capacities
    index = arrays[f"{side}/row/index"][row]
    used = index[index >= 0]
    assert len(set(used.tolist())) == len(used), "a slot is used twice"
    assert (index[:len(used)] >= 0).all(), "the row has holes"
    names = np.concatenate([[m] * n for m, n in modalities.items()])
    segments = np.concatenate([arrays[f"{side}/{m}/segment_ids"][row] for m in modalities])
    mask = np.concatenate([arrays[f"{side}/{m}/mask"][row] for m in modalities])
    assert set(used.tolist()) == set(np.flatnonzero(mask).tolist())
    assert ((segments > 0) == (mask > 0)).all()
    return names[used], segments[used], used


def test_a_packed_row_holds_exactly_its_examples():
    stream, position = batches(6), DataPosition()
    for _ in range(4):
        batch = stream.batch(position)
        for row, places in enumerate(batch.plan.rows):
            for side in ("inputs", "targets"):
                names, segments, _ = unpack(batch.arrays, stream.spec, row, side)
                assert segments.tolist() == sorted(segments.tolist()), "examples are contiguous"
                for number in range(1, len(places) + 1):
                    order = names[segments == number].tolist()
                    assert order == sorted(order, key=["text", "image"].index)
            for number, place in enumerate(places, 1):
                check_example(stream, batch.arrays, row, number, place.example)
        position = batch.plan.end


def check_example(stream, arrays, row, number, example):
    clean = stream.examples.read(example)
    expected = HideSome().apply(clean, seed=11, example=example)
    for key, value in expected.items():
        prefix = key.rsplit("/", 1)[0]
        mine = arrays[f"{prefix}/segment_ids"][row] == number
        np.testing.assert_array_equal(arrays[key][row][mine], value, err_msg=key)
    text = arrays["targets/text/segment_ids"][row] == number
    targets = arrays["targets/text/targets"][row][text]
    np.testing.assert_array_equal(arrays["targets/text/inputs"][row][text], [0, *targets[:-1]])
    np.testing.assert_array_equal(arrays["targets/text/pos_ids"][row][text], range(len(targets)))
    assert arrays["targets/text/loss_mask"][row][text].all()


def test_unpacked_rows_begin_at_slot_zero_and_have_no_row_index():
    stream = batches(5, packed=False)
    batch = stream.batch(DataPosition())
    assert all(len(row) == 1 for row in batch.plan.rows)
    assert batch.plan.end == DataPosition(5)
    assert not [key for key in batch.arrays if "segment_ids" in key or "row/index" in key]
    for row, (place,) in enumerate(batch.plan.rows):
        expected = HideSome().apply(stream.examples.read(place.example), seed=11,
                                    example=place.example)
        tokens = expected["inputs/text/tokens"]
        got = batch.arrays["inputs/text/tokens"][row]
        np.testing.assert_array_equal(got[:len(tokens)], tokens)
        assert not got[len(tokens):].any()
        assert batch.arrays["inputs/text/mask"][row].sum() == len(tokens)


def test_shapes_are_those_the_specification_promises():
    for packed in (True, False):
        stream = batches(3, packed)
        arrays = stream.batch(DataPosition()).arrays
        promised = stream.spec.arrays()
        assert arrays.keys() == promised.keys()
        for key, feature in promised.items():
            assert (arrays[key].shape, arrays[key].dtype) == feature


def test_the_last_batch_of_finite_data_has_empty_rows():
    stream, position, sizes = batches(64, repeat=False, num_records=40), DataPosition(), []
    while (batch := stream.batch(position)) is not None:
        sizes.append(batch.plan.num_examples)
        position = batch.plan.end
    assert sum(sizes) == 60
    last = batches(64, repeat=False, num_records=4).batch(DataPosition())
    empty = [row for row, places in enumerate(last.plan.rows) if not places]
    assert empty
    for key, array in last.arrays.items():
        assert (array[empty] == (-1 if "row/index" in key else 0)).all(), key


# -- damaged records ---------------------------------------------------------------------------


class Damaging(SyntheticTask):
    damaged: frozenset = frozenset()

    def read(self, record):
        if record in self.damaged:
            raise DamagedRecord(self.name, record, "made so by a test")
        return super().read(record)


def damaged_stream(damaged, **options):
    task = Damaging("words", {"text": SyntheticFeature(3, 20)}, 100)
    task.damaged = frozenset(damaged)
    mixture = Mixture([task], [1.0], shuffle=False)
    return PackedBatches(mixture, HideSome(), small_spec(4), seed=11, **options)


@pytest.mark.parametrize("read_threads", [1, 3])
def test_a_damaged_record_leaves_its_slots_empty_and_is_named(read_threads):
    whole = damaged_stream(()).batch(DataPosition())
    stream = damaged_stream({3, 5}, read_threads=read_threads)
    holed = stream.batch(DataPosition())
    stream.close()
    assert [(one.task, one.record) for one in holed.bad] == [("words", 3), ("words", 5)] or {
        one.record for one in holed.bad} == {3, 5}
    assert holed.plan == whole.plan
    for row, places in enumerate(whole.plan.rows):
        lost = sum(place.lengths.inputs["text"] for place in places if place.example in (3, 5))
        before, after = (batch.arrays["inputs/text/mask"][row].sum() for batch in (whole, holed))
        assert before - after == lost
        unpack(holed.arrays, small_spec(4), row, "inputs")


def test_too_many_damaged_records_stop_the_run():
    stream = damaged_stream(range(100), max_bad_fraction=0.01)
    position = DataPosition()
    with pytest.raises(UserError, match="too many damaged records") as error:
        for _ in range(100):
            position = stream.batch(position).plan.end
    assert "words" in str(error.value) and "--overwrite" in str(error.value)
    with pytest.raises(UserError):
        damaged_stream({0}, max_bad_fraction=0.0).batch(DataPosition())


def test_an_objective_that_breaks_its_promise_is_found_out():
    class Liar(HideSome):
        def lengths(self, clean_lengths, *, seed, example):
            inputs, targets = super().lengths(clean_lengths, seed=seed, example=example)
            return type(super().lengths(clean_lengths, seed=seed, example=example))(
                {**inputs, "text": inputs["text"] + 1}, targets)

    stream = PackedBatches(Mixture(small_tasks(), [1, 1]), Liar(), small_spec(), seed=0)
    with pytest.raises(AssertionError, match="promised"):
        stream.batch(DataPosition())


# -- synthetic batches -------------------------------------------------------------------------


def test_a_synthetic_batch_is_a_valid_packed_batch():
    spec = small_spec(3)
    arrays = synthetic.synthetic_batch(spec, 0, {"text": 90, "image": 40}, examples_per_row=3)
    assert arrays.keys() == spec.arrays().keys()
    for row in range(3):
        for side, length in (("inputs", 64), ("targets", 64)):
            _, segments, used = unpack(arrays, spec, row, side)
            assert set(segments.tolist()) == {1, 2, 3}
            assert len(used) > 0.8 * length
    assert arrays["targets/image/targets"].max() < 40
    again = synthetic.synthetic_batch(spec, 0, {"text": 90, "image": 40}, examples_per_row=3)
    np.testing.assert_array_equal(arrays["inputs/image/input"], again["inputs/image/input"])


def test_the_copy_objective_keeps_everything():
    specs = {"image": PATCHES["image"]}
    task = SyntheticTask("caption", {
        "image_inputs": SyntheticFeature(4, 4, rest=(4, 1), dtype="float32"),
        "text_targets": SyntheticFeature(2, 6)}, 4, patch_specs=specs)
    objective = synthetic.CopyObjective(specs)
    clean = task.read(2)
    example = objective.apply(clean, seed=0, example=2)
    np.testing.assert_array_equal(example["inputs/image/input"],
                                  patchify(clean["image_inputs"], PATCHES["image"]))
    lengths = objective.lengths(task.clean_lengths(2), seed=0, example=2)
    assert lengths == ({"image": 4}, {"text": len(clean["text_targets"])})
