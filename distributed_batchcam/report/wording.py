"""Numbers and untrusted text as a report shows them."""

import os
import shlex
from pathlib import Path
from typing import Any

from distributed_batchcam.measures import FIGURES

MISSING = "–"
_LARGEST = 1e100
_PERCENT = {"accuracy", "top5_accuracy", "ece", "average_drop", "average_increase"}
_COUNTS = {"constant_maps"}


def number(value: Any) -> float | None:
    """A number as it is, None for anything else that a JSON file may hold in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # NaN is in no range, and beyond this one nothing can be plotted.
    return float(value) if -_LARGEST < value < _LARGEST else None


def printable(value: Any, limit: int = 200) -> str:
    """Text on one line, without control characters, direction overrides and halves of characters."""
    if not isinstance(value, str):
        return MISSING if number(value) is None else f"{value:.6g}"
    kept = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in value[:limit])
    return kept + "…" if len(value) > limit else kept


def path_text(path: Path) -> str:
    """A path, even one whose bytes are not UTF-8."""
    return printable(os.fsencode(path).decode("utf-8", "replace"), limit=1000)


def quoted(path: Path) -> str:
    """A path as a shell wants it."""
    return shlex.quote(path_text(path))


def plain(value: float | None, digits: int = 3) -> str:
    """`digits` decimals; three significant figures where that would leave nothing but zeros."""
    if value is None:
        return MISSING
    if value != 0 and abs(value) < 10.0**-digits:
        return f"{value:.2e}".replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def figure_text(name: str, value: float | None) -> str:
    """A figure of `FIGURES` with its unit."""
    if value is None:
        return MISSING
    if name in _COUNTS:
        return f"{value:,.0f}"
    return f"{plain(value, 2)} %" if name in _PERCENT else plain(value)


def similarity_text(value: float | None) -> str:
    """An SSIM below a picture: two decimals, and no negative zero."""
    return MISSING if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def figure_title(name: str) -> str:
    """A figure's title with its unit, for axes and table headers."""
    return FIGURES[name].title + (", %" if name in _PERCENT else "")


def bare_figure_text(name: str, value: float | None) -> str:
    """A figure of `FIGURES` where its header says the unit."""
    return figure_text(name, value).removesuffix(" %")


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return MISSING
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float | None) -> str:
    """A whole number."""
    return MISSING if value is None else f"{value:,.0f}"
