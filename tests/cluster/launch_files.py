"""What several tests of cluster/ need: its files, its shell checker, and the command lines its documents show."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from launching import ROOT
from setuptools import find_packages

CLUSTER = ROOT / "cluster"
DOCUMENTS = (ROOT / "README.md", CLUSTER / "README.md")


def needed_to_install() -> set[str]:
    """What of the checkout a node or an image needs so that pip can install the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = find_packages(str(ROOT), include=project["tool"]["setuptools"]["packages"]["find"]["include"])
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    return files | {package for package in packages if "." not in package}


def shell_lines(document: Path) -> list[str]:
    """The command lines of a document's `sh` blocks, continuation lines joined, comments left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def tool(name: str) -> str:
    """Where a linter's program is; without it the test is skipped."""
    beside_python = Path(sys.executable).with_name(name)
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (the dev extra brings it)")
    return found


def assert_shell_is_sound(script: str, **names: str) -> None:
    """bash parses it, and shellcheck has nothing to say; `names` are variables that somebody else sets."""
    script = "".join(f"export {name}={value}\n" for name, value in names.items()) + script
    parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    checked = subprocess.run([tool("shellcheck"), "--shell=bash", "-"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
