"""`model-info.txt`: one row a parameter, and totals that add up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from vishwam_t5x.parallelism.axis_rules import MESH_AXES
from vishwam_t5x.parallelism.show import model_info

AXES = {"encoder/wi/kernel": ("embed", "mlp"), "encoder/norm/scale": ("embed",),
        "decoder/embedding": ("vocab", "embed"), "step_size": ()}


def test_rows_and_totals():
    mesh = AbstractMesh((1, 2, 2, 2), MESH_AXES)
    params = {"encoder": {"wi": {"kernel": jax.ShapeDtypeStruct((16, 24), jnp.float32)},
                          "norm": {"scale": jax.ShapeDtypeStruct((16,), jnp.float32)}},
              "decoder": {"embedding": jax.ShapeDtypeStruct((40, 16), jnp.bfloat16)},
              "step_size": jax.ShapeDtypeStruct((), jnp.float32)}
    lines = model_info(params, mesh, axes=AXES)
    assert lines[0] == "mesh: 8 devices: data 2 x fsdp 2 x tensor 2"
    end = lines.index("", 2)
    rows = {line.split()[0]: line for line in lines[2:end]}
    modules = {line.split()[0]: line.split()[1:] for line in lines[end + 1:]}
    assert rows["encoder/wi/kernel"].split("  ")[-1].strip() == str(16 * 24 * 4 // 4)
    assert "16x24" in rows["encoder/wi/kernel"] and "embed, mlp" in rows["encoder/wi/kernel"]
    assert "fsdp, tensor" in rows["encoder/wi/kernel"]
    assert rows["encoder/norm/scale"].split()[-1] == "64"  # whole on every device
    assert "scalar" in rows["step_size"]
    assert modules["encoder"] == ["400", "1,600", "448"]
    assert modules["decoder"] == ["640", "1,280", "320"]
    assert modules["total"] == ["1,041", "2,884", "772"]


def test_the_mesh_is_named():
    mesh = Mesh([[[jax.devices()[:1]]]], MESH_AXES)
    lines = model_info({"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}, mesh,
                       axes={"w": ("embed", "mlp")})
    assert lines[0] == "mesh: 1 x cpu: not split"
