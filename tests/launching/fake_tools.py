"""Tools of the clouds and clusters that only write down how they are called."""

from __future__ import annotations

import json
import pathlib
import stat
import sys

from helpers import run


def tools(folder: pathlib.Path, *names: str, body: str = "") -> dict[str, str]:
    """Fake programs that write their arguments down, alone on the PATH with the usual ones."""
    # All of them, whichever is meant: the real ones must not be within reach.
    for name in (*names, "gcloud", "kubectl", "xpk", "sky", "docker", "sbatch", "srun", "python3"):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\nimport json, os, sys\n"
                        f"with open({str(folder / 'calls')!r}, 'a') as file:\n"
                        "    file.write(json.dumps([os.path.basename(sys.argv[0]), "
                        "*sys.argv[1:]]) + '\\n')\n" + body)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}


# As `python -m vishwam_t5x launch`, where no library for buckets is installed: with it, a run would
# look for the tester's own credentials, and ask a real cloud for a bucket.
NO_CLOUD = """
import sys
sys.modules["google.cloud.storage"] = None
from vishwam_t5x.__main__ import main
sys.exit(main(["launch", *sys.argv[1:]]))
"""


def launched(*words: str, cwd: pathlib.Path, env: dict[str, str]):
    """A real run of `vishwam launch` with fake tools."""
    return run(["-c", NO_CLOUD, *words], cwd=cwd, env=env)


def calls(folder: pathlib.Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
