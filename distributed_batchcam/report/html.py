"""One self-contained HTML file about one run or several, made from their run directories alone."""

import hashlib
import os
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distributed_batchcam import __version__
from distributed_batchcam.checkpoint import write_atomic
from distributed_batchcam.errors import InputError

from .one_run import one_run
from .run_files import RunFiles, find_runs, is_run, read_run
from .several_runs import Failure, several_runs
from .wording import path_text

DEFAULT_NAME = "report.html"
# What tells a report from any other file: only such a file is ever replaced.
GENERATOR = '<meta name="generator" content="distributed-batchcam report'
_GENERATOR_WITHIN = 4096  # bytes


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of a run directory; or of several, and of all run directories below a folder.

    Args:
        paths: run directories, or folders that hold some at any depth.
        output: the file; default: report.html in the run directory, for several in the current folder.

    Returns:
        The file. It is replaced only if it is a report.

    Raises:
        InputError: no finished run there, or an output that cannot be written.
    """
    if not paths:
        raise InputError("no run directory given: batchcam report RUN_DIR")
    single = len(paths) == 1 and is_run(paths[0])
    output = output or (paths[0] if single else Path()) / DEFAULT_NAME
    _check_output(output)
    page = _page_of_one(paths[0]) if single else _page_of_several(paths, output)
    try:
        # A lone surrogate from a file is no character that could be written.
        write_atomic(output, page.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"{path_text(output)} cannot be written: {error.strerror}") from error
    return output


def _page_of_one(path: Path) -> str:
    run = read_run(path)
    return _render("one_run.html", title=run.name, **one_run(run))


def _page_of_several(paths: Sequence[Path], output: Path) -> str:
    runs: list[RunFiles] = []
    failures = []
    for path in find_runs(paths):
        try:
            runs.append(read_run(path))
        except InputError as error:
            failures.append(Failure(path_text(path), str(error)))
    if not runs:
        raise InputError(
            f"none of these {len(failures)} runs is finished and readable; the first: {failures[0].reason}"
        )
    return _render("several_runs.html", title=f"{len(runs)} runs", **several_runs(runs, failures, output))


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise InputError(f"-o {path_text(output)} is a folder: name a file in it, such as {DEFAULT_NAME}")
    if not output.parent.is_dir():
        raise InputError(f"-o {path_text(output)}: there is no folder {path_text(output.parent)}, make it first")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"-o {path_text(output)}: the folder {path_text(output.parent)} is not writable")
    if not os.path.lexists(output):
        return
    if not output.is_file():
        raise InputError(f"-o {path_text(output)} exists and is not a file: choose another name")
    try:
        with output.open("rb") as file:
            start = file.read(_GENERATOR_WITHIN)
    except OSError as error:
        raise InputError(f"-o {path_text(output)} exists and cannot be read: {error.strerror}") from error
    if GENERATOR.encode() not in start:
        raise InputError(f"-o {path_text(output)} exists and is not a report: choose another name, or remove it")


# Page ----------------------------------------------------------------------------------------------------


def _render(template: str, **content: Any) -> str:
    style, script = _asset("report.css"), _asset("report.js") if template == "several_runs.html" else ""
    sources = {"default-src": "'none'", "img-src": "data:", "style-src": _hash(style), "base-uri": "'none'"}
    if script:
        sources["script-src"] = _hash(script)
    return (
        _environment()
        .get_template(template)
        .render(
            generator=Markup(f'{GENERATOR} {__version__}">'),  # noqa: S704 - no part of it is anybody's input
            policy="; ".join(f"{name} {source}" for name, source in {**sources, "form-action": "'none'"}.items()),
            style=Markup(style),  # noqa: S704 - a file of this package, as is the script
            script=Markup(script),  # noqa: S704
            version=__version__,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            **content,
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The source expression of an inline style or script: this text and no other may take effect."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
