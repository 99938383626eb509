"""What is worth compiling, how it is ranked, and what helps where it does not fit."""

import dataclasses

import pytest

import helpers
from vishwam_t5x import plan_worker
from vishwam_t5x.planning import remedies, search, targets
from vishwam_t5x.planning.estimate import Predictor
from vishwam_t5x.planning.figures import Bytes, Figures
from vishwam_t5x.planning.program import Choice

RECIPE = helpers.ROOT / "benchmarks/t5x_size.gin"


def predictor(target, *bindings):
    """A predictor of the small recipe."""
    _, recipe = plan_worker.read([f"--gin_file={RECIPE}", "--gin_bindings=MESH = None", *bindings])
    return Predictor(recipe, targets.resolve(target))


@pytest.fixture(scope="module")
def traced():
    """The predictor that most tests use: tracing a model takes seconds."""
    return predictor("tpu-v4-8", "--gin.BATCH_SIZE=64")


@pytest.fixture
def base(traced):
    """That predictor as it was at first."""
    target, correction = traced.target, traced.correction
    yield traced
    traced.target, traced.correction = target, correction


def limit(base, count):
    """Gives the predictor's devices so many bytes."""
    smaller = type("Smaller", (targets.Target,), {"limit_bytes": count})
    base.target = smaller(**{field.name: getattr(base.target, field.name)
                             for field in dataclasses.fields(targets.Target)})


def figures(target, choice, temporary, total, seconds=1.0):
    """What a compiler might say of a choice: so many bytes, so long by memory's speed."""
    traffic = None if target.hardware is None else int(seconds * target.hardware.hbm_bandwidth)
    return Figures(target.name, "", True, total <= target.limit_bytes, target.limit_bytes,
                   Bytes(0, 0, 0, 0, temporary, temporary, total), 1.0, traffic, True, (), {},
                   choice.remat, choice.microbatches, "bfloat16", 16, 0.0, 0.0)


def test_what_each_choice_does_to_the_bytes(base):
    mesh = (1, 1, 4, 1)
    total = {(remat, parts): base.predict(Choice(mesh, remat, parts)).total
             for remat in search.REMATS for parts in (1, 4)}
    assert total["full", 1] < total["minimal", 1] < total["none", 1]
    assert total["none", 4] < total["none", 1]
    # Parameters and optimizer state are whole along `data` and shared along `fsdp`.
    copied, split = (base.predict(Choice(shape, "full", 4)).total
                     for shape in ((1, 4, 1, 1), mesh))
    assert copied - split > 0.7 * (base.parameters + base.optimizer)
    seconds = {remat: base.predict(Choice(mesh, remat, 1)).seconds for remat in search.REMATS}
    assert 0 < seconds["none"] < seconds["full"]
    assert predictor("cpu:4").predict(Choice()).seconds is None


def test_a_compiled_program_corrects_the_predictions(base):
    tried, other = Choice((1, 1, 4, 1), "none", 1), Choice((1, 1, 4, 1), "none", 2)
    before = base.predict(other).total
    needed = 2 * base._temporary(base._complete(tried))
    base.learn(tried, figures(base.target, tried, int(needed), 0))
    assert base.correction == pytest.approx(2, rel=1e-6) and base.predict(other).total > before
    base.learn(tried, figures(base.target, tried, int(100 * needed), 0))
    assert base.correction == 4  # one odd program does not decide everything


def test_only_what_divides_is_a_choice():
    base = predictor("tpu-v4-8", "--gin.BATCH_SIZE=8")
    heads = base.recipe.model.config.num_heads
    found = [choice for choice, _ in search.choices(base)]
    assert len(set(found)) == len(found) > 20
    for choice in found:
        replica, data, fsdp, tensor = choice.mesh
        assert replica * data * fsdp * tensor == 4 and heads % tensor == 0
        assert 8 % (data * fsdp * choice.microbatches) == 0
    # Nine rows are cut by no power of two, and four heads do not go on eight devices.
    assert search.choices(predictor("cpu:8", "--gin.BATCH_SIZE=9")) == []


def test_a_search_ranks_what_fits_by_its_seconds(base):
    asked = []

    def compiled(choice, number, most):
        asked.append(choice)
        assert (number, most) == (len(asked), 4)
        # The second asked for is the fastest, the third is fast and does not fit.
        seconds = {2: 1.0, 3: 0.5}.get(number, 2.0)
        total = base.target.limit_bytes + 1 if number == 3 else 10**9
        return figures(base.target, choice, 10**8, total, seconds)

    found = search.search(base, compiled, 4)
    assert len(set(asked)) == len(asked) == len(found) == 4
    assert [one.choice for one in found] == [asked[1], asked[0], asked[3], asked[2]]
    assert [one.figures.fits for one in found] == [True, True, True, False]


def test_where_nothing_should_fit_the_smallest_are_tried(base):
    asked = []
    limit(base, 1000)

    def compiled(choice, number, most):
        asked.append(choice)
        return figures(base.target, choice, 10**7, 10**8)

    smallest = min(search.choices(base), key=lambda pair: pair[1].total)[0]
    found = search.search(base, compiled, 3)
    assert len(found) == 3 and asked[0] == smallest
    assert not any(one.figures.fits for one in found)


def test_a_search_ends_when_nothing_else_should_fit(base):
    sizes = sorted(prediction.total for _, prediction in search.choices(base))
    limit(base, int(sizes[0] / search.SLACK) + 1)
    found = search.search(base, lambda choice, *_: figures(
        base.target, choice, int(base._temporary(base._complete(choice))),
        base.target.limit_bytes), 50)
    assert 1 <= len(found) < len(sizes)


@pytest.fixture
def too_big():
    """A recipe with AdamW and no remat that needs twice what there is."""
    base = predictor("tpu-v4-8", "--gin.BATCH_SIZE=64", "--gin_file=gin/optimizers/adamw.gin",
                     "--gin.TRAIN_STEPS=100000")
    now = base.predict(Choice())
    limit(base, now.total // 2)
    return base, now


def test_three_remedies_of_different_kinds_the_cheapest_first(too_big):
    base, now = too_big
    found = remedies.remedies(base)
    assert len(found) == 3 and all(one.total < now.total for one in found)
    assert len({int(one.price) for one in found}) == 3
    fitting = [one for one in found if one.fits]
    assert found[:len(fitting)] == fitting  # what fits comes first
    assert [one.price for one in fitting] == sorted(one.price for one in fitting)
    for one in found:
        assert one.lines and one.cost and one.fits == (one.total <= base.target.limit_bytes)


def test_the_lines_of_a_remedy_are_what_was_predicted(too_big):
    base, _ = too_big
    for one in remedies._all(base):
        if not one.lines[-1].startswith(("PRECISION", "BATCH_SIZE")):
            continue  # others are predicted by what they change, not by a share
        bindings = [f"--gin_bindings={line}" for line in one.lines]
        again = predictor("tpu-v4-8", "--gin.BATCH_SIZE=64",
                          "--gin_file=gin/optimizers/adamw.gin", "--gin.TRAIN_STEPS=100000",
                          *bindings)
        assert again.predict(Choice()).total == pytest.approx(one.total, rel=0.15), one.lines


def test_a_small_optimizer_is_not_replaced(base):
    limit(base, 1)
    lines = [line for one in remedies._all(base) for line in one.lines]
    assert not any("adafactor" in line for line in lines)
    assert "BATCH_SIZE = 32" in lines


def test_no_remedy_that_train_would_refuse_or_that_needs_more():
    base = predictor("tpu-v4-32", "--gin.BATCH_SIZE=16")  # a row on each of sixteen devices
    limit(base, 1)
    assert not any("BATCH_SIZE" in line for one in remedies._all(base) for line in one.lines)
    now = base.predict(Choice()).total
    assert all(one.total < now for one in remedies.remedies(base))
