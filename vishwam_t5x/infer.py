"""What a checkpoint makes of a split of tasks, or of a file of inputs: predictions and scores.

usage: vishwam infer --gin_file=RECIPE [--gin.NAME=VALUE ...] [--checkpoint=latest|STEP|PATH]
                     [--mode=predict|score|predict_with_aux] [--split=SPLIT] [--tasks=A,B]
                     [--output_file=FILE.jsonl] [--shard_id=I --num_shards=N]
                     [--coordinator_address=HOST:PORT --process_count=N --process_index=I]
       vishwam infer --gin_file=RECIPE --input_file=FILE.jsonl [--target=text|image|audio] [...]

--mode=M          predict (the default): what the model writes and its log-probability in nats;
                  score: the log-probability of each example's target, teacher-forced;
                  predict_with_aux: predict, with the log-probability of every token of a text
--input_file=F    lines {"text": "what is this?", "image": "a.png", "audio": "b.wav"}, each with one
                  or more of the three or of "frames" (a list of pictures: a video); besides
                  "target": the text to score, or a prompt (DecodingConfig.prompt_with_targets); and
                  "options": ["a cat", "a dog"], of which to choose; paths are relative to F
--target=M        text (the default), image or audio: what to write for the lines of --input_file
--output_file=F   default: MODEL_DIR/inference/STEP/NAME.jsonl; NAME-MODE.jsonl unless predicting
--checkpoint=C    latest (the default) or a step of MODEL_DIR's checkpoints; or a path
--split, --tasks  which examples; default: EVAL_SPLIT of all tasks of the mixture
--num_decodes=N   sequences sampled, or beams, per example; the recipe's DECODING says how
--return_all_decodes   write all of them, by rising score, and not the best alone
--shard_id=I --num_shards=N   this is job I (from 0) of N that share the work; the last puts the
                  file together, which is the same however many jobs there were
--overwrite       begin anew what other settings have begun, or what is finished

Each output line has the task (or file), example (or line), inputs, prediction and its score.
Records and lines that are damaged or too long, or for which DecodingConfig.allowed leaves nothing,
are named, counted and left out, never cut. PNG and WAV files lie beside the output, drawn by the
model's codecs, or DECODE_IMAGE and DECODE_AUDIO; the same code what the model reads as codes.
Lines are written in chunks to FILE.jsonl.parts: the same command goes on with what was begun.
On several hosts run it on each, as `vishwam train`; jobs of --num_shards are commands of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vishwam_t5x import drawing, evaluation_setup, joining, screen, task_lookup
from vishwam_t5x.core import distributed, storage
from vishwam_t5x.core.errors import EXIT_OK, UserError, one_of
from vishwam_t5x.data import fit, recordings
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.data.spectrogram import mel_spectrogram, normalised
from vishwam_t5x.evaluation import chunks, inference, input_codes, restoring
from vishwam_t5x.evaluation import input_file as input_files
from vishwam_t5x.evaluation.answers import MODES
from vishwam_t5x.evaluation.chunks import ChunkedFile, Summary
from vishwam_t5x.evaluation.evaluator import Evaluator
from vishwam_t5x.evaluation.generator import DecodingConfig
from vishwam_t5x.evaluation.inference import How, LinesSource, TaskSource
from vishwam_t5x.evaluation.options import OptionScoring
from vishwam_t5x.evaluation.predictions import Prediction
from vishwam_t5x.evaluation.rendering import Render, SoundConfig
from vishwam_t5x.evaluation.task_metrics import PREDICT, SCORE
from vishwam_t5x.evaluation_setup import Progress
from vishwam_t5x.objectives.features import INPUT_PATCHES
from vishwam_t5x.parallelism import mesh as mesh_lib
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules

FLAGS = ("checkpoint", "mode", "split", "tasks", "input_file", "output_file", "target",
         "num_decodes", "return_all_decodes", "shard_id", "num_shards", "overwrite",
         *joining.FLAGS)
SWITCHES = ("return_all_decodes", "overwrite")
_SHOWN = 20  # lines named that could not be used


@dataclasses.dataclass
class Inference:
    """What was made.

    Attributes:
        path: the file of predictions or scores.
        num_predictions: lines in it; 0 while chunks of other jobs are missing.
        bad_lines: lines of the input file that could not be used.
        left_out: records of tasks that could not be read, were too long, or for which nothing could
            be written, in words.
        missing_chunks: that other jobs have not written yet; the file is there when it is 0.
    """

    path: pathlib.PurePath
    num_predictions: int
    bad_lines: list[input_files.BadLine] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    missing_chunks: int = 0


def infer(model: Any, model_dir: str, objective: Any, dataset_cfg: DatasetConfig,
          checkpoint_path: str | None = None, mode: str = PREDICT, split: str | None = None,
          tasks: Sequence[str] = (), input_file: str | None = None,
          output_file: str | None = None, target: str = "text",
          decoding: Mapping[str, DecodingConfig] | None = None, decode_batch_size: int = 64,
          num_decodes: int | None = None, return_all_decodes: bool = False,
          options: OptionScoring = OptionScoring(), max_examples: int | None = None,
          vocabulary: str | None = None, decode_image: Render | None = None,
          sound: SoundConfig = SoundConfig(), log_mel: Any = None, shard_id: int = 0,
          num_shards: int = 1, chunk_size: int = 1024, overwrite: bool = False,
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
        mode: 'predict', 'score' (the target, teacher-forced), or 'predict_with_aux'.
        split: instead of that of `dataset_cfg`.
        tasks: only these; (): all.
        input_file: lines of inputs, pictures as the run has read its own; None: the split is read.
        output_file: where the lines go; None: a file in MODEL_DIR/inference/STEP.
        target: modality written for the lines of `input_file`.
        decoding: how each modality is written; greedily those not named.
        decode_batch_size: examples written together.
        num_decodes: instead of that of each modality that is sampled or searched by beam.
        return_all_decodes: record all of them, not the best alone.
        options: how the best of the options of an example, or of a line, is found.
        max_examples: at most so many of each task.
        vocabulary: SentencePiece model for `input_file`, or the tasks' own; None: that.
        decode_image: see `rendering.Render`; None: the model's codec; without, codes are numbers.
        sound: how codes become waveforms.
        log_mel: `LogMelConfig` for recordings of `input_file`, or a `RecordingConfig` of segments.
        shard_id, num_shards: this job's number, from 0, and how many share the work.
        chunk_size: examples written in one piece, and lost at most when a job is killed.
        overwrite: begin anew what other settings have begun, or what is finished.
        mesh: devices along each axis; None: what suits the devices at hand.
        logical_axis_rules: which dimension is split over which mesh axis.
        compilation_cache_dir: as for `train`.

    Raises:
        UserError: parts do not fit, no example can be used, or other settings wrote the output.
    """
    decoding = _decoding(decoding or {}, num_decodes, return_all_decodes, mode)
    def set_up() -> tuple[evaluation_setup.Prepared, Sequence[Any], Sequence[inference.Source]]:
        ready = evaluation_setup.prepare(
            model, objective, dataset_cfg, split, decoding, decode_batch_size, mesh,
            logical_axis_rules, compilation_cache_dir, options)
        layout = getattr(objective, "vocabulary", None)
        caches = () if input_file is not None and vocabulary is not None else (
            task_lookup.open_tasks(ready.config, ready.objective, tasks))
        fit.check_model(caches, model.config, layout)
        codec = task_lookup.text_codec(caches, ready.config, layout) if caches else (
            task_lookup.tokenizer(str(vocabulary), layout))
        ready.generator.read_text(codec.encode)
        if input_file is None:
            return ready, caches, _sources(ready, caches, codec, max_examples, options)
        reader = _reader(ready, codec, target, log_mel, mode, caches, decode_image, sound,
                         restoring.checkpoint_place(checkpoint_path, model_dir))
        return ready, caches, [LinesSource(ready.generator, reader, codec.decode, str(input_file))]
    ready, caches, sources = evaluation_setup.on_all("inference", set_up)
    evaluation_setup.check_same_data(caches, () if input_file is None else sources, vocabulary)
    params, restored = ready.load(checkpoint_path, model_dir)
    distributed.refuse_together("vocabulary", lambda: task_lookup.check_learned(
        caches, restored.path, vocabulary))
    path = _output(output_file, model_dir, restored, input_file, ready.config.split, mode)
    settings = _settings(ready, restored, decoding, options, sources, log_mel, vocabulary) | {
        **drawing.described(decode_image, sound), "mode": mode, "all_decodes": return_all_decodes,
        "chunk_size": chunk_size, "target": None if input_file is None else target}
    file = ChunkedFile(path, settings, chunks.plan([source.size for source in sources], chunk_size),
                       shard_id, num_shards)
    drawn = drawing.drawer(model.config, params, ready.devices, () if mode == SCORE else (
        (target,) if input_file else model.config.target_modalities), decode_image, sound)
    summary = _answered(params, sources, file, overwrite, How(mode, return_all_decodes),
                        lambda lines: drawn.written(lines, path, input_file is None))
    return _checked(file, summary, sources, input_file)


def _answered(params: Any, sources: Sequence[inference.Source], file: ChunkedFile, overwrite: bool,
              how: How, changed: Callable[[Sequence[Prediction]], Iterable[Prediction]]
              ) -> Summary | None:
    with contextlib.closing(Progress()) as bar:
        return inference.run(params, sources, file, file.begin(overwrite), how, changed, bar)


def _output(output_file: str | None, model_dir: str, restored: Any, input_file: str | None,
            split: str, mode: str) -> pathlib.PurePath:
    stem = split if input_file is None else pathlib.Path(input_file).stem
    return storage.place(output_file or storage.join(
        model_dir, "inference", evaluation_setup.checkpoint_name(restored),
        f"{stem}.jsonl" if mode == PREDICT else f"{stem}-{mode}.jsonl"))


def _decoding(decoding: Mapping[str, DecodingConfig], num_decodes: int | None, return_all: bool,
              mode: str) -> dict[str, DecodingConfig]:
    """Returns how each modality is written, with `num_decodes` where more than one can be."""
    one_of(mode, MODES, "mode of inference")
    several = [name for name, config in decoding.items() if config.method != "greedy"]
    if mode == SCORE and (num_decodes is not None or return_all):
        raise UserError("scoring writes nothing", got="num_decodes or return_all_decodes",
                        fix="leave them out, or --mode=predict")
    if (num_decodes not in (None, 1) or return_all) and not several:
        raise UserError("greedy decoding gives one sequence", got=f"num_decodes {num_decodes}",
                        fix="DECODING = {'text': @generator.DecodingConfig()} and "
                            "generator.DecodingConfig.method = 'beam' or 'sample'")
    return {name: dataclasses.replace(config, num_decodes=num_decodes)
            if name in several and num_decodes is not None else config
            for name, config in decoding.items()}


def _settings(ready: evaluation_setup.Prepared, restored: Any,
              decoding: Mapping[str, DecodingConfig], options: OptionScoring,
              sources: Sequence[inference.Source], log_mel: Any, vocabulary: str | None
              ) -> dict[str, Any]:
    """What the lines of a file depend on, beside the arguments that are plain values."""
    return {"checkpoint": restored.path, "step": restored.step,
            "weights": evaluation_setup.agreed_identity(restored), "seed": ready.config.seed,
            "log_mel": evaluation_setup.described(log_mel),
            "vocabulary": vocabulary and [vocabulary, restoring.identity(vocabulary)],
            "examples": [source.facts() for source in sources], "split": ready.config.split,
            "lengths": dict(ready.config.task_feature_lengths),
            "decode_batch_size": ready.generator.batch_size,
            "decoding": evaluation_setup.described(dict(sorted(decoding.items()))),
            "options": evaluation_setup.described(options),
            "constraints": evaluation_setup.code_of_constraints(decoding),
            "model": evaluation_setup.described(ready.model.config),
            "objective": evaluation_setup.described(ready.objective)}


def _sources(ready: evaluation_setup.Prepared, caches: Sequence[Any],
             codec: task_lookup.TextCodec, max_examples: int | None, options: OptionScoring
             ) -> list[inference.Source]:
    evaluator = Evaluator(
        ready.generator, ready.objective, codec.decode, ready.config.seed,
        read_options=task_lookup.option_reader(codec, caches, ready.objective, options))
    return [TaskSource(evaluator, task, max_examples) for task in caches]


def _checked(file: ChunkedFile, summary: Summary | None, sources: Sequence[inference.Source],
             input_file: str | None) -> Inference:
    """Returns what a file holds, finished or not.

    Raises:
        UserError: nothing, though there were examples.
    """
    path = file.path
    if summary is None:
        return Inference(path, 0, missing_chunks=file.missing())
    why = str(summary.left_out[0]) if summary.left_out else "it is empty"
    if input_file is None:
        if summary.left_out and not summary.lines:
            raise UserError("no record of the tasks can be used", got=why,
                            fix="of damaged ones: vishwam cache --task_or_mixture="
                                f"{sources[0].name} --overwrite")
        return Inference(path, summary.lines, left_out=summary.left_out)
    bad = [input_files.BadLine(*item) for item in summary.left_out]
    if not summary.lines:
        raise UserError(f"no line of {input_file} can be used",
                        got=str(bad[0]) if bad else why,
                        fix='lines like {"text": "what is this?", "image": "a.png"}')
    return Inference(path, summary.lines, bad)


def _reader(ready: evaluation_setup.Prepared, codec: task_lookup.TextCodec, target: str,
            log_mel: Any, mode: str, caches: Sequence[Any], decode_image: Render | None,
            sound: SoundConfig, checkpoint: str) -> input_files.InputReader:
    config = ready.model.config
    drawing.check(config, target, decode_image, sound)
    resize = task_lookup.how_resized(caches, checkpoint)
    coded = input_codes.coded_inputs(config, {"image": decode_image, "audio": sound.decode},
                                     sound.log_mel, resize)
    ready.generator.read_codes({modality: one.encode for modality, one in coded.items()
                                if one.encode is not None})
    one_of(target, config.target_modalities, "target modality of this model")
    grids = {module.modality: module.grid for module in config.inputs if hasattr(module, "grid")}
    return input_files.InputReader(ready.objective, target, codec.encode, ready.spec, grids,
                                   _hear(log_mel), mode == SCORE,
                                   ready.generator.is_prompted(target),
                                   task_lookup.text_ends(caches, ready.objective),
                                   {name for task in caches for name in task.features
                                    if name in INPUT_PATCHES}, coded, resize=resize)


def _hear(config: Any) -> input_files.Hear | None:
    """Returns how recordings become spectrograms: of segments, of which those before the last are
    the history, or one as long as they are."""
    if config is None:
        return None
    if isinstance(config, recordings.RecordingConfig):
        return lambda waveform, rate, multiple: recordings.spectrograms(waveform, rate, config)
    rates = recordings.RecordingConfig(config)

    def hear(waveform: np.ndarray, rate: int, multiple: int) -> recordings.Spectrograms:
        waveform = recordings.at_rate(waveform, rate, rates)
        frames = config.num_frames(len(waveform))
        # Silence to the end of the last patch.
        missing = -frames % multiple * config.hop
        mel = mel_spectrogram(np.pad(waveform, (0, missing)), config)[None]
        return recordings.Spectrograms(normalised(mel, config), mel != 0, 0)

    return hear


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam infer ARGV` and returns the exit code."""
    from vishwam_t5x import gin_config

    config = gin_config.parse(argv, "infer", flags=FLAGS)
    screen.show_messages()
    given = evaluation_setup.overrides(config.flags, SWITCHES)
    given.update({name: config.flags[name] for name in ("mode", "input_file", "output_file",
                                                        "target") if name in config.flags})
    given.update({name: evaluation_setup.number(config.flags, name)
                  for name in ("num_decodes", "shard_id", "num_shards") if name in config.flags})
    for name in SWITCHES:
        if config.flags.get(name):
            raise UserError(f"--{name} takes no value", got=config.flags[name])
        if name in config.flags:
            given[name] = True
    if "target" in given and "input_file" not in given:
        raise UserError("--target goes with --input_file", got=f"--target={given['target']}",
                        fix="tasks say themselves what is written")
    if "input_file" in given and ({"split", "tasks"} & given.keys()):
        raise UserError("--split and --tasks do not go with --input_file",
                        fix="give the one or the other")
    joining.join(config)
    with joining.watched():
        found = config.call(infer, **given)
    if distributed.is_primary():
        _show(found, "scores" if given.get("mode") == SCORE else "predictions")
    return EXIT_OK


def _show(found: Inference, what: str) -> None:
    if found.missing_chunks:
        print(f"{found.missing_chunks} chunks of other shards are missing; the last shard puts "
              f"{found.path} together")
        return
    print(f"{found.num_predictions} {what}: {found.path}")
    for kind, bad in (("lines", found.bad_lines), ("records", found.left_out)):
        if bad:
            print(f"{len(bad)} {kind} could not be used:")
        for one in bad[:_SHOWN]:
            print(f"  {one}")
        if len(bad) > _SHOWN:
            print(f"  … and {len(bad) - _SHOWN} more")
