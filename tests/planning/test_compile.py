"""A compiler without its GPU is given a second chance, and only for what that helps."""

from __future__ import annotations

import types

import jax
import pytest

from vishwam_t5x.planning.compile import _compile

NO_TILES = "INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.1 = bf16[1536,1024]"


def lowered(asked: list, message: str, refuses):
    def compile(compiler_options=None):
        asked.append(compiler_options)
        if refuses(compiler_options or {}):
            raise jax.errors.JaxRuntimeError(message)
        return "compiled"

    return types.SimpleNamespace(compile=compile)


def test_matmuls_without_tiles_go_to_cublas():
    asked: list = []
    program = lowered(asked, NO_TILES, lambda options: "xla_gpu_enable_triton_gemm" not in options)
    gpu = types.SimpleNamespace(platform="gpu", name="rtx3090")
    assert _compile(program, {"a": 1}, gpu) == "compiled"
    assert asked == [{"a": 1}, {"a": 1, "xla_gpu_enable_triton_gemm": False}]


@pytest.mark.parametrize(("platform", "message"), [("gpu", "RESOURCE_EXHAUSTED"),
                                                   ("tpu", NO_TILES)])
def test_other_refusals_stand(platform, message):
    asked: list = []
    target = types.SimpleNamespace(platform=platform, name="it")
    with pytest.raises(jax.errors.JaxRuntimeError):
        _compile(lowered(asked, message, lambda options: True), {}, target)
    assert asked == [None]
