"""Caches on disk: what is written is what is read, damage is found, a kill loses one shard."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from data.small_data import PATCHES, small_tasks

import helpers
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import directory as cache_directory
from vishwam_t5x.data import records_writer, synthetic
from vishwam_t5x.data.records import DamagedRecord, FeatureInfo, TaskCache

FEATURES = {"text": FeatureInfo((None,), "int32"), "image": FeatureInfo((None, 4, 1), "uint8"),
            "meta_id": FeatureInfo((), "bytes"), "meta_label": FeatureInfo((), "int64")}


def example(number):
    rng = np.random.default_rng(number)
    return {"text": rng.integers(0, 99, number % 7 + 1, dtype=np.int32),
            "image": rng.integers(0, 255, (2 + 2 * (number % 3), 4, 1), dtype=np.uint8),
            "meta_id": f"id-{number}".encode(), "meta_label": np.int64(number)}


def write(directory, count=50, first=0, **options):
    writer = records_writer.TaskCacheWriter(directory, "things", "train", FEATURES,
                                            {"vocabulary": "here"}, **options)
    part = writer.part(0)
    for number in range(first + part.num_examples, first + count):
        part.write(example(number))
    part.close()
    return writer.finish()


@pytest.fixture
def cache(tmp_path):
    directory = tmp_path / "tasks" / "things" / "train"
    directory.parent.mkdir(parents=True)
    write(directory, max_shard_records=20)
    return directory


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, bytes):
            assert got[name] == value
        else:
            assert got[name].dtype == value.dtype
            np.testing.assert_array_equal(got[name], value)


@pytest.mark.parametrize("keep", [False, True])
def test_records_come_back_in_any_order(cache, keep):
    task = TaskCache.open(cache, PATCHES)
    if keep:
        task.keep_in_memory()
    assert (task.name, task.num_records, len(task.manifest.shards)) == ("things", 50, 3)
    assert task.features == FEATURES and task.metadata == {"vocabulary": "here"}
    for number in [49, 0, 20, 19, 7, 7]:
        assert_same(task.read(number), example(number))
        clean = example(number)
        assert task.clean_lengths(number) == {
            "text": len(clean["text"]), "image": clean["image"].shape[0] // 2 * 2}
    task.verify()
    expected = sum(example(n)["text"].nbytes + example(n)["image"].nbytes for n in range(50))
    assert task.decoded_bytes == expected


def test_what_is_kept_in_memory_cannot_be_spoilt_by_a_reader(cache):
    task = TaskCache.open(cache)
    task.keep_in_memory()
    first = task.read(3)
    with pytest.raises(ValueError, match="read-only"):
        first["text"][0] = 1
    del first["image"]
    assert_same(task.read(3), example(3))


def test_lengths_need_a_patch_spec_that_divides(cache):
    with pytest.raises(UserError, match="PatchSpec for 'image'"):
        TaskCache.open(cache).clean_lengths(0)
    wrong = {"image": type(PATCHES["image"])(4, channels=1)}
    with pytest.raises(UserError, match="'image' of task 'things'"):
        TaskCache.open(cache, wrong).clean_lengths(0)


def test_no_cache_and_foreign_formats_are_refused(tmp_path, cache):
    with pytest.raises(UserError, match="no finished cache"):
        TaskCache.open(tmp_path / "nothing")
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99") as error:
        TaskCache.open(cache)
    assert "--overwrite" in error.value.fix
    (cache / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        TaskCache.open(cache)


def test_missing_and_changed_files_are_refused_by_name(cache):
    shard = cache / "shard-00001-of-00003.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    with pytest.raises(UserError, match="shard-00001-of-00003") as error:
        TaskCache.open(cache)
    assert "vishwam cache --task_or_mixture=things --overwrite" in error.value.fix
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        TaskCache.open(cache)
    shard.write_bytes(data)
    lengths = np.load(cache / "lengths.npy")
    np.save(cache / "lengths.npy", lengths + 1)
    with pytest.raises(UserError, match=r"lengths\.npy has changed"):
        TaskCache.open(cache)


def test_a_damaged_record_is_named_and_its_neighbours_are_fine(cache):
    path = cache / "shard-00000-of-00003.array_record"
    data = bytearray(path.read_bytes())
    at = data.find(b"id-5") if b"id-5" in data else len(data) // 10
    data[at - 30:at + 30] = bytes(60)
    path.write_bytes(data)
    task = TaskCache.open(cache)
    good, bad = 0, []
    for number in range(50):
        try:
            assert_same(task.read(number), example(number))
            good += 1
        except DamagedRecord as error:
            bad.append(error)
    assert bad and good >= 40
    assert all(error.task == "things" and error.why and error.record < 20 for error in bad)
    with pytest.raises(UserError, match="has changed"):
        task.verify()
    copied = pickle.loads(pickle.dumps(bad[0]))
    assert (copied.task, copied.record, copied.why) == (
        bad[0].task, bad[0].record, bad[0].why)


@pytest.mark.parametrize("broken, why", [
    (b"no msgpack at all", "cannot be decoded"),
    (records_writer.encode({"text": np.zeros(3, np.int32)}), "features missing"),
    (records_writer.encode({**example(0), "text": np.zeros(3, np.int64)}), "dtype int64"),
    (records_writer.encode({**example(0), "image": np.zeros((2, 5, 1), np.uint8)}), "shape"),
    (records_writer.encode({**example(0), "meta_id": np.zeros(3)}), "not bytes"),
    (records_writer.encode({**example(0), "text": np.zeros(9, np.int32)}), "lengths"),
    (b"\x92\x01\x02", "not a dict"),
])
def test_a_record_that_is_not_what_the_manifest_says_is_damaged(tmp_path, broken, why):
    from array_record.python import array_record_module

    directory = tmp_path / "tasks" / "things" / "train"
    directory.parent.mkdir(parents=True)
    write(directory, count=2)
    path = directory / "shard-00000-of-00001.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    writer.write(broken)
    writer.write(records_writer.encode(example(1)))
    writer.close()
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["shards"][0]["num_bytes"] = path.stat().st_size
    (directory / "manifest.json").write_text(json.dumps(manifest))
    task = TaskCache.open(directory)
    with pytest.raises(DamagedRecord, match=why):
        task.read(0)
    assert_same(task.read(1), example(1))


def test_an_example_of_the_wrong_kind_is_left_out_and_listed(tmp_path):
    writer = records_writer.TaskCacheWriter(tmp_path / "train", "things", "train", FEATURES)
    part = writer.part(0)
    assert part.write(example(0)) is None
    assert "int64" in part.write({**example(1), "text": np.zeros(2, np.int64)})
    part.leave_out("not finite")
    assert part.write(example(3)) is None
    part.close()
    manifest = writer.finish()
    assert [entry["example"] for entry in manifest.bad_examples] == [1, 2]
    task = TaskCache.open(tmp_path / "train")
    assert task.num_records == 2
    assert_same(task.read(1), example(3))


def test_parts_are_joined_in_order_whatever_order_they_were_written_in(tmp_path):
    writer = records_writer.TaskCacheWriter(tmp_path / "train", "things", "train", FEATURES,
                                            num_parts=3, max_shard_records=4)
    for number in (2, 0, 1):
        part = writer.part(number)
        for index in range(number * 10, number * 10 + (0 if number == 1 else 10)):
            part.write(example(index))
        part.close()
    writer.finish()
    task = TaskCache.open(tmp_path / "train", PATCHES)
    labels = [int(task.read(record)["meta_label"]) for record in range(task.num_records)]
    assert labels == [*range(10), *range(20, 30)]


def test_a_finished_cache_is_replaced_whole(cache):
    write(cache, count=5, first=100)
    task = TaskCache.open(cache)
    assert task.num_records == 5
    assert_same(task.read(0), example(100))
    assert sorted(path.name for path in cache.parent.iterdir()) == ["train"]


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from data.test_records import FEATURES, example
from vishwam_t5x.data import records_writer
writer = records_writer.TaskCacheWriter({directory!r}, "things", "train", FEATURES,
                                        {{"vocabulary": "here"}}, max_shard_records=10)
part = writer.part(0)
print("resumed", part.num_examples, flush=True)
for number in range(part.num_examples, 1000):
    part.write(example(number))
    print(number, flush=True)
"""


def test_a_killed_writer_goes_on_after_its_last_finished_shard(tmp_path):
    directory = tmp_path / "tasks" / "things" / "train"
    directory.parent.mkdir(parents=True)
    code = KILLED.format(tests=str(helpers.ROOT / "tests"), directory=str(directory))
    for stop_at in (35, 58):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                                   env=helpers.environment())
        for line in process.stdout:
            if line.strip() == str(stop_at):
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        process.stdout.close()
        assert not directory.exists()
        # A half-written file in the place of a finished one's successor must not count.
        work = records_writer.work_directory(directory)
        newest = sorted(work.glob("*.array_record"))[-1]
        newest.write_bytes(newest.read_bytes()[:5])
        again = records_writer.TaskCacheWriter(directory, "things", "train", FEATURES,
                                               {"vocabulary": "here"})
        done = again.part(0).num_examples
        assert stop_at - 10 < done <= stop_at + 200 and done % 10 == 0 and done >= 30
    assert len(write(directory, count=done + 7).shards) == done // 10 + 1
    task = TaskCache.open(directory)
    task.verify()
    assert task.num_records == done + 7
    for record in range(task.num_records):
        assert_same(task.read(record), example(record))


def test_an_interrupted_cache_of_another_task_version_is_not_continued(tmp_path):
    writer = records_writer.TaskCacheWriter(tmp_path / "train", "things", "train", FEATURES,
                                            {"vocabulary": "old"}, max_shard_records=2)
    part = writer.part(0)
    for number in range(5):
        part.write(example(number))
    same = records_writer.TaskCacheWriter(tmp_path / "train", "things", "train", FEATURES,
                                          {"vocabulary": "old"}, max_shard_records=2)
    assert (same.resumed_pieces, same.part(0).num_examples) == (2, 4)
    new = records_writer.TaskCacheWriter(tmp_path / "train", "things", "train", FEATURES,
                                         {"vocabulary": "new"}, max_shard_records=2)
    assert (new.resumed_pieces, new.part(0).num_examples) == (0, 0)


def test_a_kill_while_finishing_loses_nothing(tmp_path, monkeypatch):
    directory = tmp_path / "train"

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(records_writer, "_replace_directory", killed)
    with pytest.raises(KeyboardInterrupt):
        write(directory, count=30, max_shard_records=8)
    monkeypatch.undo()
    writer = records_writer.TaskCacheWriter(directory, "things", "train", FEATURES,
                                            {"vocabulary": "here"})
    assert writer.part(0) is None
    assert writer.finish().num_records == 30
    assert_same(TaskCache.open(directory).read(29), example(29))


def test_a_synthetic_task_is_its_cache(tmp_path):
    for task in small_tasks(40):
        synthetic.write_cache(task, tmp_path, max_shard_records=16)
        place = cache_directory.task_directory(tmp_path, task.name, "train")
        cached = TaskCache.open(place, PATCHES)
        assert cached.num_records == task.num_records
        for record in range(task.num_records):
            assert_same(cached.read(record), task.read(record))
            assert cached.clean_lengths(record) == task.clean_lengths(record)


def test_names_and_rates(tmp_path):
    for task in small_tasks(4):
        synthetic.write_cache(task, tmp_path)
    records_writer.write_mixture(tmp_path, "both", {"words": 2.0, "pictures": 0.5})
    assert cache_directory.cached_names(tmp_path) == ["both", "pictures", "words"]
    assert cache_directory.read_rates(tmp_path, "both") == {"words": 2.0, "pictures": 0.5}
    assert cache_directory.read_rates(tmp_path, "words") == {"words": 1.0}
    assert cache_directory.read_rates(tmp_path, "wrods") is None
    assert cache_directory.available_splits(tmp_path, "words") == ["train"]
    cache_directory.mixture_file(tmp_path, "both").write_text("[]")
    with pytest.raises(UserError, match="mixture file"):
        cache_directory.read_rates(tmp_path, "both")


def test_reading_needs_neither_tensorflow_nor_seqio_nor_grain(cache):
    out = helpers.run_python(f"""
        import sys
        sys.modules["tensorflow"] = sys.modules["seqio"] = sys.modules["grain"] = None
        from vishwam_t5x.data.records import TaskCache
        print(int(TaskCache.open({str(cache)!r}).read(17)["meta_label"]))
        """)
    assert out.strip() == "17"
