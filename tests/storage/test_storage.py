"""The door to files: in folders, in fsspec's memory, and in a bucket over a line with faults."""

from __future__ import annotations

import errno
import threading

import pytest
from storage import emulator

import helpers
from vishwam_t5x import __main__
from vishwam_t5x.core import distributed, patience, storage
from vishwam_t5x.core.errors import EXIT_ABORTED, EXIT_USER_ERROR, Resumable, UserError


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    """A folder to write in, plain or remote."""
    return str(tmp_path) if request.param == "folder" else f"memory://{tmp_path.name}"


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)


def test_read_and_write(place):
    path = storage.join(place, "a", "b.txt")
    assert not storage.exists(path) and storage.names(storage.join(place, "a")) == []
    storage.write_text(path, "grün\n")
    assert storage.read_text(path) == "grün\n" and storage.is_file(path)
    storage.write_bytes(path, b"other")
    assert storage.read_bytes(path) == b"other"
    assert storage.names(storage.parent(path)) == ["b.txt"]
    assert storage.names(place) == ["a"] and not storage.is_file(storage.join(place, "a"))
    with storage.as_local(path) as copy:
        assert copy.read_bytes() == b"other"
    storage.remove(path)
    storage.remove(path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(path)


def test_copies(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    storage.upload(tmp_path / "file", "memory://copies/x/file")
    storage.download("memory://copies/x/file", tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == b"12345"
    assert storage.files_below("memory://copies") == ["x/file"]
    assert storage.fingerprint("memory://copies/x/file")[0] == 5
    storage.remove_tree("memory://copies")
    assert storage.names("memory://copies") == []
    with pytest.raises(FileNotFoundError):
        storage.download("memory://copies/x/file", tmp_path / "none")
    assert [entry.name for entry in tmp_path.iterdir() if "tmp" in entry.name] == []


@pytest.mark.parametrize(("folder", "name", "path"), [
    ("gs://b/x", "y.png", "gs://b/x/y.png"), ("gs://b/x", "s3://c/z", "s3://c/z"),
    ("/a", "b", "/a/b"), ("/a", "/b", "/b"), ("gs://b/", "y", "gs://b/y")])
def test_join(folder, name, path):
    assert storage.join(folder, name) == path


def test_parent():
    assert storage.parent("gs://b/x/y.png") == "gs://b/x" and storage.parent("y.png") == "."


def test_packages_and_kinds_that_are_not_there(monkeypatch):
    import fsspec

    def lacking(path):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacking)
    with pytest.raises(UserError, match=r"pip install 'vishwam_t5x\[gcs\]'"):
        storage.read_bytes("gs://bucket/x")
    monkeypatch.undo()
    with pytest.raises(UserError, match="no kind of storage"):
        storage.read_bytes("nosuch://bucket/x")


class Broken(Exception):
    """As gcsfs says what the server answered."""

    def __init__(self, code: int) -> None:
        super().__init__(f"answer {code}")
        self.code = code


def failing(*errors):
    """A call that raises each error in turn, then returns."""
    left = list(errors)

    def call():
        if left:
            raise left.pop(0)
        return "done"

    return call


def of(module: str, name: str, *bases: type, **attributes: object) -> type[Exception]:
    """An error class as a library has it, which need not be installed."""
    return type(name, bases or (Exception,), {"__module__": module, **attributes})


TRANSPORT = of("google.auth.exceptions", "TransportError")
REFRESH = of("google.auth.exceptions", "RefreshError")
BOTOCORE = of("botocore.exceptions", "BotoCoreError")


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [
    Broken(503), Broken(429), Broken(500), TimeoutError(), ConnectionResetError("reset"),
    OSError("half an answer"), TRANSPORT("no token server"), REFRESH(TRANSPORT("no token server")),
    caused_by(Broken(401), caused_by(REFRESH("x"), TRANSPORT("no token server"))),
    of("google.auth.exceptions", "RefreshError", retryable=True)("internal failure"),
    of("gcsfs.retry", "ChecksumError")("half"), of("aiohttp.x", "ClientError")("cut"),
    of("botocore.exceptions", "X", of("botocore.exceptions", "HTTPClientError"))("cut")])
def test_passing_faults_are_tried_again(error, no_pauses):
    assert patience.patiently("read", "gs://b/x", failing(error, error, error)) == "done"


@pytest.mark.parametrize("error", [Broken(401), Broken(403), PermissionError("no"),
                                   OSError("Forbidden: gs://b/x"), REFRESH("invalid_grant")])
def test_refusals_are_not(error):
    with pytest.raises(storage.StorageError, match="(?s)refused: gs://b/x .*fix: log in") as said:
        patience.patiently("read", "gs://b/x", failing(error))
    assert not isinstance(said.value, Resumable)


@pytest.mark.parametrize("error", [FileNotFoundError("x"), TypeError("a mistake of ours")])
def test_other_errors_are_raised_at_once(error):
    with pytest.raises(type(error)):
        patience.patiently("read", "gs://b/x", failing(error))


@pytest.mark.parametrize("error", [
    Broken(400), ValueError("Bad Request"), of("botocore.exceptions", "NoRegionError", BOTOCORE)(),
    of("requests.exceptions", "InvalidURL", of("requests.exceptions", "RequestException"),
       ValueError)("x")])
def test_what_will_never_go_is_an_error_of_the_storage(error):
    with pytest.raises(storage.StorageError, match="takes no such request: gs://b/x") as said:
        patience.patiently("read", "gs://b/x", failing(error))
    assert not isinstance(said.value, Resumable) and said.value.__cause__ is error


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "x", "/a"),
    PermissionError(errno.EACCES, "Permission denied", "/a")])
def test_the_own_disk_is_not_the_storage(error):
    with pytest.raises(storage.StorageError, match="(?s)the disk of this machine.*free space"):
        patience.patiently("read", "gs://b/x", failing(error))


def test_exit_codes(monkeypatch, capsys):
    """A storage that is away is come back to; a refusal is the user's to mend."""
    for error, code in ((storage.StorageAway("it does not answer", "503", "again"), EXIT_ABORTED),
                        (storage.StorageError("refused", "403", "log in"), EXIT_USER_ERROR),
                        (Resumable("not now"), EXIT_ABORTED)):
        monkeypatch.setattr(__main__, "_dispatch", lambda _, call=failing(error): call())
        assert __main__._run(["train"]) == code
        assert "Traceback" not in (said := capsys.readouterr().err) and str(error) in said
        with pytest.raises(Resumable if code == EXIT_ABORTED else UserError):
            distributed.refuse_together("x", failing(error))


def test_patience_ends(monkeypatch):
    now, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(patience.time, "sleep", sleep)
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "100")
    with pytest.raises(storage.StorageAway, match="(?s)does not answer: gs://b/x .*answer 503"):
        patience.patiently("written", "gs://b/x", failing(*[Broken(503)] * 1000))
    assert 50 < now[0] <= 100 and max(slept) <= 30 and slept[-1] > 4 * slept[0]


def test_patience_must_be_a_number(monkeypatch):
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "long")
    with pytest.raises(UserError, match="positive number"):
        patience.patience()


FAULTS = """
    import sys, threading
    from vishwam_t5x.core import storage
    from vishwam_t5x.checkpointing import directory
    from vishwam_t5x.checkpointing.manager import Checkpoints
    from vishwam_t5x.checkpointing.policy import CheckpointConfig
    import jax.numpy as jnp, numpy as np
    folder = {folder!r}
    def state(step):
        return {{"params": {{f"w{{n}}": jnp.full((300, 40), step + n, jnp.float32)
                           for n in range(4)}}, "step": np.int32(step)}}
    with Checkpoints(folder, CheckpointConfig()) as saver:
        for step in range(1, {steps} + 1):
            saver.save(step, state(step))
            saver.wait()
        print("failed", saver.failed_saves, "steps", *saver.all_steps())
        found = saver.restore(state(0))
        assert all(float(found["params"][f"w{{n}}"].min()) == float(
            found["params"][f"w{{n}}"].max()) == saver.restored_step + n for n in range(4))
        print("restored", saver.restored_step)
    assert "tensorflow" not in sys.modules
"""
READER = """
    import sys, time
    import jax.numpy as jnp, numpy as np
    from vishwam_t5x.checkpointing import directory, manifest
    from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint
    from vishwam_t5x.checkpointing.restore import restore_params
    from vishwam_t5x.core import storage
    folder, seen = {folder!r}, set()
    like = {{f"w{{n}}": jnp.zeros((300, 40)) for n in range(4)}}
    deadline, last = time.monotonic() + 400, False
    while not last:
        assert time.monotonic() < deadline
        last = storage.exists(folder + ".done")
        for step in directory.steps_in(directory.absolute(folder)):
            try:
                params, _ = restore_params(f"{{folder}}/{{step}}", like)
            except Exception as error:
                # It may have been discarded meanwhile; while it is listed it is whole.
                assert step not in directory.steps_in(directory.absolute(folder)), repr(error)
                continue
            assert all(float(params[f"w{{n}}"].min()) == float(params[f"w{{n}}"].max()) == step + n
                       for n in range(4)), step
            seen.add(step)
    print("seen", *sorted(seen))
"""


@pytest.fixture(scope="module")
def bucket():
    pytest.importorskip("gcp_storage_emulator")
    with emulator.serve() as port:
        yield port


def save_over(line: emulator.FaultyLine, bucket: int, folder: str, steps: int, **env: str
              ) -> tuple[str, str]:
    """Saves over a line while another process reads without faults; what the two said."""
    said: list[str] = []
    direct = emulator.variables(bucket)
    reader = threading.Thread(target=lambda: said.append(helpers.run_python(
        READER.format(folder=folder), env=direct)))
    reader.start()
    try:
        out = helpers.run_python(FAULTS.format(folder=folder, steps=steps),
                                 env=emulator.variables(line.port, **env))
    finally:
        helpers.run_python(f"from vishwam_t5x.core import storage\n"
                           f"storage.write_text({folder + '.done'!r}, '')", env=direct)
        reader.join(500)
    assert said, "the reader failed: see above"
    return out, said[0]


@pytest.mark.slow
def test_saves_over_a_line_with_faults(bucket):
    line = emulator.FaultyLine(bucket, seed=7, share=0.1, stall_seconds=8)
    try:
        out, seen = save_over(line, bucket, emulator.url("faults", "checkpoints"), 5,
                              VISHWAM_STORAGE_SECONDS="60")
    finally:
        line.close()
    print(line.faults, out, seen)
    assert all(line.faults.values()), line.faults
    words = out.split()
    assert "restored 5" in out and words[1] == "0", out
    assert "5" in seen.split()


def test_saves_without_faults_are_read_whole(bucket):
    line = emulator.FaultyLine(bucket, seed=0, share=0.0, stall_seconds=0)
    try:
        out, seen = save_over(line, bucket, emulator.url("calm", "checkpoints"), 3)
    finally:
        line.close()
    assert "failed 0" in out and "restored 3" in out and "3" in seen.split()
