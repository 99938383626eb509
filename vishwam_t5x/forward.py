"""Run a checkpoint on one batch and write its logits and losses: the porter's tool.

usage: vishwam forward --gin_file=MODEL.gin --checkpoint=PATH --batch=FILE.npz --output=FILE.npz

--gin_file      any file that binds MODEL, such as gin/models/base.gin, or a whole recipe
--checkpoint    MODEL_DIR, a checkpoint folder, or a flat .npz of '/'-joined parameter names
--batch         arrays [rows, length, ...] as inputs/<modality>/... and targets/<modality>/...,
                or T5X's encoder_input_tokens, decoder_target_tokens, ...; what is left out
                (masks, positions, decoder inputs) is filled in
--output        gets logits/<modality> [rows, length, vocabulary], loss/<modality> (a sum in nats,
                z-loss included), z_loss/<modality>, weight_sum/<modality>, and encoder_output

No dropout. Runs on one device unless the file binds forward.forward.mesh.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import EXIT_OK, UserError
from vishwam_t5x.evaluation import restoring
from vishwam_t5x.evaluation.batch_file import read_batch
from vishwam_t5x.evaluation.placement import Placement
from vishwam_t5x.evaluation.shapes import without_budgets
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh

FLAGS = ("checkpoint", "batch", "output")


def forward(model: Any, checkpoint: str, batch: str, output: str,
            loss: LossConfig = LossConfig(), mesh: MeshConfig | None = None,
            logical_axis_rules: LogicalAxisRules = LogicalAxisRules()) -> dict[str, np.ndarray]:
    """Runs a model forward on a batch from a file.

    Args:
        model: Flax module with `logits`, `loss_sums` and a config.
        checkpoint: as `--checkpoint`.
        batch: file of the batch, see `evaluation.batch_file.read_batch`.
        output: the .npz file to write.
        loss: z-loss and label smoothing.
        mesh: devices along each axis; None: the first device alone.
        logical_axis_rules: which dimension is split over which mesh axis.

    Returns:
        What was written.

    Raises:
        UserError: parameters or arrays do not fit the model; the first mismatches are shown.
    """
    if not str(output).endswith(".npz"):
        raise UserError("--output must be the name of an .npz file", got=output)
    model = without_budgets(model)  # the file says itself how many frames there are
    config = model.config
    arrays = read_batch(batch, config.input_modalities, config.target_modalities)
    _check_against(config, arrays, batch)
    devices = make_mesh(mesh) if mesh else make_mesh(MeshConfig(), jax.local_devices()[:1])
    rows = next(iter(arrays.values())).shape[0]
    placement = Placement(devices, logical_axis_rules, rows)
    params, report = restoring.load_params(model, checkpoint, devices, logical_axis_rules)
    logging.info("%s", report.table())

    def run(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        variables = {"params": params}
        made = model.apply(variables, batch)
        found = {"encoder_output": made.encoder_output}
        sums = model.apply(variables, made.hidden, batch, loss, method="hidden_loss_sums")
        for modality, values in model.apply(variables, batch, method="logits").items():
            found[f"logits/{modality}"] = values
            found[f"loss/{modality}"] = sums[modality].loss
            found[f"z_loss/{modality}"] = sums[modality].z_loss
            found[f"weight_sum/{modality}"] = sums[modality].weight
        return found

    with placement.context():
        found = jax.jit(run, out_shardings=placement.replicated)(params, placement.put(arrays))
    # NumPy's files know no bfloat16; widening loses nothing.
    results = {name: np.asarray(value, np.float32) for name, value in
               jax.device_get(found).items()}
    _write(output, results)
    return results


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam forward ARGV` and returns the exit code."""
    from vishwam_t5x import gin_config

    config = gin_config.parse(argv, "forward", flags=FLAGS)
    logging.set_verbosity(logging.WARNING)
    missing = [name for name in FLAGS if not config.flags.get(name)]
    if missing:
        raise UserError(f"vishwam forward needs --{missing[0]}",
                        fix="vishwam forward --gin_file=MODEL.gin --checkpoint=PATH "
                            "--batch=FILE.npz --output=FILE.npz")
    given = {name: config.flags[name] for name in FLAGS}
    if "model" not in config.arguments(forward):
        model = config.macro("MODEL")
        if model is None:
            raise UserError("the gin file binds no MODEL", got=", ".join(config.files) or "no file",
                            fix="--gin_file=gin/models/base.gin, or a file that includes one")
        given["model"] = model
    results = config.call(forward, **given)
    for name, value in results.items():
        shown = f"{value:.6f}" if value.ndim == 0 else f"float32 {list(value.shape)}"
        print(f"{name:<24} {shown}")
    print(f"written to {given['output']}")
    return EXIT_OK


def _check_against(config: Any, arrays: dict[str, np.ndarray], path: str) -> None:
    """Refuses ids outside the tables and patches of another size, which XLA would clip in silence.
    """
    for name, size in config.patch_dims.items():
        patches = arrays.get(f"inputs/{name}/input")
        if patches is not None and patches.shape[-1] != size:
            raise UserError(f"{path}: the patches of 'inputs/{name}/input' are not the model's",
                            got=f"{patches.shape[-1]} numbers a patch", fix=f"{size} numbers")
    for modules, side, fields in ((config.inputs, "inputs", ("tokens",)),
                                  (config.targets, "targets", ("inputs", "targets"))):
        for module in modules:
            for field in fields:
                ids = arrays.get(f"{side}/{module.modality}/{field}")
                if ids is None or module.table is None or not ids.size:
                    continue
                rows = module.vocab_size
                if ids.min() < 0 or ids.max() >= rows:
                    raise UserError(
                        f"{path}: '{side}/{module.modality}/{field}' has ids outside the table",
                        got=f"{ids.min()} to {ids.max()}, table of {rows} rows",
                        fix="use the vocabulary of this model, or its vocab_size is wrong")


def _write(output: str, results: dict[str, np.ndarray]) -> None:
    packed = io.BytesIO()
    np.savez(packed, **results)
    storage.write_bytes(output, packed.getvalue())
