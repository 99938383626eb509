"""Names in Unified-IO 2's checkpoints, which have T5X's layout, and T5X's own beside them."""

import pathlib

import numpy as np

from vishwam_t5x.checkpointing.convert import names

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def published():
    """What the original's checkpoint of the golden model holds."""
    found = ["state/step", "state/param_states/encoder/encoder_norm/scale/v",
             "target/target_encoders_image/discrete_vae/quant_conv/kernel"]
    for file in ("params.npz", "input_params.npz"):
        with np.load(GOLDEN / "unified_io2" / file) as arrays:
            found += [f"target/{name}" for name in arrays.files]
    return found


def test_every_published_name_goes_both_ways():
    ours = [place for name in published() for place in names.from_t5x(name)]
    assert "params/image_transformer/pre_ln/scale" in ours and len(set(ours)) == len(ours)
    places, bookkeeping, homeless = names.all_to_t5x(ours)
    assert sorted(places.values()) == sorted(published()) and not homeless
    assert bookkeeping == ("opt_state/step",)


def test_what_unified_io2_has_not_is_not_lost_unsaid():
    ours = [place for name in published() for place in names.from_t5x(name)]
    foreign = ("params/encoder/relpos_bias/rel_embedding",
               "params/target_encoders_text/logits_kernel")
    assert names.all_to_t5x([*ours, *foreign])[2] == foreign


def test_a_t5_keeps_its_names():
    with np.load(GOLDEN / "t5x" / "params_trained.npz") as arrays:
        theirs = [f"target/{name}" for name in arrays.files]
    ours = [place for name in theirs for place in names.from_t5x(name)]
    assert names.all_to_t5x(ours) == (dict(zip(ours, theirs, strict=True)), (), ())
    assert names.spellings("image_transformer/pre_ln/bias") == {
        "input_image_encoder/image_encoder/vision_transformer/pre_ln/bias"}
