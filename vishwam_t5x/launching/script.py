"""A plan is a bash script: what --dry-run prints is what is run, to the letter."""

from __future__ import annotations

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence

WIDTH = 100
_END = "END_OF_FILE"


class Raw(str):
    """A word that is shell already, e.g. '"$HOME"/env/bin/python'; never of a user's making."""


class Script:
    """Lines of bash, each built by a method that quotes what it is given."""

    def __init__(self, title: str) -> None:
        self._lines = ["#!/usr/bin/env bash"]
        self.comment(title)
        self._lines.append("set -euo pipefail")

    def comment(self, *paragraphs: str) -> None:
        """Adds comments, wrapped."""
        for text in paragraphs:
            self._lines += [f"# {line}" for line in textwrap.wrap(
                " ".join(text.split()), WIDTH - 2, break_long_words=False, break_on_hyphens=False)]

    def section(self, text: str) -> None:
        """Adds an empty line and a comment that says what comes next, and why."""
        self._lines.append("")
        self.comment(text)

    def command(self, words: Sequence[str], environment: Mapping[str, str] | None = None,
                exec_: bool = False) -> None:
        """Adds a command, on several lines if it is long.

        Args:
            words: program and arguments.
            environment: variables set for it alone.
            exec_: the shell becomes the command, so that signals reach it; nothing can follow.
        """
        self._lines.append(command_text(words, environment, exec_))

    def lines(self, text: str) -> None:
        """Adds bash as it is: for what is not made of anything a user gave."""
        self._lines += textwrap.dedent(text).strip("\n").splitlines()

    def write(self, path: str, text: str) -> None:
        """Adds the writing of a file, and of its folder."""
        end = _END
        while end in text:
            end += "_"
        if os.path.dirname(path):
            self.command(["mkdir", "-p", os.path.dirname(path)])
        self._lines.append(f"cat > {shlex.quote(path)} <<'{end}'")
        self._lines += [text.rstrip("\n"), end]

    def say(self, text: str) -> None:
        """Adds the printing of one line."""
        self.command(["echo", text])

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"

    def become(self) -> None:
        """Turns this process into the script; does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvp("bash", ["bash", "-c", str(self), "vishwam-launch"])


def quote(word: str) -> str:
    """Quotes a word for bash, unless it is `Raw`; keeps NAME= of a flag in sight."""
    if isinstance(word, Raw):
        return str(word)
    match = re.fullmatch(r"(--?[\w.-]+=)(.+)", word, re.S)
    return match[1] + shlex.quote(match[2]) if match else shlex.quote(word)


def command_text(words: Sequence[str], environment: Mapping[str, str] | None = None,
                 exec_: bool = False, indent: str = "  ") -> str:
    """Returns a command as bash; broken after every word that begins a flag if it is long."""
    parts = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    if exec_:
        parts = ["exec", *(["env", *parts] if parts else [])]
    parts += [quote(word) for word in words]
    text = " ".join(parts)
    if len(text) <= WIDTH:
        return text
    lines, line = [], parts[0]
    for part in parts[1:]:
        if part.startswith("-") or len(line) + len(part) + 3 > WIDTH:
            lines.append(line)
            line = indent + part
        else:
            line += f" {part}"
    return " \\\n".join([*lines, line])
