"""The mixture of denoisers: promised lengths, purity, chances, and what each denoiser hides."""

from __future__ import annotations

import collections
import pickle

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.objectives.augmentation import shift
from vishwam_t5x.objectives.choices import two_uniforms
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import PatchSpec, patchify
from vishwam_t5x.objectives.vocabulary import EOS_ID, VocabularyLayout

VOCABULARY = VocabularyLayout(1_024, num_sentinels=80, num_location_bins=0, num_history=0)
FEATURES = {
    "text": ("text",),
    "image": ("image", "image_codes"),
    "codes": ("image_codes", "text"),
    "text+image": ("text", "image", "image_codes"),
    "text+image without codes": ("text", "image"),
    "text+image+audio": ("text", "image", "image_codes", "audio", "audio_codes"),
    "caption": ("image_inputs", "text_targets", "meta_label"),
    "draw": ("text_inputs", "image_target_codes", "image_targets"),
    "answer": ("text_inputs", "image_inputs", "audio_inputs", "text_targets"),
    "both": ("text_inputs", "text_targets", "image_target_codes"),
}


def objective(**options) -> MixtureOfDenoisers:
    return MixtureOfDenoisers(**{
        "vocabulary": VOCABULARY, "image": PatchSpec(2, channels=1),
        "audio": PatchSpec((4, 2), channels=1), "target_modalities": ("text", "image", "audio"),
        **options})


def make_clean(names, seed: int, text_length: int | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    length = lambda: int(rng.integers(0, 120)) if text_length is None else text_length
    make = {
        "text": lambda: rng.integers(3, 1_024, length()).astype(np.int32),
        "image": lambda: rng.random((8, 8, 1)).astype(np.float32),
        "codes": lambda: rng.integers(0, 64, 64).astype(np.int32),
        "audio": lambda: rng.random((16, 4)).astype(np.float32),
        "audio_codes": lambda: rng.integers(0, 9, 32).astype(np.int32),
        "meta": lambda: np.int64(rng.integers(10)),
    }
    kinds = {"text": "text", "text_inputs": "text", "text_targets": "text", "image": "image",
             "image_inputs": "image", "image_targets": "image", "image_codes": "codes",
             "image_target_codes": "codes", "audio": "audio", "audio_inputs": "audio",
             "audio_codes": "audio_codes", "meta_label": "meta"}
    return {name: make[kinds[name]]() for name in names}


def clean_lengths(mixture: MixtureOfDenoisers, clean) -> dict[str, int]:
    specs = {"image": mixture.image, "audio": mixture.audio}
    return {name: (len(array) if array.ndim == 1
                   else specs[name.split("_")[0]].num_patches(array.shape))
            for name, array in clean.items() if not name.startswith("meta_")}


VARIANTS = [
    {}, {"text_s_split": "uniform"}, {"mode_tokens": False, "masked_loss": "all"},
    {"text_weights": {"S": 1.0}, "image_weights": {"S": 1.0}, "audio_weights": {"S": 1.0}},
    {"text_weights": {"X": 1.0}, "image_weights": {"R": 1.0}, "target_weights": {
        "text": 1.0, "image": 3.0, "audio": 0.0}},
    {"image_shift": 2, "target_modalities": ("text", "image")},
]


@pytest.mark.parametrize("options", VARIANTS, ids=range(len(VARIANTS)))
@pytest.mark.parametrize("names", FEATURES.values(), ids=FEATURES)
def test_lengths_are_kept(names, options):
    """`apply` returns what `lengths` promised, one by one and many at once."""
    mixture = objective(**options)
    count = 120
    cleans = [make_clean(names, i, (i % 4) if i % 3 == 0 else None) for i in range(count)]
    lengths = [clean_lengths(mixture, clean) for clean in cleans]
    try:
        many = mixture.lengths_many(
            {name: np.array([each[name] for each in lengths]) for name in lengths[0]},
            np.arange(count), seed=5)
    except UserError as error:  # A variant that can make nothing of these features.
        with pytest.raises(UserError, match=error.problem):
            mixture.apply(cleans[0], seed=5, example=0)
        return
    for i in range(count):
        promised = mixture.lengths(lengths[i], seed=5, example=i)
        example = mixture.apply(cleans[i], seed=5, example=i)
        got = collections.defaultdict(dict)
        for key, array in example.items():
            side, modality, field = key.split("/")
            assert len(array) == got[side].setdefault(modality, len(array)), key
            if field == "input":
                assert array.shape[1] == getattr(mixture, modality).patch_dim
                assert array.dtype == np.float32
            else:
                assert array.ndim == 1 and array.dtype == np.int32, key
        assert got["inputs"] == promised.inputs and got["targets"] == promised.targets
        if "text_s_split" not in options:
            assert promised in mixture.possible_lengths(lengths[i])
        for side, arrays in (("inputs", many.inputs), ("targets", many.targets)):
            assert {m: int(a[i]) for m, a in arrays.items() if a[i] or m in got[side]} == got[side]


@pytest.mark.parametrize("names", FEATURES.values(), ids=FEATURES)
def test_pure_function_of_seed_and_example(names):
    """The same in any order, from a copy, and on another host; different for another number."""
    mixture, clean = objective(image_shift=1), make_clean(names, 3, text_length=90)
    first = {i: mixture.apply(clean, seed=1, example=i) for i in range(30)}
    other = pickle.loads(pickle.dumps(mixture))
    for i in reversed(range(30)):
        again = other.apply(dict(reversed(clean.items())), seed=1, example=i)
        assert set(again) == set(first[i])
        assert all(np.array_equal(again[key], first[i][key]) for key in again)
    if names[0].startswith(("text_", "both")) and "image_inputs" not in names:
        return  # Nothing random in it.
    signature = lambda example: b"".join(array.tobytes() for array in example.values())
    assert len({signature(example) for example in first.values()}) > 5
    assert signature(mixture.apply(clean, seed=2, example=0)) != signature(first[0]) or (
        signature(mixture.apply(clean, seed=2, example=1)) != signature(first[1]))


def test_chances():
    """Target modality by target_weights; then denoisers by theirs. Chi-square, 99.9 %."""
    mixture = objective(target_weights={"text": 3.0, "image": 1.0, "audio": 1.0},
                        target_modalities=("text", "image"))
    lengths = {"text": 100, "image": 16, "image_codes": 64}
    draws = 7_000
    counts = collections.Counter(mixture.choose(lengths, seed=1, example=i) for i in range(draws))
    chances = {("text", "R", 3.0, 0.15): 3 / 28, ("text", "R", 8.0, 0.15): 3 / 28,
               ("text", "S", 0.0, 0.25): 3 / 28, ("text", "X", 3.0, 0.5): 3 / 28,
               ("text", "X", 8.0, 0.5): 3 / 28, ("text", "X", 64.0, 0.15): 3 / 28,
               ("text", "X", 64.0, 0.5): 3 / 28, ("image", "R", 0.0, 0.75): 1 / 8,
               ("image", "S", 0.0, 1.0): 1 / 8}
    got = {(d.modality, d.paradigm, d.mean_span, d.rate): n for d, n in counts.items()}
    assert set(got) == set(chances)
    chi_square = sum((got[k] - draws * p) ** 2 / (draws * p) for k, p in chances.items())
    assert chi_square < 26.1  # 8 degrees of freedom


def test_uniforms_are_those_of_example_generator():
    examples = np.array([0, 1, 77, 2**31, 2**40 + 3, 2**62])
    want = [example_generator(9, int(i), "a stream").random(2) for i in examples]
    assert two_uniforms(9, examples, "a stream").tolist() == np.stack(want).tolist()


def find(mixture, lengths, modality, paradigm, count=8):
    """Numbers of the first examples that get this kind of denoiser."""
    found = [i for i in range(400) if (d := mixture.choose(lengths, seed=0, example=i))
             and (d.modality, d.paradigm) == (modality, paradigm)]
    assert len(found) >= count
    return found[:count]


@pytest.mark.parametrize("paradigm", ["R", "S", "X"])
@pytest.mark.parametrize("names", [FEATURES["text"], FEATURES["text+image+audio"]])
def test_text_denoisers(names, paradigm):
    mixture, clean = objective(), make_clean(names, 0, text_length=100)
    for i in find(mixture, clean_lengths(mixture, clean), "text", paradigm):
        example = mixture.apply(clean, seed=0, example=i)
        tokens, target = example["inputs/text/tokens"], example["targets/text/targets"]
        assert tokens[0] == VOCABULARY.prefix("text", paradigm)
        assert tokens[-1] == target[-1] == EOS_ID
        inputs, target = tokens[1:-1].tolist(), target[:-1].tolist()
        if paradigm == "S":
            assert len(target) == 25 and inputs + target == clean["text"].tolist()
        else:
            sentinels = VOCABULARY.sentinels.tolist()
            hidden = [token for token in target if token not in sentinels]
            kept = [token for token in inputs if token not in sentinels]
            assert len(hidden) == (15 if paradigm == "R" else len(hidden)) and len(hidden) in (
                15, 50)
            assert sorted(hidden + kept) == sorted(clean["text"].tolist())
            assert [t for t in inputs if t in sentinels] == [t for t in target if t in sentinels]
        for modality in ("image", "audio"):  # The other modalities are given whole.
            if modality in names:
                want = patchify(clean[modality], getattr(mixture, modality))
                assert np.array_equal(example[f"inputs/{modality}/input"], want)
                assert f"targets/{modality}/targets" not in example


@pytest.mark.parametrize("modality,masked_loss", [("image", "masked"), ("audio", "all")])
def test_patch_restoration(modality, masked_loss):
    mixture = objective(masked_loss=masked_loss, image_shift=1)
    clean = make_clean(FEATURES["text+image+audio"], 1, text_length=10)
    spec = getattr(mixture, modality)
    patches = patchify(clean[modality], spec)
    for i in find(mixture, clean_lengths(mixture, clean), modality, "R"):
        example = mixture.apply(clean, seed=0, example=i)
        visible = example[f"inputs/{modality}/pos_ids"]
        assert len(visible) == len(patches) - round(len(patches) * 0.75)
        assert np.all(np.diff(visible) > 0)
        assert np.array_equal(example[f"inputs/{modality}/input"], patches[visible])
        codes = clean[f"{modality}_codes"]
        assert example[f"targets/{modality}/targets"].tolist() == (codes + 2).tolist()
        grid = spec.grid(clean[modality].shape)
        rows, columns = spec.codes_grid(grid, len(codes))
        row, column = np.divmod(np.arange(len(codes)), columns)
        patch_of_code = (row * grid[0] // rows) * grid[1] + column * grid[1] // columns
        hidden = ~np.isin(patch_of_code, visible)
        assert example[f"targets/{modality}/loss_mask"].tolist() == (
            hidden.tolist() if masked_loss == "masked" else [1] * len(codes))
        assert example["inputs/text/tokens"].tolist() == [
            VOCABULARY.prefix(modality, "R"), *clean["text"], EOS_ID]
        assert "targets/text/targets" not in example


@pytest.mark.parametrize("masked_loss", ["masked", "all"])
def test_task_masks_say_which_codes_are_hidden(masked_loss):
    mixture = objective(task_masks=True, masked_loss=masked_loss)
    clean = make_clean(FEATURES["text+image+audio"], 1, text_length=10)
    lengths = clean_lengths(mixture, clean)
    for i in find(mixture, lengths, "image", "R"):
        mask = mixture.apply(clean, seed=0, example=i)["targets/image/task_mask"]
        plain = objective().apply(clean, seed=0, example=i)
        assert mask.tolist() == plain["targets/image/loss_mask"].tolist()
        assert "targets/image/task_mask" not in plain
    for i in find(mixture, lengths, "image", "S"):
        assert "targets/image/task_mask" not in mixture.apply(clean, seed=0, example=i)


def test_generation_from_the_other_modalities():
    mixture, clean = objective(), make_clean(FEATURES["text+image+audio"], 1, text_length=10)
    for i in find(mixture, clean_lengths(mixture, clean), "image", "S"):
        example = mixture.apply(clean, seed=0, example=i)
        assert "inputs/image/input" not in example
        assert len(example["inputs/audio/input"]) == 8
        assert example["inputs/text/tokens"][0] == VOCABULARY.prefix("image", "S")
        assert example["targets/image/loss_mask"].tolist() == [1] * 64


def test_generation_needs_something_to_generate_from():
    alone = {"image": 16, "image_codes": 64}
    kinds = {objective().choose(alone, seed=0, example=i).paradigm for i in range(40)}
    assert kinds == {"R"}
    only_s = objective(image_weights={"S": 1.0})
    assert only_s.choose(alone, seed=0, example=0).paradigm == "S"
    assert only_s.lengths(alone, seed=0, example=0) == ({"text": 2}, {"image": 64})


def test_supervised_examples_are_taken_as_they_are():
    mixture = objective(image_shift=1)
    clean = make_clean(FEATURES["answer"], 0, text_length=5)
    shifts = set()
    for i in range(60):
        example = mixture.apply(clean, seed=0, example=i)
        assert example["inputs/text/tokens"].tolist() == [
            VOCABULARY.prefix("text", "S"), *clean["text_inputs"], EOS_ID]
        assert example["targets/text/targets"].tolist() == [*clean["text_targets"], EOS_ID]
        assert np.array_equal(example["inputs/audio/input"],
                              patchify(clean["audio_inputs"], mixture.audio))
        shifts.add(next((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if np.array_equal(
            patchify(shift(clean["image_inputs"], dy, dx), mixture.image),
            example["inputs/image/input"])))
    assert len(shifts) == 9
    still = mixture.without_augmentation().apply(clean, seed=0, example=0)
    assert np.array_equal(still["inputs/image/input"],
                          patchify(clean["image_inputs"], mixture.image))
    both = mixture.apply(make_clean(FEATURES["both"], 0), seed=0, example=0)
    assert both["inputs/text/tokens"][:2].tolist() == [
        VOCABULARY.prefix("text", "S"), VOCABULARY.prefix("image", "S")]


def test_pixels_stay_bytes():
    mixture, clean = objective(), make_clean(FEATURES["caption"], 0)
    pixels = (clean["image_inputs"] * 255).round().astype(np.uint8)
    example = mixture.apply({**clean, "image_inputs": pixels}, seed=0, example=0)
    np.testing.assert_array_equal(example["inputs/image/input"], patchify(pixels, mixture.image))
    assert example["inputs/image/input"].dtype == np.uint8
    doubles = mixture.apply({**clean, "image_inputs": pixels / 255}, seed=0, example=0)
    assert doubles["inputs/image/input"].dtype == np.float32
    with pytest.raises(UserError, match="int64"):
        mixture.apply({**clean, "image_inputs": pixels.astype(np.int64)}, seed=0, example=0)


def test_augmentations_added_by_the_user():
    flip = lambda image, rng: image[:, ::-1]
    mixture = objective(image_augmentations=[flip])
    clean = make_clean(FEATURES["caption"], 0)
    example = mixture.apply(clean, seed=0, example=0)
    assert np.array_equal(example["inputs/image/input"],
                          patchify(clean["image_inputs"][:, ::-1], mixture.image))


def test_empty_and_single_token_texts():
    mixture = objective(text_s_split="uniform")
    for i in range(60):
        empty = mixture.apply({"text": np.zeros((0,), np.int32)}, seed=0, example=i)
        assert empty["targets/text/targets"].tolist() == [EOS_ID]
        assert len(empty["inputs/text/tokens"]) == 2
        single = mixture.apply({"text": np.array([7])}, seed=0, example=i)
        generated = mixture.choose({"text": 1}, seed=0, example=i).paradigm == "S"
        assert single["targets/text/targets"].tolist() == ([7, EOS_ID] if generated else [EOS_ID])
        assert single["inputs/text/tokens"][1:].tolist() == ([EOS_ID] if generated else [7, EOS_ID])
        # With an image to predict, an empty text is never the target.
        lengths = {"text": 0, "image": 16, "image_codes": 64}
        assert mixture.choose(lengths, seed=0, example=i).modality == "image"


def test_too_many_spans_is_found_before_training():
    mixture = objective()
    mixture.possible_lengths({"text": 480})
    with pytest.raises(UserError, match="num_sentinels") as caught:
        mixture.possible_lengths({"text": 512})
    assert "85 spans in a text of 512 tokens, 80 sentinels" in str(caught.value)
    objective(text_weights={"S": 1.0, "R": 1.0}).possible_lengths({"text": 512})
    where = find(mixture, {"text": 400}, "text", "X", 60)
    hard = [i for i in where if mixture.choose({"text": 400}, seed=0, example=i).mean_span == 3.0]
    for call in (lambda: mixture.lengths({"text": 512}, seed=0, example=hard[0]),
                 lambda: mixture.apply({"text": np.arange(512)}, seed=0, example=hard[0]),
                 lambda: mixture.lengths_many({"text": np.full(400, 512)}, np.arange(400), seed=0)):
        with pytest.raises(UserError, match="more hidden spans"):
            call()


@pytest.mark.parametrize("names,options,message", [
    (["txt"], {}, "did you mean 'text'"),
    (["text", "text_targets"], {}, "mixes supervised"),
    (["audio"], {}, "nothing to predict"),
    (["image", "image_codes"], {"target_modalities": ("text",)}, "nothing to predict"),
    (["text_inputs"], {}, "nothing to predict"),
    ([], {}, "nothing to predict"),
    (["image_inputs", "text_targets"], {"input_modalities": ("text",)}, "has no image"),
    (["image_target_codes"], {"target_modalities": ("text",)}, "target_modalities"),
    (["image_targets", "text_targets"], {}, "without 'image_target_codes'"),
    (["text"], {"supervised_only": True}, "supervised examples only"),
    (["text"], {"text_weights": {}}, "no denoiser with a positive weight"),
])
def test_examples_that_cannot_be_used(names, options, message):
    with pytest.raises(UserError, match=message):
        objective(**options).lengths(dict.fromkeys(names, 5), seed=0, example=0)


def test_features_can_be_left_out_on_purpose():
    mixture = objective(input_modalities=("text",), ignored_features=("image_inputs",))
    clean = make_clean(("image_inputs", "text_targets"), 0)
    assert set(mixture.apply(clean, seed=0, example=0)) == {
        "inputs/text/tokens", "targets/text/targets"}


@pytest.mark.parametrize("array", [np.zeros((3, 3), np.int32), np.zeros((3,), np.float32)])
def test_text_must_be_token_ids(array):
    with pytest.raises(UserError, match="whole numbers"):
        objective().apply({"text_targets": array}, seed=0, example=0)


@pytest.mark.parametrize("options,message", [
    ({"input_modalities": "text"}, "must be a list"),
    ({"input_modalities": ("image",)}, "must read text"),
    ({"input_modalities": ("text", "imag")}, "did you mean 'image'"),
    ({"target_modalities": ()}, "empty"),
    ({"text_weights": {"Z": 1.0}}, "text_weights"),
    ({"image_weights": {"X": 1.0}}, "image_weights"),
    ({"text_weights": {"R": -1.0}}, "not negative"),
    ({"target_weights": {"text": 1.0}}, "lacks a target modality"),
    ({"text_r": ()}, "text_r is empty"),
    ({"text_x": ((3.0,),)}, "pair"),
    ({"text_r": ((0.15, 3.0),)}, "mean span"),
    ({"text_s_fraction": 1.0}, "text_s_fraction"),
    ({"text_s_fraction": 0.75, "text_s_split": "uniform"}, "cannot exceed 0.5"),
    ({"image_mask_rate": 0.0}, "image_mask_rate"),
    ({"image_shift": -1}, "image_shift"),
    ({"image_augmentations": (3,)}, "image_augmentations"),
    ({"masked_loss": "some"}, "masked_loss"),
])
def test_unusable_settings(options, message):
    with pytest.raises(UserError, match=message):
        objective(**options)
