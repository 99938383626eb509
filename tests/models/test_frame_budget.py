"""Budgets of frames on several devices: the same latents, and frames that stay where they are."""

from __future__ import annotations

CODE = """
    import dataclasses, functools
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from models import golden_fixtures, model_fixtures
    from vishwam_t5x.models.encoder_decoder import EncoderDecoder
    from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
    from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh

    history = golden_fixtures.INPUTS["image_history"]
    shallow = lambda part, layers: dataclasses.replace(part, num_layers=layers)
    history = dataclasses.replace(history, transformer=shallow(history.transformer, 2),
                                  resampler=shallow(history.resampler, 1))
    rng = np.random.default_rng(0)
    present = np.zeros((16, 3), np.int32)
    for first in range(0, 16, 2):  # three frames of the six of any two rows
        present[first:first + 2].reshape(-1)[rng.permutation(6)[:3]] = 1
    fields = {"input": rng.normal(size=(16, 3, 9, 768)).astype(np.float32),
              "mask": present[:, :, None] * np.ones(9, np.int32)}
    mesh = make_mesh(MeshConfig(data=8))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def embedded(module):
        model = EncoderDecoder(dataclasses.replace(
            golden_fixtures.config(("text",), ("text",)), inputs=(module,)))
        encode = jax.jit(functools.partial(
            model.apply, method=lambda self, fields: self.input_encoders["image_history"](fields)),
            in_shardings=(None, rows), out_shardings=rows)
        with mesh:
            compiled = encode.lower(model_fixtures.draw_variables(model), fields).compile()
            return compiled(model_fixtures.draw_variables(model), jax.device_put(fields, rows)), (
                compiled.as_text())

    expected, _ = embedded(history)
    valid = np.asarray(expected.segment_ids) > 0
    for shared in (2, 16):
        found, program = embedded(dataclasses.replace(history, frame_budget=1.5,
                                                      budget_rows=shared))
        np.testing.assert_array_equal(found.segment_ids, expected.segment_ids)
        np.testing.assert_allclose(np.asarray(found.embeddings)[valid],
                                   np.asarray(expected.embeddings)[valid], atol=1e-5)
        moved = [name for name in ("all-gather", "all-to-all", "all-reduce", "collective-permute")
                 if f"{name}(" in program or f"{name}-start(" in program]
        print(shared, moved)
"""


def test_frames_stay_on_the_device_of_the_rows_that_share_them(eight_devices):
    import helpers

    said = eight_devices(CODE, env={"PYTHONPATH": str(helpers.ROOT / "tests")}).splitlines()
    assert said[0] == "2 []", "two rows a device"
    assert said[1] != "16 []", "a budget of all rows moves frames between devices"
