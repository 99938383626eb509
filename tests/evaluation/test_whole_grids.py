"""What Unified-IO 2's configuration writes of an image and of a sound: every code, no more."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax.core import meta

from vishwam_t5x import gin_config
from vishwam_t5x.evaluation import programs
from vishwam_t5x.evaluation.generator import DecodingConfig, Generator
from vishwam_t5x.parallelism.mesh import make_mesh


@pytest.mark.parametrize(("method", "guidance"), [
    ("sample", 10.0), pytest.param("beam", 0.0, marks=pytest.mark.slow)])
def test_a_grid_has_all_its_codes(method, guidance):
    """1,024 of an image (32 x 32), 512 of a sound (32 x 16); nothing is allocated or run."""
    model = gin_config.parse(["--gin_file=gin/models/unified_io2/tiny.gin",
                              "--gin.INPUT_MODALITIES=('text',)"], "forward").macro("MODEL")
    params = meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))["params"]
    how = DecodingConfig(method=method, guidance=guidance, num_decodes=2)
    writer = Generator(model, make_mesh(), None, 1, {"image": how, "audio": how}, 32, {"text": 16},
                       without_text=lambda ids, modality: ids[:1])
    rows = 2 if guidance else 1
    batch = {f"inputs/text/{name}": jax.ShapeDtypeStruct((rows, 16), np.int32)
             for name in ("tokens", "mask", "pos_ids")}
    for modality, number in (("image", 1024), ("audio", 512)):
        found = jax.eval_shape(
            lambda params, batch, key, writing=writer.writing(modality): programs.write(
                model, params, batch, key, writing), params, batch, jax.random.key(0))
        assert found.tokens.shape == (1, 2, number)
