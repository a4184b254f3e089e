"""The exceptions that end in one line instead of a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Bad input: one line that names the matter and the remedy; the command line exits with 2."""


class OneRankError(InputError):
    """Bad input that showed on one process alone, which is therefore the one to say it."""


class InUseError(InputError):
    """Another process has what was asked for, and may let go of it."""


class RunFault(RuntimeError):
    """What a run could not go on after, such as a process that was lost, in one line; the command line exits with 1."""


def unknown_name(kind: str, name: object, known: Iterable[str], listing: str = "") -> InputError:
    """An `InputError` for a misspelt name that offers the nearest right ones.

    `listing` says where all names stand, for a list too long to print; without it all are printed.
    """
    names = list(dict.fromkeys(known))
    close = get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    everything = listing or f"known: {', '.join(names)}"
    return InputError(f"unknown {kind} {str(name)!r}{hint} ({everything})")
