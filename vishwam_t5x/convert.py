"""Convert a checkpoint of T5X, Hugging Face or ours into another of these layouts.

usage: vishwam convert --from=PATH --to=PATH [--format=F] [--verify] [--dtype=D] [--drop=REGEX]
                       [--layers=unrolled|stacked]

--from       T5X: MODEL_DIR (its newest) or MODEL_DIR/checkpoint_STEP, legacy or Orbax; Hugging
             Face: a folder with config.json and safetensors; ours: MODEL_DIR or
             MODEL_DIR/checkpoints/STEP; or a flat .npz or .safetensors, with our names or those
             of Unified-IO 2's PyTorch port, OpenCLIP's image transformer, AST, or taming's VQGAN;
             several such files, joined by commas, go into one; or the folder of that port
--to         a MODEL_DIR, where checkpoint_STEP or checkpoints/STEP is made; for huggingface and
             unified_io2_torch the folder itself. Nothing is overwritten, and what is killed leaves
             nothing that looks whole
--format     t5x, t5x_orbax, huggingface, unified_io2_torch (an .npz with the names of its PyTorch
             port) or vishwam; default: vishwam, unless --from is ours
--dtype      float32, bfloat16 or float16 for the parameters; the optimizer's state stays as it is
--drop       arrays that may be lost, as a regular expression of their whole name; repeatable. An
             array that has no place in the other layout is refused unless it is named here
--layers     how T5X's layouts get the layers of a run with scan_layers: unrolled, one by one, as
             t5.network and the published checkpoints of T5 and Unified-IO 2 have them, or stacked,
             on axis 1, as scalable_t5 has them. Default: unrolled; from T5X as they are. Ours reads
             both
--verify     read what was written again and compare every bit; where the other side's library (t5x;
             torch and transformers) is installed, compare the logits of both sides too. Where
             anything differs nothing is left at --to
--gin_file   file that binds MODEL: what a config.json says and no parameter tells

The optimizer's state goes along where both layouts have one: of T5X's Adafactor, both ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vishwam_t5x.command_line import CommandLine
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import EXIT_OK, UserError, one_of

if TYPE_CHECKING:
    import numpy as np
    from etils import epath

    from vishwam_t5x.checkpointing.convert.conversion import Conversion, Opened
    from vishwam_t5x.checkpointing.convert.t5_network import T5Network

FLAGS = ("from", "to", "format", "verify", "dtype", "drop", "layers")
_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam convert ARGV` and returns the exit code."""
    words, drop = _prepared(argv)
    line = CommandLine.split(words, "convert", FLAGS)
    for name in ("from", "to"):
        if not line.flags.get(name):
            raise UserError(f"vishwam convert needs --{name}",
                            fix="vishwam convert --from=PATH --to=PATH")
    dtype = line.flags.get("dtype")
    if dtype is not None:
        one_of(dtype, _DTYPES, "dtype of parameters")
    from vishwam_t5x.checkpointing.convert import conversion as conversions
    from vishwam_t5x.checkpointing.convert import interrupted
    from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint

    source, to = line.flags["from"], line.flags["to"]
    opened = conversions.open_any(source)
    kind = line.flags.get("format") or _default_format(opened)
    opened = interrupted.same_again(opened, source, kind, to)
    fresh = _run_state() if kind == conversions.OURS else None
    plan = conversions.plan(opened, kind, to, drop, dtype, fresh,
                            line.flags.get("layers"))
    network = _network(opened, words if line.files else None)
    vocabulary = None
    if opened.kind == conversions.HUGGINGFACE:
        from vishwam_t5x.checkpointing.convert import huggingface

        vocabulary = huggingface.vocabulary(opened.place)
    found: list[str] = []

    def check(written: Conversion) -> None:
        if "verify" in line.flags:
            found.extend(_verified(written, network, plan.target))

    try:
        report = conversions.write(plan, network, vocabulary, check,
                                   interrupted.kept_in_mind(plan, source, to))
    except DamagedCheckpoint as damage:
        raise UserError("this checkpoint is damaged", got=f"{damage.path}: {damage.why}",
                        fix="copy it again") from damage
    print(dataclasses.replace(report, source=f"{opened.kind}: {opened.place}",
                              target=f"{kind}: {plan.target}"))
    _say_more(plan, network)
    print(*found, sep="\n", end="\n" if found else "")
    return EXIT_OK


def _verified(written: Conversion, network: T5Network | None, target: epath.Path) -> list[str]:
    """Holds what was written, wherever it lies so far, against what was to be."""
    from vishwam_t5x import conversion_check
    from vishwam_t5x.checkpointing.convert import conversion
    from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint

    left = f"nothing is left at {target}"
    try:
        return [f"verified: {conversion.verify(written)} arrays read again, every bit equal",
                conversion_check.compare_logits(written, network)]
    except DamagedCheckpoint as damage:
        raise UserError("what was written reads otherwise than it was", got=damage.why,
                        fix=f"{left}; see whether its disk is sound, and convert again"
                        ) from damage
    except UserError as error:
        raise UserError(error.problem, got=error.got,
                        fix="; ".join(filter(None, (error.fix, left)))) from error


def _prepared(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Joins '--from PATH' to '--from=PATH', and takes all of --drop out, which may be repeated."""
    words, drop, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        name = word.lstrip("-")
        if word.startswith("-") and name in FLAGS and name != "verify":
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value", fix=f"write --{name}=VALUE")
            word = f"--{name}={rest.pop(0)}"
        if word.startswith("--drop="):
            drop.append(word.removeprefix("--drop="))
        else:
            words.append(word)
    return words, drop


def _default_format(opened: Opened) -> str:
    from vishwam_t5x.checkpointing.convert.conversion import FORMATS, OURS

    if opened.kind == OURS:
        raise UserError("say into which layout to convert a checkpoint of ours",
                        fix="--format=" + ", ".join(name for name in FORMATS if name != OURS))
    return OURS


def _run_state() -> dict[str, np.ndarray]:
    """What a `TrainState` has beside parameters and optimizer, as it is when a run begins."""
    import numpy as np

    from vishwam_t5x.core.batch import DataPosition
    from vishwam_t5x.core.trees import flatten_names
    from vishwam_t5x.precision.loss_scale import LossScaleConfig, init_loss_scale
    from vishwam_t5x.training.stability import StabilityState

    begun = {"loss_scale": init_loss_scale(LossScaleConfig("none")),
             "stability": StabilityState.create(), "position": DataPosition().to_arrays()}
    return {name: np.asarray(leaf) for name, leaf in flatten_names(begun).items()}


def _network(opened: Opened, words: Sequence[str] | None) -> T5Network | None:
    """What is known of the network: from a gin file, a config.json, or nothing."""
    from vishwam_t5x.checkpointing.convert import conversion, huggingface, t5_network

    if words is not None:
        from vishwam_t5x import gin_config

        config = gin_config.parse(words, "convert", flags=FLAGS)
        model = config.macro("MODEL")
        if model is None:
            raise UserError("the gin file binds no MODEL", got=", ".join(config.files),
                            fix="--gin_file=gin/models/t5_1_1/small.gin, or one that includes such")
        return t5_network.from_model(model.config)
    if opened.kind == conversion.HUGGINGFACE:
        return huggingface.describe(opened.place)
    return None


def _say_more(plan: Conversion, network: T5Network | None) -> None:
    from vishwam_t5x import presets
    from vishwam_t5x.checkpointing.convert import conversion

    if plan.kind in (conversion.HUGGINGFACE, conversion.TORCH):
        return
    leaves = {name.removeprefix("params/"): leaf for name, leaf in plan.source.leaves.items()
              if name.startswith("params/")}
    if plan.kind == conversion.OURS:
        if network is None:
            model = presets.advice(leaves)
        else:
            name, lines = presets.nearest(network)
            model = f"the model file is {name}" + (
                ", with\n  " + "\n  ".join(lines) if lines else "")
        if model:
            print(model)
        whole = any(name.startswith("opt_state/") for name in plan.names)
        print(f"training goes on from it with MODEL_DIR = '{storage.parent(plan.target.parent)}', "
              "where Adafactor and no global_norm_clip are bound" if whole else
              f"start from it with INITIAL_CHECKPOINT_PATH = '{plan.target}'")
    elif "state/param_states" in plan.report.missing:
        print("without Adafactor's state T5X restores it for evaluation; for training it needs "
              "fallback_to_scratch = True")
