"""From the parts of a run to a loop that is ready: shapes, compiled step, data, saved state.

Compiling, restoring and reading the first batches overlap: the time to the first step is that of
the longest of the three, not their sum.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from vishwam_t5x.core import hardware
from vishwam_t5x.core.batch import BatchSpec, HistorySpec
from vishwam_t5x.core.errors import BACKGROUND, UserError
from vishwam_t5x.core.flops import (
    BACKWARD_AND_FORWARD,
    EncoderDecoderShape,
    block_flops,
    resampler_flops,
    train_flops,
    transformer_flops,
)
from vishwam_t5x.core.rng import key_for
from vishwam_t5x.models.codecs.layers import encoding_flops
from vishwam_t5x.objectives.metrics import drop_empty
from vishwam_t5x.parallelism import sharding
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.training import compilation, step
from vishwam_t5x.training.optimizer_base import Optimizer
from vishwam_t5x.training.state import StateFactory, TrainState
from vishwam_t5x.training.throughput import Throughput


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
        model: Flax module with `loss_sums`, and `config` with its shapes and precision.
        optimizer: optimizer configuration.
        mesh: devices.
        rules: logical to mesh axes.
        step: microbatches, loss, stability.
        spec: shapes of the batch.
    """

    model: Any
    optimizer: Optimizer
    mesh: Mesh
    rules: LogicalAxisRules
    step: step.StepConfig
    spec: BatchSpec

    @property
    def _sparing(self) -> Optimizer:
        """The optimizer, kept from what the model never trains."""
        return self.optimizer.sparing(getattr(self.model.config, "frozen_prefixes", ()))

    def factory(self) -> StateFactory:
        """Shapes and shardings of the train state."""
        return StateFactory(self._init_params, self._sparing.build(self._logical_axes),
                            self.model.config.policy, self.mesh, self.rules)

    def _init_params(self, key: Any) -> Any:
        return self.model.init(key)["params"]

    def _logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        return self._cached_logical_axes

    @functools.cached_property
    def _cached_logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        boxed = jax.eval_shape(self._init_params, jax.random.key(0))
        return sharding.logical_axes_by_name(boxed)

    def batch_shardings(self) -> dict[str, Any]:
        """Where each array of a batch lives."""
        sharding.check_batch_size(self.spec.batch_size, self.mesh, self.rules,
                                  self.step.num_microbatches)
        return sharding.batch_shardings(self.spec.arrays(), self.mesh, self.rules)

    def compile(self, factory: StateFactory, shardings: Mapping[str, Any]) -> Any:
        """The compiled train step."""
        return compilation.compile_step(*self._step(factory, shardings))

    def lower(self, factory: StateFactory, shardings: Mapping[str, Any]) -> Any:
        """What `compile` compiles, traced for the devices of the mesh, and the options it takes."""
        return compilation.lower_with_options(*self._step(factory, shardings))

    def _step(self, factory: StateFactory, shardings: Mapping[str, Any]) -> tuple[Any, ...]:
        config = dataclasses.replace(self.step, rows_together=self.spec.rows_together)
        function = step.make_train_step(
            step.model_loss(self.model, self.step.loss), self._sparing.build(self._logical_axes),
            config, self.model.config.policy.accumulation_dtype, self._sparing.frozen)
        return function, factory, compilation.abstract_batch(self.spec, shardings)

    def throughput(self) -> Throughput:
        """Counter of useful work against the peak of all devices."""
        device = self.mesh.devices.flat[0]
        peak = hardware.peak_flops(device, self.model.config.policy.name)
        logging.info(hardware.peak_flops_source(device))
        total = None if peak is None else peak * self.mesh.size
        return Throughput(flops_per_slot(self.model.config, self.spec), total)


def check_modalities(model: Any, objective: Any, spec: BatchSpec) -> None:
    """Raises `UserError` unless the model can take what the objective gives."""
    config = model.config
    for side, gives, takes in (
            ("inputs", objective.input_modalities, config.input_modalities),
            ("targets", objective.target_modalities, config.target_modalities)):
        lacking = [name for name in gives if name not in takes]
        if lacking:
            raise UserError(f"the objective has {side} that the model lacks",
                            got=", ".join(lacking),
                            fix=f"add them to EncoderDecoderConfig.{side}, or leave them out of "
                                f"the objective's modalities ({side}: {', '.join(takes)})")
    for modality in spec.input_capacities:
        read = modality in config.patch_dims
        if read != (modality in spec.patch_dims) and modality not in spec.histories:
            raise UserError(f"the model reads the {'patches' if read else 'codes'} of modality "
                            f"'{modality}', the objective does not give them",
                            fix=f"{'take it out of' if read else 'add it to'} "
                            "MixtureOfDenoisers.code_inputs, or give the model "
                            f"{'a CodeInput' if read else 'a PatchInput'} of it")
    for modality, size in spec.patch_dims.items():
        if config.patch_dims.get(modality) != size:
            raise UserError(
                f"patches of modality '{modality}' differ between objective and model",
                got=f"{size} numbers a patch against {config.patch_dims.get(modality)}",
                fix="make PatchSpec of the objective and PatchInput of the model agree")
    for module in config.inputs:
        if (history := spec.histories.get(module.modality)) is not None:
            _check_history(module, objective, history)
    for target in config.targets:
        if (target.reads_task_mask and target.modality in spec.target_capacities
                and target.modality not in spec.task_masks):
            raise UserError(
                f"the model hides what the task hid of modality '{target.modality}', but the "
                "objective does not say what that is", got="task_masks = False",
                fix="MixtureOfDenoisers.task_masks = True, or CodeOutput.dynamic_mask and "
                "mask_token = False")
    for modality, signal in spec.signals.items():
        codec = getattr(config, "codecs", {}).get(modality)
        if codec is None or codec.signal != signal:
            raise UserError(
                f"the objective gives {signal.name} of modality '{modality}', and the model has "
                "no codec for them", got=f"{signal}, the model's: {codec and codec.signal}",
                fix="set CodeOutput.codec to what MixtureOfDenoisers.codecs names")
    layout = getattr(objective, "vocabulary", None)
    rows = config.tables.get("text")
    if layout is not None and rows is not None and rows < layout.size:
        raise UserError("the model's text table is smaller than the vocabulary",
                        got=f"{rows} rows, {layout.size} ids",
                        fix=f"set vocab_size of TextInput and TextOutput to {layout.table_size}")
    if layout is not None and rows is not None:
        for modality, (first, _) in config.shared_rows("text").items():
            if first < layout.size:
                raise UserError(
                    f"codes of modality '{modality}' have rows of the text table that text has too",
                    got=f"row {first} on; the vocabulary has {layout.size} ids",
                    fix=f"offset = {layout.size} or more, of its CodeInput and CodeOutput")


def _check_history(module: Any, objective: Any, history: HistorySpec) -> None:
    """Raises `UserError` unless objective and model mean the same by the frames of a modality."""
    if not hasattr(module, "resampler"):
        raise UserError(f"the model does not read frames of modality '{module.modality}'",
                        got=type(module).__name__, fix="config.HistoryInput")
    grid = objective.histories[module.modality].grid
    for what, gives, takes, fix in (
            ("patches of a frame", grid, module.grid, "FrameSpec.grid = HistoryInput.grid"),
            ("latents of a frame", history.latents, module.resampler.num_latents,
             "FrameSpec.latents = Resampler.num_latents"),
            ("budget of frames", history.budget, module.frame_budget,
             "FrameSpec.budget = HistoryInput.frame_budget"),
            ("rows that share it", history.budget_rows, module.budget_rows,
             "FrameSpec.budget_rows = HistoryInput.budget_rows")):
        if gives != takes and not (history.budget is None is module.frame_budget
                                   and what.startswith("rows")):
            raise UserError(f"objective and model differ in modality '{module.modality}': {what}",
                            got=f"{gives} against {takes}", fix=f"one gin macro for both: {fix}")


def check_given(model: Any, made_up: Iterable[str]) -> None:
    """Refuses to begin with random values where nothing would ever train them, or says so.

    A codec of random numbers makes nothing that means anything. Of a frozen input random features
    are still features, and small experiments make do with them: that is a line in the log.

    Args:
        model: Flax module.
        made_up: names of parameters that no checkpoint gives, or what they begin with.

    Raises:
        UserError: one of them is a codec's.
    """
    made_up = tuple(made_up)
    prefixes = getattr(model.config, "codec_prefixes", ())
    for prefix in getattr(model.config, "frozen_prefixes", ()):
        if prefix not in prefixes and any(name.startswith(prefix) for name in made_up):
            logging.warning(
                "%s* is frozen and comes from no checkpoint: it stays as it was drawn. Start from "
                "one that has it (INITIAL_CHECKPOINT_PATH), or train it: freeze = False", prefix)
    for name in made_up:
        if prefixes and name.startswith(prefixes):
            place = next(prefix for prefix in prefixes if name.startswith(prefix))
            raise UserError(
                "a codec of the model would be random for good: it is not trained with the model",
                got=f"nothing gives {place}",
                fix="start from the checkpoint of its own run, too: train.train.assignment_map = "
                    f"[('{place}(.*)', 'discrete_vae/\\\\1')], train.train.fallback_to_scratch = "
                    "True; or leave CodeOutput.codec out")


def flops_per_slot(config: Any, spec: BatchSpec) -> tuple[float, float]:
    """Returns training FLOPs per filled (encoder slot, decoder slot) of a packed row.

    The row's FLOPs (attention over the whole row) divided by its slots: useful work is then in
    proportion to how full the rows are. A model of another shape says them itself, as
    `config.flops_per_slot`.
    """
    if (stated := getattr(config, "flops_per_slot", None)) is not None:
        return stated
    shape = EncoderDecoderShape(
        config.emb_dim, config.num_heads, config.kv_heads, config.head_dim, config.mlp_dim,
        config.num_encoder_layers, config.num_decoder_layers, len(config.mlp_activations) > 1)
    vocab = {name: (slots, config.output_rows(name))
             for name, slots in spec.target_capacities.items()}
    patches = {name: (spec.input_capacities[name], size)
               for name, size in spec.patch_dims.items()
               if name not in _with_transformers(config)}
    whole = train_flops(shape, spec.input_length, spec.target_length, vocab, patches)
    if shape.num_encoder_layers:
        encoder = 3 * shape.num_encoder_layers * block_flops(shape, spec.input_length)
    else:  # the decoder reads the inputs' share of the joint row
        columns = spec.input_length + spec.target_length
        encoder = (3 * shape.num_decoder_layers * block_flops(shape, columns)
                   * spec.input_length / columns)
    pictures = sum(_picture_flops(module, config.emb_dim, spec)
                   for module in _with_transformers(config).values())
    adaptors = sum(BACKWARD_AND_FORWARD * 2 * slots * config.target_adaptors(name)
                   for name, slots in spec.target_capacities.items())
    coded = sum(spec.target_capacities[modality] / signal.num_codes
                * encoding_flops(config.codecs[modality])
                for modality, signal in spec.signals.items())
    return ((encoder + pictures) / spec.input_length,
            (whole - encoder + adaptors + coded) / spec.target_length)


def _with_transformers(config: Any) -> dict[str, Any]:
    """The inputs that go through a ViT or an AST, by modality."""
    return {module.modality: module for module in config.inputs
            if getattr(module, "transformer", None) is not None}


def _shape_of(part: Any) -> EncoderDecoderShape:
    return EncoderDecoderShape(part.emb_dim, part.num_heads, part.num_heads, part.head_dim,
                               part.mlp_dim, part.num_layers, 0, gated_mlp=False)


def _picture_flops(module: Any, emb_dim: int, spec: BatchSpec) -> float:
    """Training FLOPs of a row's pictures, spectrograms or frames, until they are encoder input."""
    slots = spec.input_capacities.get(module.modality, 0)
    own = module.transformer
    shape = _shape_of(own)
    resampler = getattr(module, "resampler", None)
    if resampler is None:
        forward = transformer_flops(shape, slots, own.patch_dim)
        # Of what is frozen only the forward pass is computed, and of the first matmul behind it no
        # gradient of its input.
        projection = 2 * slots * module.num_features * emb_dim
        if module.projector == "mlp":
            forward += 2 * slots * emb_dim**2 * (BACKWARD_AND_FORWARD if module.freeze else 1)
        if module.freeze:
            return forward + 2 * projection
        pixels = 2 * slots * own.patch_dim * own.emb_dim
        return BACKWARD_AND_FORWARD * (forward + projection) - pixels
    frames: float = slots // resampler.num_latents
    if module.frame_budget is not None:
        frames = min(frames, module.frame_budget)
    patches = module.grid[0] * module.grid[1]
    reads = sum(resampler.reads(layer) for layer in range(resampler.num_layers))
    first = 2 * patches * own.emb_dim * resampler.emb_dim
    learned = resampler_flops(_shape_of(resampler), resampler.num_latents, patches, reads)
    learned += 2 * resampler.num_latents * resampler.emb_dim * emb_dim
    seen = transformer_flops(shape, patches, own.patch_dim)
    if module.freeze:
        return frames * (seen + first + learned)
    return frames * (seen + 2 * first + BACKWARD_AND_FORWARD * learned)


def describe_metrics(optimizer: Optimizer) -> Callable[[Mapping[str, Any], int], dict[str, float]]:
    """Returns the function that turns a step's device metrics into numbers for the log."""

    def describe(metrics: Mapping[str, Any], step_number: int) -> dict[str, float]:
        record = drop_empty({name: float(value) for name, value in metrics.items()})
        # The schedule counts updates: a skipped step leaves the optimizer where it was.
        before = step_number - int(metrics["skipped_steps"]) - bool(metrics["update_applied"])
        record["learning_rate"] = float(optimizer.schedule(before))
        return record

    return describe


def first_state(factory: StateFactory, seed: int,
                restore: Callable[[], TrainState | None],
                initial_params: Callable[[], Any]) -> TrainState:
    """Returns the state to go on from: the newest checkpoint, given parameters, or a fresh start.

    Args:
        factory: shapes and shardings.
        seed: of the initial parameters.
        restore: returns the run's own newest state, or None.
        initial_params: returns parameters to start from (fine-tuning), or None: draw them.
    """
    state = restore()
    if state is not None:
        return factory.adopt(state)
    if (params := initial_params()) is not None:
        return factory.with_params(params)
    state = factory.create(key_for(seed, "params"))
    compilation.return_freed_memory()
    return state


def in_background(function: Callable[[], Any]) -> concurrent.futures.Future:
    """Starts `function` in a thread and returns its future.

    A process that ends early (a mistake found elsewhere, Ctrl-C) does not wait for it: see
    `core.errors.BACKGROUND`.
    """
    executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=BACKGROUND)
    future = executor.submit(function)
    executor.shutdown(wait=False)
    return future


