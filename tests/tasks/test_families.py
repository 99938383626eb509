"""Every family of Unified-IO 2's tasks from a made-up source to a row of a batch."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import seqio
import tensorflow as tf

import media
from vishwam_t5x.core.batch import ROW_ORDER
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import prompts as plain_prompts
from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths
from vishwam_t5x.data.prompts import FAMILIES
from vishwam_t5x.data.source import DatasetConfig, batch_spec
from vishwam_t5x.data.spectrogram import LogMelConfig, SegmentConfig
from vishwam_t5x.data.tf import audio, examples, features, image, prompts
from vishwam_t5x.data.tf.special_tokens import SpecialTokens
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import FrameSpec, PatchSpec
from vishwam_t5x.objectives.vocabulary import CODE_OFFSET, EOS_ID

TEXT = SpecialTokens(seqio.ByteVocabulary(extra_ids=0))
LAYOUT = TEXT.layout
PICTURE, CODE_GRID = image.PictureConfig(16, 16), (8, 8)
SOUND = audio.RecordingConfig(LogMelConfig(
    sample_rate=8000, fft_size=256, hop=128, num_mels=8, max_hertz=4000.0),
    SegmentConfig(128 * 15, 0), max_segments=3)
GREY = PatchSpec(4, channels=1)
OBJECTIVE = MixtureOfDenoisers(
    vocabulary=LAYOUT, input_modalities=ROW_ORDER, target_modalities=("text", "image", "audio"),
    image=PatchSpec(4), audio=GREY, image_history=FrameSpec(PatchSpec(4), (4, 4), 3),
    audio_history=FrameSpec(GREY, (4, 2), 2), task_masks=True)
BOX = np.asarray([0.25, 0.0, 0.75, 0.5], np.float32)
FIELDS = {"caption": "a red cat", "question": "how many?", "answer": "two",
          "expression": "the cup", "transcript": "seven", "instruction": "sort", "input": "b a",
          "output": "a b"}
PICTURES = {"captioning": "image_inputs", "question": "image_inputs", "referring": "image_inputs",
            "region": "image_inputs", "inpainting": "image_inputs", "image_denoising": "image"}
SOUNDS = {"audio_captioning": "audio_inputs", "transcription": "audio_inputs",
          "audio_denoising": "audio"}
CODES = {"image_generation": "image_target_codes", "inpainting": "image_target_codes",
         "image_denoising": "image_codes", "audio_generation": "audio_target_codes",
         "audio_denoising": "audio_codes"}
WRITES = {family: CODES.get(family, "text").split("_")[0] for family in FAMILIES}
NUM_CODES = {"image": 64, "audio": 32}


def source(family, split, shuffle_files, seed=None):
    """Examples 'one' and 'two', and 'bad', whose picture, sound, video or text is none."""
    picture = media.png(np.full((16, 16, 3), 200, np.uint8))
    sound = media.wav(media.hum(0.6, 8000), 8000)  # three segments
    number = NUM_CODES.get(WRITES[family], 0)
    spec = {"meta_id": (), "box": (4,), **dict.fromkeys(FIELDS, ())}
    rows = [{"meta_id": name, "box": BOX, **FIELDS} for name in ("one", "two", "bad")]
    if family in PICTURES or family in SOUNDS:
        feature = (PICTURES | SOUNDS)[family]
        for row in rows:
            row[feature] = picture if family in PICTURES else sound
        rows[2][feature] = rows[2][feature][:50]
    elif family == "video_captioning":
        for row in rows:
            row["image_history_inputs"] = [picture] * 2
        rows[2]["image_history_inputs"] = []
    else:
        rows[2] |= {"caption": " ", "instruction": ""}
    for row in rows:
        if family in CODES:
            row[CODES[family]] = np.arange(number, dtype=np.int32)
    kinds = {name: tf.TensorSpec(
        (number,) if name in CODES.values() else (None,) if name == "image_history_inputs"
        else spec.get(name, ()), tf.int32 if name in CODES.values() else
        tf.float32 if name == "box" else tf.string) for name in rows[0]}
    return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=kinds)


def task(family: str) -> seqio.Task:
    """What a user registers: a source, what decodes it, `ask`, and what the features are."""
    steps, found = [], {}
    text = features.text_feature(TEXT)
    if family in PICTURES:
        name = PICTURES[family]
        steps.append(functools.partial(image.decode_picture, feature=name, config=PICTURE))
        found[name] = features.image_feature(tf.uint8)
    if family in SOUNDS:
        name = SOUNDS[family]
        history = "audio_history" if name == "audio" else "audio_history_inputs"
        steps.append(functools.partial(audio.decode_recording, feature=name, history=history,
                                       config=SOUND))
        found |= {name: features.audio_feature(), history: features.segments_feature()}
    if family == "video_captioning":
        steps.append(functools.partial(image.decode_frames, feature="image_history_inputs",
                                       config=PICTURE))
        found["image_history_inputs"] = features.frames_feature()
    inpaints = family == "inpainting"
    steps.append(functools.partial(
        prompts.ask, family=family, grid=(4, 4) if inpaints else None,
        code_grid=CODE_GRID if inpaints else None))
    if inpaints:
        found |= {"image_input_patches": features.codes_feature(16),
                  "image_target_task_masks": features.codes_feature(2)}
    if family in CODES:
        found[CODES[family]] = features.codes_feature(64)
    kind = FAMILIES[family]
    found["text_prompt" if kind.restores else "text_inputs"] = text
    if kind.answer is not None:
        found["text_targets"] = text
    steps.append(functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False))
    return seqio.Task(family, seqio.FunctionDataSource(
        functools.partial(source, family), splits=("train",)), preprocessors=steps,
        output_features=found)


def read(family: str) -> tuple[list[dict], list[str]]:
    """The clean examples of a family, as a cache has them, and why others were left out."""
    this = task(family)
    dataset = examples.read_task(this, "train", 0)
    kept = examples.CleanFeatures.of_task(this, dataset)
    found = [kept.convert(element) for element in dataset.as_numpy_iterator()]
    return ([example for example, why in found if why is None],
            [why for _, why in found if why is not None])


def apply(clean: dict, number: int = 0) -> dict[str, np.ndarray]:
    return OBJECTIVE.apply({name: value for name, value in clean.items()
                            if not name.startswith("meta_")}, seed=0, example=number)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_from_its_source_to_a_row(family):
    good, refused = read(family)
    assert len(good) == 2 and len(refused) == 1 and refused[0].startswith("bad: "), refused
    kind, modality = FAMILIES[family], WRITES[family]
    model = apply(good[0])
    asked = model["inputs/text/tokens"]
    assert asked[0] == LAYOUT.prefix(modality, "R" if kind.restores else "S")
    assert asked[-1] == EOS_ID
    fields = {**FIELDS, "box": plain_prompts.box_tokens(BOX),
              "frames": "<image_history_1> <image_history_2>"}
    # Of the base vocabulary and the names of extra tokens; spaces beside those are not kept.
    packed = lambda text: text.replace(" ", "")
    assert packed(TEXT.decode(asked[1:-1])) in {
        packed(phrasing.format_map(fields)) for phrasing in kind.phrasings}
    target = model[f"targets/{modality}/targets"]
    if modality == "text":
        assert target[-1] == EOS_ID
        assert packed(TEXT.decode(target[:-1])) == packed(kind.answer.format_map(fields))
    else:
        np.testing.assert_array_equal(target, np.arange(NUM_CODES[modality]) + CODE_OFFSET)
    spec = batch_spec(DatasetConfig("made up", {"inputs": 256, "targets": 192,
                                                "inputs/image_history": 12}, 1), OBJECTIVE)
    placed = [PlacedExample(0, example_lengths(each, spec), each)
              for each in (model, apply(good[1], 1))]
    row = assemble(spec, 1, placed)
    segments = row[f"targets/{modality}/segment_ids"][0]
    assert [(segments == number).sum() for number in (1, 2)] == [
        len(each.arrays[f"targets/{modality}/targets"]) for each in placed]


def test_boxes_are_location_tokens_from_the_last_to_the_first():
    target = apply(read("referring")[0][0])["targets/text/targets"]
    bins = [int(share * 999) for share in BOX]
    assert target.tolist() == [LAYOUT.sentinel_start - 1 - b for b in bins] + [EOS_ID]


def test_inpainting_hides_the_box_and_weighs_its_codes():
    model = apply(read("inpainting")[0][0])
    rows, columns = np.divmod(model["inputs/image/pos_ids"], 4)
    assert len(rows) == 12 and not ((rows >= 1) & (rows < 3) & (columns < 2)).any()
    inside = np.zeros((8, 8), np.int32)
    inside[2:6, :4] = 1
    for name in ("task_mask", "loss_mask"):
        np.testing.assert_array_equal(model[f"targets/image/{name}"], inside.reshape(-1))
    with pytest.raises(UserError, match="not as long"):
        apply({**read("inpainting")[0][0], "image_target_task_masks": np.ones(3, np.int32)})


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_denoising_hides_patches_and_weighs_the_codes_behind_them(modality):
    clean = read(f"{modality}_denoising")[0][0]
    model = apply(clean)
    grid, codes = ((4, 4), (8, 8)) if modality == "image" else ((4, 2), (8, 4))
    hidden = np.ones(grid, bool)
    hidden.reshape(-1)[model[f"inputs/{modality}/pos_ids"]] = False
    assert hidden.mean() == 0.75
    want = np.repeat(np.repeat(hidden, 2, axis=0), 2, axis=1)
    assert want.shape == codes
    np.testing.assert_array_equal(model[f"targets/{modality}/task_mask"], want.reshape(-1))
    if modality == "audio":
        assert model["inputs/audio_history/input"].shape == (2, 8, 16), "the segments before"
