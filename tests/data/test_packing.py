"""Packing: every example once, the same plan on every host, resumable anywhere, well filled."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
from data.small_data import PATCHES, HideSome, small_spec, small_tasks

from vishwam_t5x.core.batch import MAX_CARRIED, BatchSpec, DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import synthetic
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing import PackedBatches
from vishwam_t5x.data.packing_plan import Packer, packing_report
from vishwam_t5x.data.records import DamagedRecord
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import PatchSpec, patchify
from vishwam_t5x.objectives.vocabulary import VocabularyLayout


def batches(batch_size=4, packed=True, repeat=True, num_records=200, **options):
    mixture = Mixture(small_tasks(num_records), [2, 1], seed=5, repeat=repeat, shuffle=repeat)
    return PackedBatches(mixture, HideSome(), small_spec(batch_size, packed), seed=11, **options)


def walk(packer, position=None, limit=10**9):
    position = position or DataPosition()
    for _ in range(limit):
        plan = packer.plan(position)
        if plan is None:
            return
        yield plan
        position = plan.end


# -- the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 7, 32])
@pytest.mark.parametrize("packed", [True, False])
def test_every_example_appears_exactly_once(batch_size, packed):
    packer = batches(batch_size, packed, repeat=False).packer
    seen = collections.Counter()
    for plan in walk(packer):
        seen.update(plan.example_ids)
        assert len(plan.end.carried) <= MAX_CARRIED
        assert list(plan.end.carried) == sorted(plan.end.carried)
    assert seen == collections.Counter(range(300))


@pytest.mark.parametrize("batch_size", [3, 16])
def test_in_an_endless_stream_nothing_is_lost_or_repeated(batch_size):
    seen, last = collections.Counter(), None
    for plan in walk(batches(batch_size).packer, limit=60):
        seen.update(plan.example_ids)
        last = plan
    everything = set(range(last.end.next_example))
    assert set(seen) | set(last.end.carried) == everything
    assert not set(seen) & set(last.end.carried)
    assert max(seen.values()) == 1


def test_the_plan_is_first_fit():
    """Against a slow restatement of the rule in plain Python."""
    stream = batches(5)
    spec, objective = stream.spec, stream.objective
    for plan in walk(stream.packer, limit=12):
        room = [{"e": spec.input_length, "d": spec.target_length,
                 **{f"e{m}": n for m, n in spec.input_capacities.items()},
                 **{f"d{m}": n for m, n in spec.target_capacities.items()}} for _ in range(5)]
        rows, carried = [[] for _ in range(5)], []
        todo, following = list(plan.start.carried), plan.start.next_example
        while len(carried) + len(todo) < MAX_CARRIED or todo:
            if len(carried) == MAX_CARRIED:
                break
            if todo:
                number = todo.pop(0)
            else:
                number, following = following, following + 1
            inputs, targets = objective.lengths(
                stream.examples.clean_lengths(number), seed=11, example=number)
            need = {"e": sum(inputs.values()), "d": sum(targets.values()),
                    **{f"e{m}": n for m, n in inputs.items()},
                    **{f"d{m}": n for m, n in targets.items()}}
            for row, left in zip(rows, room, strict=True):
                if all(left[name] >= size for name, size in need.items()):
                    row.append(number)
                    for name, size in need.items():
                        left[name] -= size
                    break
            else:
                carried.append(number)
        assert [[place.example for place in row] for row in plan.rows] == rows
        assert plan.end == DataPosition(following, tuple(carried))


def test_a_plan_depends_on_its_position_only():
    plans = list(walk(batches().packer, limit=20))
    assert any(plan.start.carried for plan in plans)
    for plan in reversed(plans):
        fresh = batches().packer
        assert fresh.plan(DataPosition.from_arrays(plan.start.to_arrays())) == plan


def test_lengths_in_blocks_give_the_plans_of_lengths_one_by_one():
    objective = MixtureOfDenoisers(
        vocabulary=VocabularyLayout(base_size=256), image=PATCHES["image"])

    class OneByOne:
        lengths = objective.lengths

    for repeat in (True, False):
        plans = []
        for kind in (objective, OneByOne()):
            packer = Packer(Mixture(small_tasks(900), [2, 1], seed=5, repeat=repeat), kind,
                            small_spec(6), seed=3)
            plans.append(list(walk(packer, limit=60)))
            # Back in the data, as after a rollback.
            assert packer.plan(plans[-1][2].start) == plans[-1][2]
        assert plans[0] == plans[1] and len(plans[0]) > 40


def test_an_example_longer_than_a_row_is_refused_by_name():
    task = SyntheticTask("novels", {"text": SyntheticFeature(100, 100)}, 5)
    packer = Packer(Mixture([task], [1.0]), HideSome(), small_spec(), seed=0)
    with pytest.raises(UserError, match="does not fit in an empty row") as error:
        packer.plan(DataPosition())
    for word in ("novels", "record", "TASK_FEATURE_LENGTHS['", "64 slots"):
        assert word in str(error.value)


def test_a_modality_beyond_its_capacity_is_refused_by_name():
    spec = dataclasses.replace(small_spec(), target_capacities={"text": 64, "image": 7})
    packer = Packer(Mixture(small_tasks(), [1, 1]), HideSome(), spec, seed=0)
    with pytest.raises(UserError, match=r"'targets/image'\] = 8"):
        packer.plan(DataPosition())


def test_a_modality_the_model_lacks_is_refused_by_name():
    spec = dataclasses.replace(small_spec(), input_capacities={"text": 64})
    packer = Packer(Mixture(small_tasks(), [1, 1]), HideSome(), spec, seed=0)
    with pytest.raises(UserError, match="'pictures' has inputs of a modality"):
        packer.plan(DataPosition())


def five_kinds():
    specs = {"image": PatchSpec(2, channels=1), "audio": PatchSpec(2, channels=1)}
    mixture = Mixture(synthetic.five_kinds(specs), synthetic.FIVE_KIND_RATES, seed=0)
    return mixture, synthetic.CopyObjective(specs)


@pytest.mark.parametrize("batch_size", [16, 256])
def test_five_kinds_are_packed_to_092_of_the_volume_bound(batch_size):
    mixture, objective = five_kinds()
    spec = BatchSpec(batch_size, 864, 1280, {"text": 864, "image": 864, "audio": 864},
                     {"text": 1280, "image": 1280}, {"image": 4, "audio": 4})
    count = 1024 // batch_size
    packed, single, pairs = (
        packing_report(mixture, objective, spec, 0, count, limit) for limit in (None, 1, 2))
    assert packed.efficiency >= 0.92
    assert packed.rows_used == single.rows_used == pairs.rows_used == count * batch_size
    assert (single.num_examples, pairs.num_examples) == (1024, 2048)
    assert single.efficiency < 0.4 and 1.9 < pairs.efficiency / single.efficiency < 2.1


# -- the arrays --------------------------------------------------------------------------------


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
