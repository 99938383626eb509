"""A model to try things with, in a notebook: predict, score, train a few steps, look again."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.core import meta

from vishwam_t5x import evaluation_setup, interactive_examples, task_lookup
from vishwam_t5x.core import storage
from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import key_for
from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.evaluation import answers, restoring
from vishwam_t5x.evaluation.answers import Answer
from vishwam_t5x.evaluation.generator import DecodingConfig
from vishwam_t5x.evaluation.input_file import TARGET
from vishwam_t5x.evaluation.options import OptionScoring
from vishwam_t5x.evaluation.requests import Request
from vishwam_t5x.evaluation.task_metrics import ModelOutputs, TaskMetrics
from vishwam_t5x.interactive_examples import Example
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.parallelism import sharding
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.parallelism.mesh import MeshConfig
from vishwam_t5x.training import beginning, setup
from vishwam_t5x.training.state import TrainState
from vishwam_t5x.training.step import StepConfig


class InteractiveModel:
    """A model with its vocabulary, ready to be asked and taught: T5X's `InteractiveModel`.

    Nothing is packed: each example has a row of its own. Programs are compiled when they are first
    needed, one for each shape of inputs.

    >>> model = InteractiveModel.from_gin([RECIPE], {"BATCH_SIZE": 4}, output_dir=FOLDER)
    >>> answer = model.predict(["what is this"])[0]
    >>> examples = [{"inputs": "draw a one", "targets": "one two"}] * 4
    >>> before = model.score(examples)[0]
    >>> metrics = model.train_loop(3, examples)
    >>> model.step, model.score(examples)[0] > before
    (3, True)
    >>> path = model.save_checkpoint()
    """

    def __init__(self, model: Any, objective: Any, codec: task_lookup.TextCodec | str, *,
                 task_feature_lengths: Mapping[str, int], batch_size: int = 8,
                 optimizer: Any = None, checkpoint_path: str | None = None,
                 output_dir: str | None = None,
                 decoding: Mapping[str, DecodingConfig] | None = None,
                 loss: LossConfig = LossConfig(), mesh: MeshConfig | None = None,
                 logical_axis_rules: LogicalAxisRules = LogicalAxisRules(), seed: int = 0,
                 compilation_cache_dir: str | None = None,
                 text_ends: Sequence[str] = ("inputs", "targets"), tasks: Sequence[Any] = (),
                 options: OptionScoring = OptionScoring()) -> None:
        """Restores parameters, or makes them up where there are none.

        Args:
            model: Flax module.
            objective: turns examples into inputs and targets.
            codec: text to ids and back, or the path of a SentencePiece model.
            task_feature_lengths: the longest inputs and targets.
            batch_size: examples of a training step, and written together.
            optimizer: for training; None: the model is only asked.
            checkpoint_path: parameters to start from; None: the newest of `output_dir`, or random.
            output_dir: where `save_checkpoint` writes; None: nowhere.
            decoding: how each modality is written; greedily those not named.
            loss: of training.
            mesh: devices along each axis; None: what suits the devices at hand.
            logical_axis_rules: which dimension is split over which mesh axis.
            seed: of random parameters and dropout.
            compilation_cache_dir: as for `train`.
            text_ends: where text gets an end token, if the objective adds none.
            tasks: cached tasks whose vocabulary a checkpoint must have learned.
            options: how the best of an example's options is found.

        Raises:
            UserError: the parts do not fit together, or the checkpoint is not this model's.
        """
        config = DatasetConfig("(given)", task_feature_lengths, batch_size, pack=False)
        self._ready = evaluation_setup.prepare(
            model, objective, config, None, decoding, batch_size, mesh, logical_axis_rules,
            compilation_cache_dir, options)
        self._tasks, self._vocabulary = tasks, codec if isinstance(codec, str) else None
        self._codec = codec if not isinstance(codec, str) else task_lookup.tokenizer(
            codec, getattr(objective, "vocabulary", None))
        self._ready.generator.read_text(self._codec.encode)
        self._parts = setup.Parts(model, optimizer, self._ready.devices, logical_axis_rules,
                                  StepConfig(loss=loss, seed=seed), self._ready.spec)
        self._output_dir, self._seed, self._ends = output_dir, seed, tuple(text_ends)
        self._factory = None if optimizer is None else self._parts.factory()
        self._compiled: Any = None
        self._state: TrainState | None = None
        self._params: Any = None
        if checkpoint_path is not None:
            self.restore(checkpoint_path)
        elif output_dir and storage.names(storage.join(output_dir, "checkpoints")):
            self.restore(output_dir)
        else:
            self._params = self._random()

    @classmethod
    def from_gin(cls, gin_files: Sequence[str], overrides: Mapping[str, Any] | None = None, *,
                 vocabulary: str | None = None, **arguments: Any) -> InteractiveModel:
        """Builds what a recipe of `vishwam train` describes, with the same checks.

        It begins with INITIAL_CHECKPOINT_PATH, unless `checkpoint_path` is given or `output_dir`
        has checkpoints. MODEL_DIR is neither read nor written.

        Args:
            gin_files: the recipe.
            overrides: {macro or parameter: value}, as `--gin.NAME=VALUE` on the command line.
            vocabulary: SentencePiece model; None: VOCABULARY_PATH, or that of the recipe's cached
                tasks.
            arguments: of the constructor, instead of what the recipe says.

        Raises:
            UserError: a mistake in the files, or something that the model needs is not in them.
        """
        from vishwam_t5x import gin_config

        argv = [f"--gin_file={name}" for name in gin_files]
        argv += [f"--gin.{name}={value!r}" for name, value in (overrides or {}).items()]
        config = gin_config.parse(argv, "interactive")

        def wanted(name: str) -> Any:
            value = config.macro(name)
            if value is None:
                raise UserError(f"the gin files bind no {name}", got=", ".join(config.files),
                                fix="give a recipe, such as gin/recipes/quickstart_cpu.gin")
            return value

        lengths = wanted("TASK_FEATURE_LENGTHS")
        found = {"model": wanted("MODEL"), "objective": wanted("OBJECTIVE"),
                 "task_feature_lengths": lengths, "batch_size": wanted("BATCH_SIZE"),
                 "optimizer": config.macro("OPTIMIZER"), "decoding": config.macro("DECODING"),
                 "loss": LossConfig(**config.arguments(LossConfig)),
                 "options": OptionScoring(**config.arguments(OptionScoring)),
                 "mesh": config.macro("MESH"), "seed": config.macro("RANDOM_SEED") or 0,
                 **arguments}
        folder = found.get("output_dir")
        if not (folder and storage.names(storage.join(folder, "checkpoints"))):
            found.setdefault("checkpoint_path", config.macro("INITIAL_CHECKPOINT_PATH"))
        if "codec" not in found:
            vocabulary = vocabulary or config.macro("VOCABULARY_PATH")
            found |= {"codec": vocabulary} if vocabulary else _text_of_tasks(
                DatasetConfig(wanted("MIXTURE_OR_TASK_NAME"), lengths, found["batch_size"],
                              module=config.macro("MIXTURE_OR_TASK_MODULE"),
                              cache_dir=config.macro("CACHE_DIR")), found["objective"])
        return cls(**found)

    # -- asking --------------------------------------------------------------------------------

    def predict(self, examples: Sequence[Example], target: str = "text") -> list[Any]:
        """Returns what the model writes for each example: text, or codes of a picture.

        Raises:
            UserError: an example cannot be used: which, and why.
        """
        return [answer.prediction("", 0, answers.PREDICT, self._codec.decode).prediction
                for answer in self._answers(examples, target)]

    def predict_with_aux(self, examples: Sequence[Example], target: str = "text"
                         ) -> tuple[list[Any], dict[str, list[Any]]]:
        """Returns predictions, and {'scores', 'token_scores'} of each: log-probabilities in nats.

        The tokens of what is not text have no scores of their own: then there are 'scores' alone.
        """
        found = [answer.prediction("", 0, answers.PREDICT_WITH_AUX, self._codec.decode)
                 for answer in self._answers(examples, target, token_scores=True)]
        names = found[0].extra["aux"] if found else ()
        return ([line.prediction for line in found],
                {name: [line.extra["aux"][name] for line in found] for name in names})

    def score(self, examples: Sequence[Example], targets: Sequence[str] | None = None
              ) -> list[float]:
        """Returns the log-probability of each example's target, teacher-forced, in nats.

        Args:
            examples: with their targets, or without.
            targets: those of `examples` that are without.
        """
        if targets is not None:
            if len(targets) != len(examples):
                raise UserError("there must be as many targets as examples",
                                got=f"{len(targets)} targets, {len(examples)} examples")
            examples = [{**({"text": example} if isinstance(example, str) else example),
                         TARGET: target}
                        for example, target in zip(examples, targets, strict=True)]
        requests = self._requests(examples, "text", needs_target=True)
        found = {one.tag: Answer.to(one, self._codec.decode) for one in requests}
        answers.score(self._ready.generator, self.params, requests, found)
        return [found[number].target_score for number in range(len(examples))]

    def choose(self, examples: Sequence[Example]) -> tuple[list[str], list[dict[str, float]]]:
        """Returns the best of each example's 'options', and the score of each option, in nats.

        Raises:
            UserError: an example has no options, or they cannot be scored.
        """
        found = self._answers(examples, "text")
        for number, answer in enumerate(found):
            if not answer.options:
                raise UserError(f"example {number} has no options to choose among",
                                fix="{'text': …, 'options': ['a cat', 'a dog']}")
        scores = [answer.option_scores for answer in found]
        return [max(each, key=each.__getitem__) for each in scores], scores

    def evaluate(self, examples: Sequence[Example],
                 metric_fns: Sequence[Callable[..., Mapping[str, Any]]],
                 postprocess_fn: Callable[..., Any] | None = None) -> dict[str, Any]:
        """Returns what metric functions, as SeqIO's tasks have them, say of the answers.

        Args:
            examples: with their targets.
            metric_fns: (targets, predictions), (targets, scores) or (targets, predictions,
                aux_values) -> {name: value}.
            postprocess_fn: (output, example=…, is_target=…) -> what the metric functions get.
        """
        judge = TaskMetrics("examples", tuple(metric_fns), postprocess_fn)
        fields = [interactive_examples.fields(example) for example in examples]
        targets = [judge.postprocess(one.get(TARGET, ""), one, is_target=True) for one in fields]
        outputs: list[Any] | None = None
        found = ModelOutputs()
        if judge.needs_predictions:
            written = self._answers(examples, "text")
            outputs = [judge.postprocess(answer.told(self._codec.decode), one,
                                         is_target=False)
                       for answer, one in zip(written, fields, strict=True)]
            found = ModelOutputs([answer.tokens["text"] for answer in written],
                                 [answer.score for answer in written])
        if judge.needs_scores:
            found = dataclasses.replace(found, target_scores=self.score(examples))
        return dict(judge.compute(targets, outputs, found, fields, TARGET))

    # -- teaching ------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Training steps taken; those before a checkpoint of which all was restored included."""
        return 0 if self._state is None else int(self._state.step)

    @property
    def params(self) -> Any:
        """The parameters as they are now; a training step ends them."""
        return self._params if self._state is None else self._state.params

    def train_step(self, examples: Sequence[Example]) -> dict[str, float]:
        """Takes one step on at most `batch_size` examples; returns loss, gradient norm, ….

        Raises:
            UserError: too many examples, one that cannot be used, or no optimizer.
        """
        spec = self._ready.spec
        if not 0 < len(examples) <= spec.batch_size:
            raise UserError("a training step takes one batch", got=f"{len(examples)} examples",
                            fix=f"1 to {spec.batch_size}, or train_loop")
        placed = []
        requests = self._requests(examples, "text", needs_target=True)
        for row, request in enumerate(self._ready.generator.with_codes(self.params, requests)):
            arrays = {**request.inputs, **request.targets}
            placed.append(PlacedExample(row, example_lengths(arrays), arrays))
        return self.train_step_on_batch(assemble(spec, spec.batch_size, placed))

    def train_step_on_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Takes one step on the arrays of a batch; see `core.batch.BatchSpec.arrays`."""
        factory = self._trainable()
        shardings = self._parts.batch_shardings()
        if self._compiled is None:
            self._compiled = self._parts.compile(factory, shardings)
        if self._state is None:
            self._state, self._params = factory.with_params(self._params), None
        arrays = {name: jax.device_put(batch[name], place) for name, place in shardings.items()}
        state, metrics = self._compiled(self._state.on_device(), arrays)
        self._state = state.at(DataPosition())
        return setup.describe_metrics(self._parts.optimizer)(jax.device_get(metrics), self.step)

    def train_loop(self, num_steps: int, examples: Iterable[Example]) -> list[dict[str, float]]:
        """Takes steps on the examples, in order and over again; returns the metrics of each."""
        if not (given := list(examples)):
            raise UserError("there is no example to train on")
        endless, size = itertools.cycle(given), min(len(given), self._ready.spec.batch_size)
        return [self.train_step(list(itertools.islice(endless, size))) for _ in range(num_steps)]

    # -- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(self) -> str:
        """Writes `output_dir`/checkpoints/STEP and returns its path; `vishwam` reads it, too.

        Nothing else that lies there is touched.

        Raises:
            UserError, Resumable: there is a checkpoint of this step, or a run trains there.
            OSError: it cannot be written.
        """
        from vishwam_t5x.checkpointing import directory
        from vishwam_t5x.checkpointing.manager import Checkpoints
        from vishwam_t5x.checkpointing.policy import CheckpointConfig

        if not self._output_dir:
            raise UserError("there is no output_dir to save to",
                            fix="InteractiveModel(..., output_dir='runs/try')")
        run_dir = beginning.opened(self._output_dir)
        folder = storage.join(self._output_dir, directory.FOLDER)

        def refuse_another(_: Any) -> None:
            if self.step in directory.steps_in(directory.absolute(folder)):
                raise UserError(f"there is a checkpoint of step {self.step}", got=folder,
                                fix="InteractiveModel(..., output_dir='runs/another')" + (
                                    "" if self._factory is None else ", or train a step"))

        with contextlib.closing(run_dir), contextlib.ExitStack() as stack:
            beginning.hold(stack, run_dir, 0.0, refuse_another)
            with Checkpoints(folder, CheckpointConfig(keep=None), tidy=False) as saver:
                saver.save(self.step, self._state or {"params": self._params})
                if not saver.wait():
                    raise OSError(f"the checkpoint could not be written to {folder}; see above")
        return storage.join(folder, str(self.step))

    def restore(self, checkpoint: str) -> None:
        """Takes the parameters of a checkpoint: a path, as INITIAL_CHECKPOINT_PATH takes it.

        Of one that `save_checkpoint` or `vishwam train` wrote in this `output_dir`, training goes
        on with the same optimizer state. The folder may be one that a run is saving to.

        Raises:
            UserError: there is none, it is damaged, or it is another model's or vocabulary's.
        """
        from vishwam_t5x.checkpointing import directory
        from vishwam_t5x.checkpointing.restore import restore_state

        params, report = self._ready.restore(checkpoint)
        task_lookup.check_vocabulary(self._tasks, report.path, self._vocabulary)
        self._state, self._params = None, params
        folder = storage.parent(report.path)
        # A checkpoint of step 0 holds parameters alone.
        if self._factory is not None and report.step and self._output_dir and (
                folder == str(directory.absolute(storage.join(self._output_dir, "checkpoints")))):
            # Its checksums were compared just now.
            state = restore_state(directory.absolute(report.path), self._factory.abstract, False)
            self._state, self._params = self._factory.adopt(state), None

    def _random(self) -> Any:
        model, devices, rules = self._ready.model, self._ready.devices, self._ready.rules
        places = jax.tree.map(lambda leaf: leaf.sharding,
                              restoring.abstract_params(model, devices, rules))

        def init(key: jax.Array) -> Any:
            return meta.unbox(model.init(key))["params"]

        with sharding.partitioning(devices, rules):
            return jax.jit(init, out_shardings=places)(key_for(self._seed, "params"))

    def _trainable(self) -> Any:
        if self._factory is None:
            raise UserError("the model has no optimizer to train with",
                            fix="InteractiveModel(..., optimizer=…)")
        return self._factory

    # -- examples ------------------------------------------------------------------------------

    def _answers(self, examples: Sequence[Example], target: str, token_scores: bool = False
                 ) -> list[Answer]:
        requests = self._requests(examples, target)
        found = {request.tag: Answer.to(request, self._codec.decode, options=
                                        interactive_examples.options_of(examples[request.tag]))
                 for request in requests}
        answers.write(self._ready.generator, self.params, requests, target, found, _refuse,
                      token_scores=token_scores)
        return [found[number] for number in range(len(examples))]

    def _requests(self, examples: Sequence[Example], target: str, needs_target: bool = False
                  ) -> list[Request]:
        return interactive_examples.requests(examples, self._ready, self._codec, self._ends,
                                             target, needs_target,
                                             task_lookup.how_resized(self._tasks))


def _refuse(number: int, why: str) -> None:
    raise UserError(f"example {number} cannot be answered", got=why)


def _text_of_tasks(config: DatasetConfig, objective: Any) -> dict[str, Any]:
    tasks = task_lookup.open_tasks(config, objective)
    codec = task_lookup.text_codec(tasks, config, getattr(objective, "vocabulary", None))
    return {"codec": codec, "tasks": tasks, "text_ends": task_lookup.text_ends(tasks, objective)}
