"""`vishwam cache` on SeqIO tasks, and datasets that open by themselves, without TensorFlow here."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from data.small_data import PATCHES

import helpers
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import directory as cache_directory
from vishwam_t5x.data import records, source, synthetic
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import PatchSpec
from vishwam_t5x.objectives.text_to_text import TextToText
from vishwam_t5x.objectives.vocabulary import VocabularyLayout

LENGTHS = {"inputs": 6, "targets": 4}
MODULE = str(pathlib.Path(__file__).with_name("toy_tasks.py"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for index, count in enumerate((30, 0, 25)):
        lines = [" ".join(map(str, range(index * 100 + n, index * 100 + n + n % 6 + 2)))
                 for n in range(count)]
        (folder / f"lines-{index}.txt").write_text("".join(line + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def cached(files, tmp_path_factory):
    """One start of TensorFlow for the whole file: caches, then provokes every mistake."""
    directory = tmp_path_factory.mktemp("cache")
    out = helpers.run_python(f"""
        import json, logging, sys
        sys.path.insert(0, {str(helpers.ROOT / "tests")!r})
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        from vishwam_t5x.core.errors import UserError
        from vishwam_t5x.data.tf import cache, examples

        def run(name, *rest, modules=({MODULE!r},)):
            try:
                return cache.cache_task_or_mixture(name, modules, {str(directory)!r}, *rest)
            except UserError as error:
                return dict(problem=error.problem, got=str(error.got), fix=error.fix)

        def plain_file():
            import os, shutil
            os.environ["TOY_PLAIN_MIXTURE"] = "1"
            sys.modules.pop("toy_tasks")
            for registry in (cache.seqio.TaskRegistry, cache.seqio.MixtureRegistry):
                registry.reset()
            return {MODULE!r}

        class Log(logging.Handler):
            lines = []
            def emit(self, record):
                self.lines.append(record.getMessage())
        logging.getLogger().addHandler(Log())
        from data.test_tf_cache import hashes
        first = run("toy")
        before = hashes({str(directory)!r})
        result = dict(first=first, before=before, second=run("toy"),
                      again=run("toy_lines", ["train"], True), unknown=run("toy_sqares"),
                      split=run("toy", ["validation"]),
                      module=run("toy", modules=("no_such_module",)),
                      file=run("toy", modules=("/no/such/file.py",)), broken=run("toy_broken"),
                      unasked=run("toy_rows"), rows=run("toy_rows", (), False, {LENGTHS!r}),
                      told=cache._told_of_lengths(cache.seqio.TaskRegistry.get("toy_chunks")),
                      chunks=run("toy_chunks", (), False, {LENGTHS!r}))
        cache.cache_task_or_mixture("toy_chunks", ({MODULE!r},), {str(directory / "whole")!r})
        result["log"] = list(Log.lines)
        from data.test_tf_cache import live_facts
        del Log.lines[:]
        result["live"] = live_facts({str(directory)!r}, {str(files)!r})
        result["live"]["log"] = Log.lines
        result["plain"] = run("toy_plain", modules=(plain_file(),))
        print(json.dumps(result))
        """, env={"TOY_FILES": str(files)})
    return directory, json.loads(out.strip().splitlines()[-1])


def hashes(directory):
    task = records.TaskCache.open(cache_directory.task_directory(directory, "toy_lines", "train"))
    return [shard.sha256 for shard in task.manifest.shards]


def open_task(cached, name, split="train"):
    specs = {"image": PatchSpec(2, channels=1)}
    return records.TaskCache.open(cache_directory.task_directory(cached[0], name, split), specs)


def test_a_mixture_is_cached_with_its_rates(cached):
    assert cache_directory.read_rates(cached[0], "toy") == {"toy_lines": 0.5, "toy_squares": 2.0}
    assert cache_directory.available_splits(cached[0], "toy_squares") == ["test", "train"]
    assert cached[1]["first"]["toy_squares"]["test"] == {
        "num_records": 7, "num_bad": 0, "written": True}


def test_features_are_sorted_and_what_is_dropped_is_said(cached):
    task = open_task(cached, "toy_squares")
    assert task.features == {
        "image_inputs": records.FeatureInfo((4, 4, 1), "float32"),
        "text_targets": records.FeatureInfo((None,), "int32"),
        "meta_name": records.FeatureInfo((), "bytes")}
    code = task.metadata.pop("code")
    assert [pathlib.Path(path).name for path in code] == ["toy_tasks.py"]
    assert task.metadata == {"written_by": "toy_tasks", "task": "toy_squares"}
    assert any("surplus" in line for line in cached[1]["log"])
    example = task.read(3)
    assert example["meta_name"] == b"square 3"
    np.testing.assert_array_equal(example["text_targets"], [3, 4, 5, 6])
    assert example["image_inputs"].dtype == np.float32
    assert task.clean_lengths(3) == {"image_inputs": 4, "text_targets": 4}


def test_bad_examples_are_left_out_counted_and_named(cached):
    task = open_task(cached, "toy_squares")
    bad = {entry["example"]: entry["why"] for entry in task.manifest.bad_examples}
    assert bad.keys() == {5, 9, 11}
    assert "not finite" in bad[5] and "[0, 1]" in bad[9] and "-4" in bad[11]
    assert task.num_records == 37
    assert cached[1]["first"]["toy_squares"]["train"]["num_bad"] == 3
    assert any("example 5" in line and "not finite" in line for line in cached[1]["log"])


def test_source_shards_are_written_as_parts_and_joined_in_order(cached):
    task = open_task(cached, "toy_lines")
    assert task.num_records == 55
    starts = [int(task.read(record)["text"][0]) for record in range(55)]
    assert starts == [*range(30), *range(200, 225)]


def test_a_second_run_does_nothing_and_overwrite_repeats_it_exactly(cached):
    assert not any(facts["written"] for splits in cached[1]["second"].values()
                   for facts in splits.values())
    assert cached[1]["again"] == {"toy_lines": {"train": {
        "num_records": 55, "num_bad": 0, "written": True}}}
    # Random preprocessing has fixed seeds: what was appended is not all the same, and repeatable.
    assert hashes(cached[0]) == cached[1]["before"]
    task = open_task(cached, "toy_lines")
    noise = [int(task.read(record)["text"][-1]) for record in range(30)]
    assert len(set(noise)) > 20


def test_mistakes_are_explained(cached):
    said = cached[1]
    assert "toy_squares" in said["unknown"]["fix"] and "did you mean" in said["unknown"]["fix"]
    assert said["split"]["problem"].endswith("has no split 'validation'")
    assert said["split"]["fix"] == "its splits: train"
    assert said["module"]["got"] == "no_such_module"
    assert "mixture_cls=MultimodalMixture" in said["plain"]["fix"]
    assert said["file"]["got"] == "/no/such/file.py"
    assert "cannot be preprocessed" in said["broken"]["problem"]
    assert "no such number" in said["broken"]["got"]


def test_tasks_that_ask_for_the_lengths_of_a_row_are_cached_for_these_alone(cached, files):
    unasked = cached[1]["unasked"]
    assert "toy_rows" in unasked["problem"] and "sequence_length" in unasked["fix"]
    assert cached[1]["rows"]["toy_rows"]["train"] == {
        "num_records": 55, "num_bad": 0, "written": True}
    assert any("toy_rows: its preprocessors make examples for rows of inputs 6, targets 4" in line
               for line in cached[1]["log"])
    given = config(cached[0], files, "toy_rows", sequence_length=LENGTHS)
    task = source.open_dataset(given, TextToText(6, 4)).examples.tasks[0]
    seen = {tuple(task.read(record)["inputs"]) for record in range(55)}
    assert len(seen) > 50 and all(len(tokens) == 6 for tokens in seen)
    for other in (None, {"inputs": 7, "targets": 4}):
        with pytest.raises(UserError, match="for rows of other lengths"):
            source.open_dataset(config(cached[0], files, "toy_rows", sequence_length=other),
                                TextToText(6, 4))
    # Tasks that do not ask serve all lengths.
    assert source.open_mixture(config(cached[0], files, sequence_length={"inputs": 9}), PATCHES)


def test_tasks_that_can_go_without_lengths_are_told_them_too(cached, files):
    """Else a preprocessor with `sequence_length=None` would leave all examples whole."""
    assert cached[1]["told"] == ["_chunks"]
    assert cached[1]["chunks"]["toy_chunks"]["train"]["num_records"] == 55
    with pytest.raises(UserError, match="for rows of other lengths"):
        source.open_mixture(config(cached[0], files, "toy_chunks"), {})
    given = config(cached[0], files, "toy_chunks", sequence_length=LENGTHS)
    task = source.open_mixture(given, {}).tasks[0]
    assert {len(task.read(record)["inputs"]) for record in range(55)} == {2, 3, 4, 5, 6}


def test_a_cache_made_without_lengths_is_not_taken_for_one_with(cached, files):
    task = source.open_mixture(config(cached[0] / "whole", files, "toy_chunks"), {}).tasks[0]
    assert task.metadata[source.LENGTHS_KEY] == {}
    assert max(len(task.read(record)["inputs"]) for record in range(55)) == 7
    with pytest.raises(UserError, match="for rows of other lengths"):
        source.open_mixture(config(cached[0] / "whole", files, "toy_chunks",
                                   sequence_length=LENGTHS), {})


def config(directory, files, name="toy", **options):
    os.environ["TOY_FILES"] = str(files)
    return source.DatasetConfig(
        name, {"inputs": 48, "targets": 48}, batch_size=4, module=MODULE,
        cache_dir=str(directory), **options)


def objective():
    return MixtureOfDenoisers(
        vocabulary=VocabularyLayout(base_size=1000, num_sentinels=32),
        image=PatchSpec(2, channels=1))


def test_an_open_dataset_packs_the_cached_mixture(cached, files):
    dataset = source.open_dataset(config(cached[0], files), objective())
    assert [task.name for task in dataset.examples.tasks] == ["toy_lines", "toy_squares"]
    batch = dataset.batches.batch(source.DataPosition())
    assert batch.plan.num_examples > 4 and not batch.bad
    assert batch.arrays.keys() == dataset.spec.arrays().keys()
    which = [dataset.examples.locate(example)[0] for example in range(1000)]
    assert np.bincount(which).tolist() == [200, 800]


def test_evaluation_reads_a_split_once(cached, files):
    dataset = source.open_dataset(
        config(cached[0], files, "toy_squares", split="test", shuffle=False), objective(),
        repeat=False)
    seen, position = [], source.DataPosition()
    while (batch := dataset.batches.batch(position)) is not None:
        seen += batch.plan.example_ids
        position = batch.plan.end
    assert sorted(seen) == list(range(7))


def live_facts(directory, files):
    """Runs in the process that has TensorFlow: the same mixture as a live stream."""
    from vishwam_t5x.data.tf import live

    settings = config(directory, files, use_cached=False, max_bad_fraction=0.2)
    straight = live.open_live_dataset(settings, objective())
    cached = source.open_dataset(config(directory, files, shuffle=False), objective())
    position, batches, waiting = source.DataPosition(), [], []
    for _ in range(12):
        batches.append(straight.batches.batch(position))
        position = batches[-1].plan.end
        waiting.append(sum(len(task._waiting) for task in straight.examples.tasks))
    resumed = live.open_live_dataset(settings, objective())
    again = resumed.batches.batch(batches[9].plan.start)
    unshuffled = live.open_live_dataset(
        config(directory, files, use_cached=False, max_bad_fraction=0.2, shuffle=False),
        objective())
    same_order = []
    for example in range(30):
        # Bad examples are left out of both; the noise of toy_lines has other seeds by part.
        left, right = unshuffled.examples.read(example), cached.examples.read(example)
        name = "text" if "text" in left else "text_targets"
        same_order.append(left[name][:1].tolist() == right[name][:1].tolist())
    return {
        "resumed": all((again.arrays[key] == value).all()
                       for key, value in batches[9].arrays.items()),
        "ids": [number for batch in batches for number in batch.plan.example_ids],
        "end": [batches[-1].plan.end.next_example, *batches[-1].plan.end.carried],
        "waiting": waiting, "same_order": same_order}


def test_a_live_stream_loses_nothing_and_says_that_it_is_approximate(cached):
    facts = cached[1]["live"]
    following, *carried = facts["end"]
    assert sorted([*facts["ids"], *carried]) == list(range(following))
    assert max(facts["waiting"]) <= 40, "examples already used must be forgotten"
    assert all(facts["same_order"])
    assert facts["resumed"]
    assert any("APPROXIMATE" in line for line in facts["log"])
    assert any("skipping" in line and "approximate" in line for line in facts["log"])


def test_a_missing_cache_is_written_by_a_subprocess(tmp_path, files):
    before = {name for name in sys.modules if name.partition(".")[0] == "tensorflow"}
    dataset = source.open_dataset(config(tmp_path, files, "toy_lines"), objective())
    assert dataset.examples.tasks[0].num_records == 55
    after = {name for name in sys.modules if name.partition(".")[0] == "tensorflow"}
    assert after == before  # another file's tests may have imported it


def test_the_lengths_of_a_row_reach_the_subprocess(tmp_path, files):
    given = config(tmp_path, files, "toy_rows", sequence_length=LENGTHS)
    task = source.open_dataset(given, TextToText(6, 4)).examples.tasks[0]
    assert task.metadata[source.LENGTHS_KEY] == LENGTHS


def test_an_unknown_name_gets_the_subprocess_s_did_you_mean(tmp_path, files):
    with pytest.raises(UserError, match="unknown task") as error:
        source.open_dataset(config(tmp_path, files, "toy_line"), objective())
    assert error.value.got == "'toy_line'"
    assert "did you mean 'toy_lines'" in error.value.fix


@pytest.mark.slow
def test_of_two_processes_that_miss_a_cache_one_writes_and_one_waits(tmp_path, files):
    opened, failures = [], []

    def open_one():
        try:
            opened.append(source.open_dataset(config(tmp_path, files, "toy_lines"), objective()))
        except Exception as error:  # noqa: BLE001 - shown by the assertion
            failures.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [one.examples.tasks[0].num_records for one in opened] == [55, 55]
    assert not [path for path in tmp_path.rglob("*") if "incomplete" in path.name]


def test_small_tasks_are_kept_in_memory_within_the_budget(tmp_path):
    from data.small_data import small_tasks

    for task in small_tasks(30):
        synthetic.write_cache(task, tmp_path)
    for mib, kept in ((0, [False, False]), (64, [True, True])):
        settings = source.DatasetConfig(
            "words", {"inputs": 64, "targets": 64}, 4, cache_dir=str(tmp_path),
            keep_in_memory_mib=mib)
        mixture = source.open_mixture(settings, PATCHES)
        assert [task._kept is not None for task in mixture.tasks] == kept[:1]


@pytest.mark.parametrize("field, value", [
    ("mixture_or_task_name", ""), ("batch_size", 0), ("prefetch", 0), ("seed", -1),
    ("max_bad_fraction", 1.5), ("read_threads", 0), ("keep_in_memory_mib", -1)])
def test_a_configuration_is_checked(field, value):
    good = {"mixture_or_task_name": "toy", "task_feature_lengths": {}, "batch_size": 4}
    with pytest.raises(UserError, match=field if field != "seed" else "seed"):
        source.DatasetConfig(**{**good, field: value})


def test_the_verb_refuses_what_it_does_not_know():
    done = helpers.vishwam("cache", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["problem"] == "cache which task or mixture?"
    done = helpers.vishwam("cache", "--task_or_mixture=toy", "--sequence_length=inputs")
    assert done.returncode == 2 and "inputs:512" in done.stderr
    done = helpers.vishwam("cache", "--task_or_mixtur=toy")
    assert done.returncode == 2 and "'task_or_mixture'" in done.stderr


@pytest.mark.slow
def test_vishwam_cache_killed_at_any_moment_goes_on(tmp_path):
    """Twelve files of lines; SIGKILL as soon as some shard is finished, several times over."""
    files = tmp_path / "files"
    files.mkdir()
    for index in range(12):
        (files / f"lines-{index:02}.txt").write_text("".join(
            f"{index} {n % 900}\n" for n in range(3000)))
    cache_dir = tmp_path / "cache"
    work = records_work(cache_dir)
    command = [sys.executable, "-m", "vishwam_t5x", "cache", "--task_or_mixture=toy_lines",
               f"--module={MODULE}", f"--cache_dir={cache_dir}"]
    env = helpers.environment(env={"TOY_FILES": str(files)})
    finished, kills, deadline = 0, 0, time.monotonic() + 400
    while kills < 2:
        process = subprocess.Popen(command, env=env, cwd=helpers.ROOT, stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(work.glob("*.json"))) < finished + 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL)
        kills, finished = kills + 1, len(list(work.glob("part-*.json")))
        if process.returncode == 0:  # it had ended before the kill came: once more
            shutil.rmtree(cache_dir)
            kills = finished = 0
    done = helpers.vishwam(*command[3:], env={"TOY_FILES": str(files)})
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
    task = records.TaskCache.open(cache_directory.task_directory(cache_dir, "toy_lines", "train"))
    task.verify()
    pairs = [tuple(task.read(record)["text"][:2].tolist()) for record in range(task.num_records)]
    assert pairs == [(index, n % 900) for index in range(12) for n in range(3000)]


def records_work(cache_dir):
    from vishwam_t5x.data.records_writer import work_directory

    return work_directory(cache_directory.task_directory(cache_dir, "toy_lines", "train"))
