"""Pictures in the place of a text token of their prompt, as patches, features or codes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import model_fixtures

from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.sequence import InputSequence
from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths
from vishwam_t5x.models import placement
from vishwam_t5x.models.config import (
    CodeInput,
    CodeOutput,
    ImageInput,
    ImageTransformer,
    PatchInput,
    TextInput,
    TextOutput,
)

MARK = 9


def columns_of(text, segments, pictures, tokens=(MARK,), frames=None, columns=12):
    """The slots of one row in their order; `pictures` are the segments of the picture slots."""
    text, segments, pictures = (np.asarray([part], np.int32) for part in (text, segments, pictures))
    parts = {name: InputSequence(jnp.zeros((*ids.shape, 1)), None, jnp.asarray(ids))
             for name, ids in (("text", segments), ("image", pictures))}
    slots = (pictures.shape[1], 1) if frames is None else (len(frames), 4, 1)
    fields = {"text": {"tokens": jnp.asarray(text)}, "image": {"input": jnp.zeros((1, *slots))}}
    if frames is not None:
        fields["image"]["frame_ids"] = jnp.asarray([frames])
    found = placement.at_placeholders(parts, fields, {"image": tokens}, columns)
    return [slot for slot in np.asarray(found)[0].tolist() if slot >= 0]


@pytest.mark.parametrize("text, segments, pictures, expected", [
    # Text slots come first: 0 to 6, then pictures from 7 on.
    ([5, 9, 6, 7, 9, 8, 0], [1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 0],
     [0, 7, 8, 2, 3, 9, 5]),  # two examples of a packed row, each its own
    ([5, 6, 7, 8, 9, 0, 0], [1, 1, 2, 2, 2, 0, 0], [1, 1], [7, 8, 0, 1, 2, 3, 4]),
    # no placeholder: in front; no picture: a token like others
    ([9, 5, 9, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1, 1], [7, 8, 1, 2])])  # the first one counts
def test_order(text, segments, pictures, expected):
    assert columns_of(text, segments, pictures) == expected


def test_frames_have_a_token_each():
    """Two slots a frame; frame 1 stands first, frame 2 has no token in the text."""
    order = columns_of([5, 11, 6, 10], [1, 1, 1, 1], [1] * 6, tokens=(10, 11, 12),
                       frames=(0, 1, 2))
    assert order == [8, 9, 0, 6, 7, 2, 4, 5]


PLAIN = {"num_encoder_layers": 0, "num_decoder_layers": 1,
         "targets": (TextOutput(vocab_size=64, modality_embedding=False),)}
TEXT = TextInput(vocab_size=64, modality_embedding=False)
CODES = CodeInput(modality="image", vocab_size=20, grid=(2, 2), in_table="text", offset=40,
                  modality_embedding=False, placeholder=MARK)


def lay_out(examples, packed, codes):
    """Rows of (text tokens, codes or None, target)."""
    placed = []
    for number, (text, image, target) in enumerate(examples):
        arrays = {"inputs/text/tokens": text, "targets/text/targets": target}
        if image is not None and codes:
            arrays["inputs/image/tokens"] = image
        arrays = {key: np.asarray(value, np.int32) for key, value in arrays.items()}
        placed.append(PlacedExample(0 if packed else number, example_lengths(arrays), arrays))
    capacities = {"text": 10, "image": 6} if codes else {"text": 12}
    rows = placed[-1].row + 1
    spec = BatchSpec(rows, 12, 8, capacities, {"text": 8}, packed=packed)
    return assemble(spec, rows, placed)


@functools.cache
def logits_function(model):
    return jax.jit(lambda variables, batch: model.apply(variables, batch, method="logits")["text"])


def test_codes_in_the_text_are_the_text_they_are():
    """Codes that are rows of the text table, spliced, equal the same ids written out as text."""
    examples = [([5, MARK, 6], [3, 4, 5], [20, 21, 1]), ([7, 8], None, [22, 1]),
                ([MARK, 11], [2, 6], [23, 24])]
    written = [([5, 43, 44, 45, 6], None, [20, 21, 1]), examples[1], ([42, 46, 11], None, [23, 24])]
    model, variables = model_fixtures.build(inputs=(TEXT, CODES), **PLAIN)
    plain, _ = model_fixtures.build(inputs=(TEXT,), **PLAIN)
    want = np.asarray(logits_function(plain)(variables, lay_out(written, False, False)))
    want = np.where(np.isin(np.arange(64), np.arange(40, 60)), -1e10, want)  # those are codes
    alone = logits_function(model)(variables, lay_out(examples, False, True))
    packed = logits_function(model)(variables, lay_out(examples, True, True))
    start = 0
    for row, number in enumerate((3, 2, 2)):
        np.testing.assert_allclose(alone[row, :number], want[row, :number], atol=1e-5)
        np.testing.assert_allclose(packed[0, start:start + number], want[row, :number], atol=1e-5)
        start += number


VIT = ImageTransformer(patch_dim=4, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_layers=2,
                       position_grid=(2, 2))


def test_a_frozen_encoder_and_a_projector_of_two_layers():
    image = ImageInput(transformer=VIT, grid=(2, 2), features="last", projector="mlp", freeze=True,
                       placeholder=MARK)
    model, variables = model_fixtures.build(inputs=(TEXT, image), **PLAIN)
    params = variables["params"]
    own = params["input_image_encoder"]
    assert own["projection"]["wi"]["kernel"].shape == (16, 32)
    rng = np.random.default_rng(0)
    batch = {"inputs/text/tokens": np.asarray([[5, MARK, 6]], np.int32),
             "inputs/image/input": rng.normal(size=(1, 4, 4)).astype(np.float32),
             "targets/text/inputs": np.asarray([[0, 20]], np.int32),
             "targets/text/mask": np.ones((1, 2), np.int32)}

    def features(module, patches):
        ones = jnp.ones((1, 4), jnp.int32)
        return module.transformers["image_transformer"](
            patches, jnp.arange(4)[None], ones, (2, 2), 1).last

    @jax.jit
    def run(params):
        def total(params):
            return jnp.sum(model.apply({"params": params}, batch).hidden["text"])

        encoded = model.apply({"params": params}, batch, method="encode").hidden
        return (encoded, jax.grad(total)(params),
                model.apply({"params": params}, batch["inputs/image/input"], method=features))

    encoded, gradient, last = run(params)
    hidden = jax.nn.gelu(last @ own["projection"]["wi"]["kernel"] + own["projection"]["wi"]["bias"],
                         approximate=False)
    want = hidden @ own["projection"]["wo"]["kernel"] + own["projection"]["wo"]["bias"]
    want = want + own["modality_embedding"]
    text = params["text_token_embedder"]["embedding"]
    np.testing.assert_allclose(encoded[0], [text[5], *want[0], text[6], 0 * text[6]], atol=1e-5)
    largest = {name: max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(part))
               for name, part in gradient.items()}
    assert largest["image_transformer"] == 0 and largest["input_image_encoder"] > 1e-4


def test_projector_and_head_cost_what_their_matmuls_do():
    from vishwam_t5x.training.setup import flops_per_slot

    spec = BatchSpec(1, 8, 8, {"text": 4, "image": 4}, {"text": 4, "image": 4},
                     {"image": 4})

    def cost(image=(), codes=()):
        found = model_fixtures.config(
            **PLAIN | {"inputs": (TEXT, ImageInput(transformer=VIT, grid=(2, 2), **dict(image))),
                       "targets": (TextOutput(vocab_size=64), CodeOutput(
                           modality="image", vocab_size=20, grid=(2, 2), **dict(codes)))})
        return np.asarray(flops_per_slot(found, spec)) * 8

    base, own = cost(), {"logits_via_embedding": False}
    both = cost({"projector": "mlp"}, own | {"adaptor": "mlp", "head": "mlp", "embedding_dim": 8})
    adaptor, head = 8 * 32 + 32 * 32, 32 * 32
    np.testing.assert_allclose(both - base, [3 * 2 * 4 * 32 * 32, 3 * 2 * 4 * (adaptor + head)])
    assert (base - cost({"features": "last"}))[0] == 3 * 2 * 4 * 16 * 32
    frozen = cost({"freeze": True, "projector": "mlp"}) - cost({"freeze": True})
    assert frozen[0] == 3 * 2 * 4 * 32 * 32


@pytest.mark.parametrize("changes, match", [
    ({"num_encoder_layers": 1}, "prefix of a decoder-only model"),
    ({"inputs": (CODES,)}, "no text whose token"),
    ({"inputs": (TEXT, PatchInput(modality="image", patch_dim=4, grid=(2, 2), placeholder=64))},
     "token of the text vocabulary"),
    ({"inputs": (TEXT, PatchInput(modality="image", patch_dim=4, grid=(2, 2), placeholder=9),
                 PatchInput(modality="audio", patch_dim=4, grid=(2, 2), placeholder=9))},
     "the same placeholder")])
def test_refuses(changes, match):
    with pytest.raises(UserError, match=match):
        model_fixtures.config(**PLAIN | {"inputs": (TEXT, CODES)} | changes)


def test_input_and_output_of_a_modality_have_the_same_rows():
    output = CodeOutput(modality="image", vocab_size=20, grid=(2, 2), in_table="text", offset=41)
    with pytest.raises(UserError, match="different rows"):
        model_fixtures.config(**PLAIN | {"inputs": (TEXT, CODES),
                                         "targets": (*PLAIN["targets"], output)})
