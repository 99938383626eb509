#!/usr/bin/env python3
"""Restarts a training command as long as that helps: see vishwam_t5x/launching/supervise.py.

    python launch/supervise.py -- vishwam train --gin_file=... --gin.MODEL_DIR='"runs/my_run"'

Needs the standard library alone. The same from an installed package:
python -m vishwam_t5x.launching.supervise.
"""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    runpy.run_path(str(ROOT / "vishwam_t5x" / "launching" / "supervise.py"), run_name="__main__")
