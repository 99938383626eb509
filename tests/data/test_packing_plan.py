"""Plans of batches: first-fit, every example once, a function of the position, well filled."""

from __future__ import annotations

import collections
import dataclasses

import pytest
from data.small_data import PATCHES, HideSome, batches, small_spec, small_tasks, walk

from vishwam_t5x.core.batch import MAX_CARRIED, BatchSpec, DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import synthetic
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing_plan import Packer, packing_report
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import PatchSpec
from vishwam_t5x.objectives.vocabulary import VocabularyLayout


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


def test_what_an_objective_refuses_is_said_with_the_task():
    task = SyntheticTask("odd", {"smell": SyntheticFeature(1, 3)}, 5)
    objective = MixtureOfDenoisers(vocabulary=VocabularyLayout(base_size=256))
    with pytest.raises(UserError, match="task 'odd', record .*no known role"):
        Packer(Mixture([task], [1.0]), objective, small_spec(), seed=0).plan(DataPosition())


def test_an_example_refused_in_a_block_is_named_when_its_turn_comes():
    class OneIsTooLong(SyntheticTask):
        @property
        def length_table(self):
            names, table = super().length_table
            table[77] = 400
            return names, table

    text = SyntheticFeature(20, 30)
    mixture = Mixture([OneIsTooLong("mostly", {"text": text}, 200)], [1.0], shuffle=False)
    objective = MixtureOfDenoisers(
        vocabulary=VocabularyLayout(base_size=256, num_sentinels=40), text_x=((3.0, 0.5),),
        text_weights={"X": 1.0})
    packer, position = Packer(mixture, objective, small_spec(4), seed=0), DataPosition()
    with pytest.raises(UserError, match="'mostly', record 77: .*sentinels"):
        for _ in range(50):
            position = packer.plan(position).end
    assert 77 - 2 * MAX_CARRIED < position.next_example <= 77


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
