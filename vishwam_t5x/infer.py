"""Predictions of a checkpoint for a split of tasks, or for a file of inputs.

usage: vishwam infer --gin_file=RECIPE [--gin.NAME=VALUE ...] [--checkpoint=latest|STEP|PATH]
                     [--split=SPLIT] [--tasks=A,B] [--output_file=FILE.jsonl]
       vishwam infer --gin_file=RECIPE --input_file=FILE.jsonl [--target=text|image]
                     [--output_file=FILE.jsonl] [--checkpoint=latest|STEP|PATH]

--input_file=F    lines {"text": "what is this?", "image": "a.png", "audio": "b.wav"}, each with one
                  or more of the three; paths are relative to F. Lines that cannot be used are named
                  and left out; too long an input is refused, never cut
--target=M        what to write for the lines of --input_file; default: text
--output_file=F   default: MODEL_DIR/inference/STEP/NAME.jsonl
--checkpoint=C    latest (the default) or a step of MODEL_DIR's checkpoints; or a path
--split, --tasks  which examples; default: EVAL_SPLIT of all tasks of the mixture

Each output line has the task (or file), example (or line), inputs, prediction and its score, the
log-probability in nats. Pictures are written as PNG files beside the output.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from vishwam_t5x import evaluation_setup, screen, task_lookup
from vishwam_t5x.core import distributed, storage
from vishwam_t5x.core.errors import EXIT_OK, UserError, one_of
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.evaluation import input_file as input_files
from vishwam_t5x.evaluation import predictions
from vishwam_t5x.evaluation.evaluator import Evaluator
from vishwam_t5x.evaluation.generator import DecodingConfig, Generator, Request
from vishwam_t5x.evaluation.predictions import Prediction
from vishwam_t5x.evaluation.task_metrics import TaskMetrics
from vishwam_t5x.evaluation_setup import Progress
from vishwam_t5x.objectives.vocabulary import CODE_OFFSET
from vishwam_t5x.parallelism import mesh as mesh_lib
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules

FLAGS = ("checkpoint", "split", "tasks", "input_file", "output_file", "target")
DecodeImage = Callable[[np.ndarray], np.ndarray]
"""Codes [n] from 0 -> pixels [height, width, channels] in [0, 1]."""


@dataclasses.dataclass
class Inference:
    """What was predicted.

    Attributes:
        path: the file of predictions.
        num_predictions: lines in it.
        bad_lines: lines of the input file that could not be used.
    """

    path: pathlib.PurePath
    num_predictions: int
    bad_lines: list[input_files.BadLine] = dataclasses.field(default_factory=list)


def infer(model: Any, model_dir: str, objective: Any, dataset_cfg: DatasetConfig,
          checkpoint_path: str | None = None, split: str | None = None,
          tasks: Sequence[str] = (), input_file: str | None = None,
          output_file: str | None = None, target: str = "text",
          decoding: Mapping[str, DecodingConfig] | None = None, decode_batch_size: int = 64,
          max_examples: int | None = None, vocabulary: str | None = None,
          decode_image: DecodeImage | None = None, log_mel: Any = None,
          mesh: mesh_lib.MeshConfig | None = None,
          logical_axis_rules: LogicalAxisRules = LogicalAxisRules(),
          compilation_cache_dir: str | None = None) -> Inference:
    """Writes what a model makes of the examples of a split, or of the lines of a file.

    Args:
        model: what was trained.
        model_dir: of the run; its newest checkpoint is used unless `checkpoint_path` says.
        objective: what it was trained with; augmentation is left out.
        dataset_cfg: mixture, split, and the longest inputs and targets.
        checkpoint_path: 'latest', a step, or a path.
        split: instead of that of `dataset_cfg`.
        tasks: only these; (): all.
        input_file: lines of inputs; None: the split is predicted.
        output_file: where predictions go; None: a file in MODEL_DIR/inference/STEP.
        target: modality written for the lines of `input_file`.
        decoding: how each modality is written; greedily those not named.
        decode_batch_size: examples written together.
        max_examples: at most so many of each task.
        vocabulary: SentencePiece model for `input_file`; None: that of the cached tasks.
        decode_image: turns codes into a picture; None: codes are written as numbers.
        log_mel: `data.tf.audio.LogMelConfig` for recordings of `input_file`.
        mesh: devices along each axis; None: what suits the devices at hand.
        logical_axis_rules: which dimension is split over which mesh axis.
        compilation_cache_dir: as for `train`.

    Raises:
        UserError: the parts do not fit together, or no line of the file can be used.
    """
    ready = evaluation_setup.prepare(model, objective, dataset_cfg, split, decoding,
                                     decode_batch_size, mesh, logical_axis_rules,
                                     compilation_cache_dir)
    layout = getattr(objective, "vocabulary", None)
    caches: tuple = ()
    if input_file is None or vocabulary is None:
        caches = task_lookup.open_tasks(ready.config, ready.objective, tasks)
        codec = task_lookup.text_codec(caches, ready.config, layout)
    else:
        codec = task_lookup.tokenizer(vocabulary, layout)
    reader = None if input_file is None else _reader(ready, codec, target, decode_image, log_mel)

    params, restored = ready.load(checkpoint_path, model_dir)
    bad: list[input_files.BadLine] = []
    if reader is not None:
        found = _of_lines(ready.generator, params, reader, codec, str(input_file), bad)
    else:
        found = _of_tasks(ready, params, caches, codec, max_examples)
    stem = ready.config.split if input_file is None else pathlib.Path(input_file).stem
    path = storage.place(output_file or storage.join(
        model_dir, "inference", evaluation_setup.checkpoint_name(restored), f"{stem}.jsonl"))
    if distributed.is_primary():
        found = [_with_picture(line, path, decode_image) for line in found]
        predictions.write_lines(path, [line.to_json() for line in found])
    return Inference(path, len(found), bad)


def _reader(ready: evaluation_setup.Prepared, codec: task_lookup.TextCodec, target: str,
            decode_image: DecodeImage | None, log_mel: Any) -> input_files.InputReader:
    config = ready.model.config
    one_of(target, config.target_modalities, "target modality of this model")
    if target == "image" and decode_image is None:
        raise UserError("a picture cannot be made of codes", got="decode_image is not bound",
                        fix="DECODE_IMAGE = @a function from codes to pixels")
    grids = {module.modality: module.grid for module in config.inputs if hasattr(module, "grid")}
    return input_files.InputReader(ready.objective, target, codec.encode, ready.spec, grids,
                                   _spectrogram(log_mel))


def _of_tasks(ready: evaluation_setup.Prepared, params: Any, caches: Sequence[Any],
              codec: task_lookup.TextCodec, max_examples: int | None) -> list[Prediction]:
    progress, found = Progress(), []
    evaluator = Evaluator(ready.generator, ready.objective, codec.decode, ready.config.seed,
                          progress)
    for task in caches:
        result = evaluator.evaluate(params, task, TaskMetrics(task.name), max_examples,
                                    write_all=True)
        found += result.predictions
        progress.close()
    return found


def _of_lines(generator: Generator, params: Any, reader: input_files.InputReader,
              codec: task_lookup.TextCodec, path: str, bad: list[input_files.BadLine]
              ) -> list[Prediction]:
    """Predicts for the lines of a file, in their order; `bad` gets those that cannot be used.

    Raises:
        UserError: no line can be.
    """
    progress, found = Progress(), []

    def requests() -> Iterator[Request]:
        for line in reader.read(path):
            if isinstance(line, input_files.BadLine):
                bad.append(line)
                logging.warning("%s: %s", path, line)
            else:
                yield Request(line.example, tag=line)

    for done in generator.generate(params, requests(), reader.target):
        line, tokens = done.tag, done.tokens[reader.target]
        prediction = (codec.decode(tokens) if reader.target == "text"
                      else tokens - CODE_OFFSET)
        found.append(Prediction(
            path, line.number, codec.decode(line.example["inputs/text/tokens"]),
            Request(line.example).slots(), None, prediction, done.scores[reader.target],
            {name: value for name, value in line.fields.items() if name != "text"}))
        progress(path, len(found), 0)
    progress.close()
    if not found:
        raise UserError(f"no line of {path} can be used",
                        got=str(bad[0]) if bad else "it is empty",
                        fix='lines like {"text": "what is this?", "image": "a.png"}')
    return sorted(found, key=lambda line: line.example)


def _with_picture(line: Prediction, path: pathlib.PurePath, decode_image: DecodeImage | None
                  ) -> Prediction:
    """Writes the picture of a line whose prediction is codes, and notes its file."""
    codes = line.prediction
    if decode_image is None or not isinstance(codes, np.ndarray):
        return line
    from PIL import Image

    pixels = np.asarray(decode_image(codes), np.float32)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    stem = line.task.replace("/", "_") if line.target is not None else path.stem
    file = path.with_name(f"{stem}-{line.example}.png")
    drawn = io.BytesIO()
    Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)).save(drawn, "PNG")
    storage.write_bytes(file, drawn.getvalue())
    return dataclasses.replace(line, extra={**line.extra, "picture": file.name})


def _spectrogram(config: Any) -> input_files.Spectrogram | None:
    if config is None:
        return None
    screen.quiet_tensorflow()
    from vishwam_t5x.data.tf import audio

    def spectrogram(waveform: np.ndarray, rate: int, multiple: int) -> np.ndarray:
        if rate != config.sample_rate:
            raise UserError("the recording has another sample rate than the model's",
                            got=f"{rate} Hz, not {config.sample_rate} Hz")
        frames = config.num_frames(len(waveform))
        # Silence to the end of the last patch.
        missing = -frames % multiple * config.hop
        return audio.log_mel_spectrogram(np.pad(waveform, (0, missing)), config)

    return spectrogram


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam infer ARGV` and returns the exit code."""
    from vishwam_t5x import gin_config

    config = gin_config.parse(argv, "infer", flags=FLAGS)
    screen.show_messages()
    given = evaluation_setup.overrides(config.flags)
    given.update({name: config.flags[name] for name in ("input_file", "output_file", "target")
                  if name in config.flags})
    if "target" in given and "input_file" not in given:
        raise UserError("--target goes with --input_file", got=f"--target={given['target']}",
                        fix="tasks say themselves what is written")
    if "input_file" in given and ({"split", "tasks"} & given.keys()):
        raise UserError("--split and --tasks do not go with --input_file",
                        fix="give the one or the other")
    found = config.call(infer, **given)
    print(f"{found.num_predictions} predictions: {found.path}")
    if found.bad_lines:
        print(f"{len(found.bad_lines)} lines could not be used; they are named above")
    return EXIT_OK
