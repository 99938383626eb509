"""The batch script: a signal is passed on, and a job queued again only if that helps."""

from __future__ import annotations

import os
import pathlib
import sys

import pytest

from helpers import ROOT

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fake_tools import calls, tools
from started import started


def test_the_batch_script_passes_the_signal_on_and_requeues(tmp_path):
    env = {**os.environ, **tools(tmp_path, "scontrol"), "SLURM_JOB_ID": "17"}
    python = tmp_path / "bin" / "python3"
    python.write_text("#!/usr/bin/env bash\ntrap 'touch saved; exit 75' TERM\ntouch ready\n"
                      "while true; do sleep 0.05; done\n")
    python.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    batch = tmp_path / "job.sh"
    batch.write_text((ROOT / "launch" / "slurm.sbatch").read_text())
    with started(["bash", str(batch)], cwd=tmp_path, env=env) as process:
        process.until_there(tmp_path / "ready")
        process.process.terminate()
        assert process.wait() == 75 and (tmp_path / "saved").exists()
    assert calls(tmp_path) == [["scontrol", "requeue", "17"]]


@pytest.mark.parametrize("ends, code, times", [
    ((76,), 70, 3), ((75, 76, 76, 76), 70, 4), ((76, 1), 1, 2), ((76, 0), 0, 2)])
def test_a_job_without_hope_is_not_queued_again(tmp_path, ends, code, times):
    """The batch script with the real supervisor; what srun ends with is the test's."""
    env = {**os.environ, **tools(tmp_path, "scontrol"), "SLURM_JOB_ID": "17"}
    log = tmp_path / "calls"
    (tmp_path / "bin" / "srun").write_text(
        f"#!/usr/bin/env bash\nends=({' '.join(map(str, ends))})\necho '[\"srun\"]' >> {log}\n"
        f"n=$(wc -l < {log}); exit ${{ends[$((n < ${{#ends[@]}} ? n - 1 : -1))]}}\n")
    (tmp_path / "bin" / "python3").write_text(
        f"#!/usr/bin/env bash\nshift 2\nexec {sys.executable} {ROOT}/launch/supervise.py "
        "--backoff=0.01 --max-backoff=0.02 \"$@\"\n")
    (tmp_path / "bin" / "python3").chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    with started(["bash", str(ROOT / "launch" / "slurm.sbatch")], cwd=tmp_path, env=env) as job:
        assert job.wait() == code, job.said
    assert calls(tmp_path) == [["srun"]] * times  # And no scontrol.
    assert ("given up" in job.said) == (code == 70)
