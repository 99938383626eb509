"""Checkpoints of T5X in a bucket: read and written there as in a folder."""

import pathlib

import pytest

import helpers
from vishwam_t5x.checkpointing.convert import new_folder
from vishwam_t5x.core import lease, storage
from vishwam_t5x.core.errors import UserError

FOLDERS = pathlib.Path(__file__).parent.parent / "checkpointing"


def test_to_a_bucket_and_back(bucket_here, tmp_path):
    helpers.run_python(f"""
        import sys
        sys.path.insert(0, {str(FOLDERS)!r})
        import pathlib
        import numpy as np
        import t5x_folders
        from vishwam_t5x import convert
        from vishwam_t5x.checkpointing.restore import open_source
        from vishwam_t5x.core import storage
        from vishwam_t5x.core.errors import UserError

        some = {{name: array for name, array in t5x_folders.state().items()
                if "decoder_norm" in name or name == "state/step"}}
        here, bucket = pathlib.Path({str(tmp_path)!r}), {bucket_here!r}
        t5x_folders.write(some, here / "checkpoint_300")
        ways = ((here, "a", "t5x"), ("a", "b", "t5x_orbax"), ("b", "c", "vishwam"),
                ("c", "d", "t5x"))
        place = lambda name: f"{{bucket}}/{{name}}" if isinstance(name, str) else str(name)
        for source, target, kind in ways:
            convert.main([f"--from={{place(source)}}", f"--to={{place(target)}}",
                          f"--format={{kind}}", "--verify"])
        folder = here / "checkpoint_300"
        names = [path.relative_to(here).as_posix() for path in folder.rglob("*") if path.is_file()]
        assert set(storage.files_below(place("d"))) == set(names)
        for name in names:
            assert storage.read_bytes(f"{{place('d')}}/{{name}}") == (here / name).read_bytes()
        source, step, where = open_source(place("b"))
        assert step == 300 and where.endswith("b/checkpoint_300"), where
        storage.remove(f"{{place('b')}}/checkpoint_300/commit_success.txt")
        try:
            open_source(place("b"))
        except UserError as error:
            assert "whole" in error.problem
        else:
            raise AssertionError("a save that was never finished was read")
        try:
            convert.main([f"--from={{here}}", f"--to={{place('a')}}", "--format=t5x"])
        except UserError as error:
            assert "nothing is overwritten" in error.problem
        else:
            raise AssertionError("overwritten")

        # Killed in the middle; the run it is of has saved a newer one since.
        from vishwam_t5x.checkpointing.convert import conversion, interrupted
        plan = conversion.plan(conversion.open_any(here), "t5x", place("e"))
        killed = interrupted.kept_in_mind(plan, here, place("e"))
        killed.__enter__()
        half = f"{{place('e')}}/checkpoint_300"
        storage.write_text(f"{{half}}/target.lost/.zarray", "{{}}")
        t5x_folders.write(some, here / "checkpoint_400")
        convert.main([f"--from={{here}}", f"--to={{place('e')}}", "--format=t5x"])
        assert storage.names(place("e")) == ["checkpoint_300"]
        assert set(storage.files_below(half)) == {{
            name.removeprefix("checkpoint_300/") for name in names}}

        # Another one comes in the middle.
        write, said = conversion.t5x.write_t5x, []
        def twice(*arguments):
            conversion.t5x.write_t5x = write
            before = storage.files_below(place("f"))
            try:
                convert.main([f"--from={{here}}", f"--to={{place('f')}}", "--format=t5x"])
            except UserError as error:
                said.append(str(error))
            assert storage.files_below(place("f")) == before
            write(*arguments)
        conversion.t5x.write_t5x = twice
        convert.main([f"--from={{here}}", f"--to={{place('f')}}", "--format=t5x"])
        assert len(said) == 1 and "another conversion is writing there" in said[0], said
        assert "f/checkpoint_300, by process" in said[0], said
        assert storage.names(place("f")) == ["checkpoint_300"]
        """)


def test_where_nobody_can_be_kept_out_it_is_found_at_the_end(tmp_path):
    target = f"memory://{tmp_path.name}/checkpoint_1"
    mark = f"{target}{new_folder.TEMPORARY}/{lease.FILE_NAME}"
    with new_folder.alone(target):
        assert storage.exists(mark)
    assert not storage.exists(mark)
    for ended in (True, False):
        with pytest.raises(UserError, match="may be of both"), new_folder.alone(target):
            if ended:
                with new_folder.alone(target):
                    pass
            else:
                storage.write_text(mark, "another's")
    with pytest.raises(ZeroDivisionError), new_folder.alone(target):
        raise ZeroDivisionError
    assert not storage.exists(mark)
    storage.remove_tree(f"memory://{tmp_path.name}")


def test_a_lock_that_was_removed_before_it_was_taken_keeps_others_out_all_the_same(
        tmp_path, monkeypatch):
    """One conversion ends between the moments in which another opens its file and locks it."""
    target, lock = tmp_path / "checkpoint_1", new_folder.fcntl.flock
    path = tmp_path / f"checkpoint_1{new_folder.TEMPORARY}.lock"

    def late(file, how):
        monkeypatch.setattr(new_folder.fcntl, "flock", lock)
        path.unlink()
        lock(file, how)

    monkeypatch.setattr(new_folder.fcntl, "flock", late)
    with (new_folder.alone(target), pytest.raises(UserError, match="another conversion"),
          new_folder.alone(target)):
        pass
    assert not path.exists()
