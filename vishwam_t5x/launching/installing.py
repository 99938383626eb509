"""How the package gets onto another machine."""

from __future__ import annotations

import os
import re
import shlex

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.launching.script import Script

PROJECT = "vishwam_t5x"


def requirement(install: str, extras: str, folder: str = "") -> str:
    """Returns what pip is asked for.

    Args:
        install: "" for the released package; a wheel of this machine, copied to `folder` there; or
            a requirement with a version or an address, e.g. 'vishwam_t5x==0.1.0' or a git URL.
        extras: names of extras, with commas.
        folder: where a wheel lies there.

    Raises:
        UserError: `install` is neither.
    """
    if not install:
        return f"{PROJECT}[{extras}]"
    if install.endswith(".whl"):
        if not os.path.isfile(install):
            raise UserError("--install names no wheel", got=install,
                            fix="pip wheel --no-deps . makes one")
        return f"{folder}/{os.path.basename(install)}[{extras}]".lstrip("/")
    if install.startswith(("git+", "https://")):
        return f"{PROJECT}[{extras}] @ {install}"
    if match := re.fullmatch(r"vishwam[_-]t5x((==|>=|~=|<|>).+)?", install):
        return f"{PROJECT}[{extras}]{match[1] or ''}"
    raise UserError("--install is a wheel, an address or a version", got=repr(install),
                    fix="e.g. dist/vishwam_t5x-0.1.0-py3-none-any.whl, git+https://…, "
                        "vishwam_t5x==0.1.0")


def look(script: Script, install: str, extras: str) -> None:
    """Adds bash that ends the script where pip cannot find what the machines shall install.

    Args:
        script: gets it, before the machines are asked for.
        install: as of `requirement`.
        extras: names of extras, with commas.
    """
    if install.endswith(".whl"):
        return  # It is here, and is sent.
    wanted = shlex.quote(requirement(install, extras))
    script.section("Can what the machines shall install be found? They cost money from when they "
                   "are there.")
    script.lines("if ! python3 -m pip --version > /dev/null 2>&1; then")
    script.say("not looked, for python3 has no pip here")
    script.lines("elif ! python3 -m pip install --dry-run --no-deps --ignore-installed "
                 f"--ignore-requires-python \\\n  --quiet {wanted}; then")
    script.lines("""
        echo 'pip finds no such package' >&2
        echo '  fix: --install=WHEEL ("pip wheel --no-deps ." makes one), or another version' >&2
        exit 1
        fi""")


def uv_install(install: str, folder: str, extras: str) -> str:
    """Returns bash that makes "$HOME"/vishwam-env once and installs the package into it.

    Args:
        install: as of `requirement`.
        folder: where a wheel lies, below the home folder.
        extras: names of extras, with commas.
    """
    wanted = shlex.quote(requirement(install, extras, folder))
    uv, environment = '"$HOME"/.local/bin/uv', '"$HOME"/vishwam-env'
    return ("python3 -m pip install --quiet --user uv && "
            f"{{ [ -x {environment}/bin/python ] || {uv} venv --python 3.12 {environment}; }} && "
            f"{uv} pip install --quiet --python {environment}/bin/python {wanted}")
