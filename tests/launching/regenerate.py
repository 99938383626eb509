"""Writes the golden files and the files of launch/ anew: python tests/launching/regenerate.py.

Look at the difference before it is committed: that is what users will run.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]


def printed(words: list[str]) -> str:
    """Returns what a dry run prints, in a folder with the cases' own files."""
    from launch_cases import OWN_FILES

    from vishwam_t5x import launch

    text, here = io.StringIO(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.chdir(folder)
            for name in OWN_FILES:
                pathlib.Path(name).parent.mkdir(exist_ok=True)
                pathlib.Path(name).write_text("")
            with contextlib.redirect_stdout(text):
                assert launch.main([words[0], "--dry-run", *words[1:]]) == 0
            assert sorted(str(path) for path in pathlib.Path().rglob("*")
                          if path.is_file()) == sorted(OWN_FILES)  # A dry run writes nothing.
        finally:
            os.chdir(here)
    return text.getvalue()


def written(script: str) -> str:
    """Returns the one file that a script writes."""
    (text,) = re.findall(r"<<'(END_OF_FILE_*)'\n(.*?)^\1$", script, re.S | re.M)
    return text[1]


if __name__ == "__main__":
    from launch_cases import CASES, COPIED

    for case, arguments in CASES.items():
        (HERE / "golden" / f"{case}.txt").write_text(printed(arguments))
    for file, case in COPIED.items():
        (ROOT / "launch" / file).write_text(written(printed(CASES[case])))
