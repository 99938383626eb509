"""What goes wrong, in the words of the person who can mend it, and the exit codes that say so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again and it goes on.
EXIT_ABORTED = 76  # Ended by what passes, a lost process or a storage that is away: resumable.

BACKGROUND = "vishwam-background"
"""Names threads whose work (compiling, say) is worth nothing to a process that has failed."""


class UserError(ValueError):
    """A mistake the user can mend: printed as problem, got, fix on one screen; exit code 2.

    Attributes:
        problem: what is wrong, one sentence.
        got: what was found instead (any object, shown by `str`), or None.
        fix: what to do about it, or None when the problem says it.
    """

    def __init__(self, problem: str, got: object = None, fix: str | None = None) -> None:
        self.problem, self.got, self.fix = problem, got, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.problem]
        if self.got is not None:
            lines.append(f"  got: {self.got}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple:
        return type(self), (self.problem, self.got, self.fix)


class Preempted(Exception):
    """The run was asked to stop, has saved, and can be resumed; exit code 75.

    Attributes:
        step: the step saved; None if the run had taken none yet.
        reason: who asked.
    """

    def __init__(self, step: int | None, reason: str) -> None:
        self.step, self.reason = step, reason
        where = "before the first step" if step is None else f"at step {step}"
        super().__init__(f"stopped {where} ({reason}); run the same command to resume")

    def __reduce__(self) -> tuple:
        return type(self), (self.step, self.reason)


class Resumable(Exception):
    """What ended the process passes: the same command goes on from a checkpoint; exit code 76."""


class PeersLost(Resumable):
    """Other processes of the run did not come, or are gone.

    Attributes:
        where: what was waited for.
        missing: numbers of the processes that are missing; () if unknown.
        message: all of it in words.
    """

    def __init__(self, where: str, missing: tuple[int, ...], message: str) -> None:
        self.where, self.missing, self.message = where, missing, message
        super().__init__(message)

    def __reduce__(self) -> tuple:
        return type(self), (self.where, self.missing, self.message)


def did_you_mean(word: str, choices: Iterable[str], limit: int = 3) -> str:
    """Returns "did you mean 'x' or 'y'?" for the names nearest to `word`, or ""."""
    by_lower = {str(choice).lower(): str(choice) for choice in choices}
    near = difflib.get_close_matches(str(word).lower(), by_lower, n=limit, cutoff=0.6)
    if not near:
        return ""
    return "did you mean " + " or ".join(repr(by_lower[name]) for name in near) + "?"


def one_of(word: str, choices: Iterable[str], what: str) -> str:
    """Returns `word` if it is among `choices`; otherwise raises `UserError` naming them.

    Args:
        word: the name given by the user.
        choices: the names that exist.
        what: what is being chosen, e.g. "remat policy".
    """
    names = list(choices)
    if word not in names:
        hint = did_you_mean(word, names)
        raise UserError(
            f"unknown {what}", got=repr(word),
            fix=(hint + " " if hint else "") + "one of: " + ", ".join(sorted(map(str, names))))
    return word
