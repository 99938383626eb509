"""A file written in chunks, by any number of jobs, killed and started again: the same file."""

from __future__ import annotations

import json

import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation import chunks
from vishwam_t5x.evaluation.chunks import Chunk, ChunkedFile, Summary

PLAN = chunks.plan([5, 0, 3], 2)
EXPECTED = [f'{{"s": {source}, "e": {example}}}'
            for source, size in ((0, 5), (2, 3)) for example in range(size)]


def lines(chunk):
    return [f'{{"s": {chunk.source}, "e": {example}}}'
            for example in range(chunk.first, chunk.end)]


def job(path, settings=None, shard_id=0, num_shards=1, overwrite=False):
    file = ChunkedFile(path, settings or {"mode": "predict", "seed": 0}, PLAN, shard_id, num_shards)
    return file, file.begin(overwrite)


def work(path, **more):
    file, todo = job(path, **more)
    for chunk in todo:
        file.write(chunk, lines(chunk))
    return file.finish()


def test_plan_cuts_each_source_by_itself():
    assert PLAN == [Chunk(0, 0, 0, 2), Chunk(1, 0, 2, 4), Chunk(2, 0, 4, 5), Chunk(3, 2, 0, 2),
                    Chunk(4, 2, 2, 3)]
    with pytest.raises(UserError, match="at least 1 example"):
        chunks.plan([3], 0)


def test_one_job_writes_all_in_order_and_clears_up(tmp_path):
    assert work(tmp_path / "out.jsonl") == Summary(8, [])
    assert (tmp_path / "out.jsonl").read_text().splitlines() == EXPECTED
    assert sorted(file.name for file in tmp_path.rglob("*.json*") if file.is_file()) == [
        "done.json", "manifest.json", "out.jsonl"]
    _, todo = job(tmp_path / "out.jsonl")
    assert todo == []  # the same again: there is nothing to do


def test_a_killed_job_goes_on_with_the_chunk_it_was_at(tmp_path):
    file, todo = job(tmp_path / "out.jsonl")
    for chunk in todo[:2]:
        file.write(chunk, lines(chunk))
    assert file.finish() is None and file.missing() == 3
    assert not (tmp_path / "out.jsonl").exists()
    again, left = job(tmp_path / "out.jsonl")
    assert [chunk.number for chunk in left] == [2, 3, 4]
    for chunk in left:
        again.write(chunk, lines(chunk))
    assert again.finish() == Summary(8, [])
    assert (tmp_path / "out.jsonl").read_text().splitlines() == EXPECTED


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_share_the_chunks_and_the_last_puts_them_together(tmp_path, order):
    found = [work(tmp_path / "out.jsonl", shard_id=shard, num_shards=3) for shard in order]
    assert found == [None, None, Summary(8, [])]
    assert (tmp_path / "out.jsonl").read_text().splitlines() == EXPECTED
    assert work(tmp_path / "out.jsonl", shard_id=1, num_shards=3) == Summary(8, [])


def test_more_shards_than_chunks(tmp_path):
    found = [work(tmp_path / "out.jsonl", shard_id=shard, num_shards=7) for shard in range(7)]
    # The last two find it done.
    assert found == [None] * 4 + [Summary(8, [])] * 3
    for shard_id, num_shards in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(UserError, match="shard_id"):
            job(tmp_path / "out.jsonl", shard_id=shard_id, num_shards=num_shards)


def test_other_settings_are_refused_while_it_is_not_finished(tmp_path):
    path = tmp_path / "out.jsonl"
    file, todo = job(path)
    file.write(todo[0], lines(todo[0]))
    with pytest.raises(UserError, match='mode: "predict" there, "score" now') as error:
        job(path, {"mode": "score", "seed": 0})
    assert "--overwrite" in error.value.fix and "seed" not in error.value.got
    with pytest.raises(UserError, match="what the other shards write"):
        job(path, {"mode": "score", "seed": 0}, num_shards=2, overwrite=True)
    _, todo = job(path, {"mode": "score", "seed": 0}, overwrite=True)
    assert todo == PLAN


def test_overwriting_that_is_killed_comes_to_an_end(tmp_path):
    path = tmp_path / "out.jsonl"
    work(path)
    for written in range(3):  # the same command, killed each time after one chunk
        file, todo = job(path, overwrite=True)
        assert todo == PLAN[written:]
        file.write(todo[0], ["{}"])
    work(path, overwrite=True)
    assert path.read_text().splitlines() == ["{}"] * 3 + EXPECTED[-3:]
    assert job(path, overwrite=True)[1] == PLAN  # it is finished


def test_a_finished_file_is_replaced_only_if_asked(tmp_path):
    path = tmp_path / "out.jsonl"
    work(path)
    with pytest.raises(UserError, match="was written with other settings\n.*predict") as error:
        job(path, {"mode": "score", "seed": 0})
    assert error.value.fix.startswith("--overwrite begins anew")
    with pytest.raises(UserError, match="was written with other settings"):
        job(path, {"mode": "score", "seed": 0}, num_shards=2)
    file, todo = job(path, {"mode": "score", "seed": 0}, overwrite=True)
    assert todo == PLAN and path.read_text().splitlines() == EXPECTED
    for chunk in todo:
        file.write(chunk, ["{}"])
    assert file.finish() == Summary(5, [])
    assert path.read_text() == "{}\n" * 5


def test_a_file_that_nobody_knows_is_not_replaced(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("mine\n")
    with pytest.raises(UserError, match="nobody knows with what settings"):
        job(path)
    assert path.read_text() == "mine\n"
    assert job(path, overwrite=True)[1] == PLAN


def test_of_shards_with_other_settings_that_begin_at_once_one_is_refused(tmp_path, monkeypatch):
    path, other = tmp_path / "out.jsonl", {"mode": "score", "seed": 0}
    claim, first = ChunkedFile._claim, []

    def meanwhile(self):
        # Both have seen that there is nothing yet.
        monkeypatch.setattr(ChunkedFile, "_claim", claim)
        first.append(job(path, num_shards=2))
        claim(self)

    monkeypatch.setattr(ChunkedFile, "_claim", meanwhile)
    with pytest.raises(UserError, match='mode: "predict" there, "score" now'):
        job(path, other, shard_id=1, num_shards=2)
    assert [name.name for name in path.with_name("out.jsonl.parts").iterdir()] == ["manifest.json"]
    file, todo = first[0]
    file.write(todo[0], lines(todo[0]))
    # Begun anew by another job: what is written late must not get among its chunks.
    job(path, other, overwrite=True)
    with pytest.raises(UserError, match='mode: "score" there, "predict" now'):
        file.write(todo[1], lines(todo[1]))


def test_a_job_that_comes_while_another_puts_it_together(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    file, todo = job(path)
    for chunk in todo:
        file.write(chunk, lines(chunk))
    slow, put_together = job(path)[0], ChunkedFile._put_together

    def meanwhile(self):
        assert file.finish() == Summary(8, [])  # and has deleted the chunks
        return put_together(self)

    monkeypatch.setattr(slow, "_put_together", meanwhile.__get__(slow))
    assert slow.finish() == Summary(8, [])
    assert path.read_text().splitlines() == EXPECTED


def test_what_was_left_out_is_counted_and_not_written(tmp_path):
    path = tmp_path / "out.jsonl"
    file, todo = job(path)
    for chunk in todo:
        file.write(chunk, [json.dumps({"prediction": "left_out\u2028"}, ensure_ascii=False)],
                   [[chunk.number, "broken"]] if chunk.number % 2 else [])
    assert file.finish() == Summary(5, [[1, "broken"], [3, "broken"]])
    assert path.read_text().count("prediction") == 5 and "broken" not in path.read_text()
    assert work(path) == Summary(5, [[1, "broken"], [3, "broken"]])
