"""Caches in an object store: what comes back is what was written, whole, and only when needed."""

from __future__ import annotations

import json

import pytest

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import Resumable, UserError
from vishwam_t5x.data import copies, records, records_writer
from vishwam_t5x.data import directory as cache_directory
from vishwam_t5x.data.source import DatasetConfig, missing_tasks
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask, write_cache


@pytest.fixture
def other_host(tmp_path, monkeypatch):
    """Makes this process one on another host: another folder of caches, nothing remembered."""
    def become(name: str):
        monkeypatch.setenv("VISHWAM_CACHE_DIR", str(tmp_path / name))
        copies.folder_of.cache_clear()
        copies._pulled.cache_clear()
    return become


def task(seed: int = 1) -> SyntheticTask:
    return SyntheticTask("toy", {"text_inputs": SyntheticFeature(2, 9)}, 20, seed=seed)


def write(place: str, seed: int = 1) -> None:
    here = copies.folder_of(place)
    vocabulary = cache_directory.mixture_file(here, "x").parent.parent / "fitted" / "v.model"
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.write_bytes(b"pieces")
    write_cache(task(seed), here, metadata={"vocabulary": {"path": str(vocabulary)}},
                max_shard_records=8)
    records_writer.write_mixture(here, "mix", {"toy": 1.0})
    copies.push(place, "mix", {"toy": {"train": {"written": True}}})


def test_there_and_back(other_host, tmp_path):
    place = f"memory://{tmp_path.name}/cache"
    other_host("first")
    write(place)
    assert "first" not in storage.read_text(storage.join(place, "tasks/toy/train/manifest.json"))
    other_host("second")
    config = DatasetConfig("mix", {"inputs": 8, "targets": 8}, 2, cache_dir=place)
    assert missing_tasks(config) == []
    assert config.directory.startswith(str(tmp_path / "second"))
    cache = records.TaskCache.open(
        cache_directory.task_directory(config.directory, "toy", "train"))
    cache.verify()
    assert cache.num_records == 20 and len(cache.manifest.shards) == 3
    for number in (0, 19):
        assert (cache.read(number)["text_inputs"] == task().read(number)["text_inputs"]).all()
    path = cache.metadata["vocabulary"]["path"]
    assert path.startswith(config.directory) and storage.read_bytes(path) == b"pieces"
    # A third look copies nothing: the store may be gone.
    storage.remove_tree(place)
    assert missing_tasks(config) == []


def test_written_again_is_copied_again(other_host, tmp_path):
    place = f"memory://{tmp_path.name}/cache"
    other_host("first")
    write(place)
    other_host("second")
    copies.pull(place, "mix", "train")
    other_host("first")
    write(place, seed=2)
    other_host("second")
    copies.pull(place, "mix", "train")
    cache = records.TaskCache.open(cache_directory.task_directory(
        copies.folder_of(place), "toy", "train"))
    assert (cache.read(3)["text_inputs"] == task(2).read(3)["text_inputs"]).all()


def test_no_manifest_no_cache(other_host, tmp_path):
    place = f"memory://{tmp_path.name}/cache"
    other_host("first")
    write(place)
    storage.remove(storage.join(place, "tasks/toy/train/manifest.json"))
    other_host("second")
    assert missing_tasks(DatasetConfig("mix", {"inputs": 8, "targets": 8}, 2, cache_dir=place)
                         ) == ["toy"]


def test_damage_is_found(other_host, tmp_path):
    place = f"memory://{tmp_path.name}/cache"
    other_host("first")
    write(place)
    folder = storage.join(place, "tasks/toy/train")
    shard = json.loads(storage.read_text(f"{folder}/manifest.json"))["shards"][1]
    name = shard["file"] if isinstance(shard, dict) else shard[0]
    data = bytearray(storage.read_bytes(f"{folder}/{name}"))
    data[-1] ^= 1
    storage.write_bytes(f"{folder}/{name}", bytes(data))
    other_host("second")
    with pytest.raises(UserError, match="not what its manifest says"):
        copies.pull(place, "mix", "train")
    assert not cache_directory.task_directory(copies.folder_of(place), "toy", "train").exists()


@pytest.mark.parametrize("done", [True, False])
def test_written_again_while_it_is_copied(other_host, tmp_path, monkeypatch, done):
    place = f"memory://{tmp_path.name}/cache"
    other_host("first")
    write(place)
    download, written = storage.download, []

    def overtaken(source, target):
        if "tasks" in str(source) and not written:
            written.append(source)
            with monkeypatch.context() as there:
                there.setenv("VISHWAM_CACHE_DIR", str(tmp_path / "third"))
                copies.folder_of.cache_clear()
                write(place, seed=2)
                copies.folder_of.cache_clear()
            if not done:
                storage.remove(storage.join(place, "tasks/toy/train/manifest.json"))
        download(source, target)

    other_host("second")
    monkeypatch.setattr(storage, "download", overtaken)
    if not done:
        with pytest.raises(Resumable, match="is being written again"):
            copies.pull(place, "mix", "train")
        return
    copies.pull(place, "mix", "train")
    cache = records.TaskCache.open(cache_directory.task_directory(
        copies.folder_of(place), "toy", "train"))
    cache.verify()
    assert (cache.read(3)["text_inputs"] == task(2).read(3)["text_inputs"]).all()
