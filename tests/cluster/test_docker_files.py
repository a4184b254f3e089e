"""The Dockerfile is linted, its shell is run as far as no engine is needed, and what it copies is enough."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from launch_files import CLUSTER, needed_to_install, tool
from launching import ROOT

DOCKERFILE = CLUSTER / "docker/Dockerfile"


def instructions(name: str) -> list[str]:
    """What stands behind each instruction of this name, continuation lines joined as Docker does."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    return re.findall(rf"^{name} (.*)$", "\n".join(lines).replace("\\\n", ""), re.MULTILINE)


def copied() -> set[str]:
    return {source for line in instructions("COPY") for source in line.split()[:-1]}


def run_in_shell(command: str, folder: Path, **environment: str) -> list[list[str]]:
    """Run an instruction with a pip that notes its arguments; returns those of each call."""
    (folder / "pip").write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]), file=open('pip.log', 'a'))\n"
    )
    (folder / "pip").chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["sh", "-c", command], cwd=folder, check=True, env={**os.environ, **environment, "PATH": path})
    return [json.loads(line) for line in (folder / "pip.log").read_text().splitlines()]


def test_hadolint_has_nothing_to_say() -> None:
    checked = subprocess.run([tool("hadolint"), str(DOCKERFILE)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_image_gets_all_that_the_project_is_installed_from() -> None:
    assert copied() == needed_to_install()


def test_nothing_but_what_is_copied_is_sent_to_the_builder() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied()
    assert rules[-1] == "**/__pycache__"


def test_the_container_does_not_run_as_root() -> None:
    assert instructions("USER")[-1] == "1000"
    assert "useradd --uid 1000" in instructions("RUN")[0]


@pytest.mark.parametrize(("index", "options"), [("", []), ("https://torch.example/cpu", ["--index-url"])])
def test_the_build_argument_chooses_where_torch_comes_from(index: str, options: list[str], tmp_path: Path) -> None:
    command = next(line for line in instructions("RUN") if "TORCH_INDEX" in line)
    expected = ["install", *options, *([index] if index else []), "torch", "torchvision"]
    assert run_in_shell(command, tmp_path, TORCH_INDEX=index) == [expected]


def test_dependencies_are_installed_before_the_sources_come(tmp_path: Path) -> None:
    command = next(line for line in instructions("RUN") if "requirements.txt" in line)
    default = next(line for line in instructions("ARG") if line.startswith("EXTRAS")).partition("=")[2].strip('"')
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert run_in_shell(command, tmp_path, EXTRAS=default) == [["install", "--requirement", "requirements.txt"]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = [
        *project["dependencies"],
        *(need for extra in default.split() for need in project["optional-dependencies"][extra]),
    ]
    assert (tmp_path / "requirements.txt").read_text().splitlines() == expected
    text = DOCKERFILE.read_text()
    assert text.index("--requirement requirements.txt") < text.index("COPY distributed_batchcam")


@pytest.mark.slow
def test_what_is_copied_is_enough_to_install_and_to_run(tmp_path: Path) -> None:
    context, target = tmp_path / "context", tmp_path / "target"
    context.mkdir()
    for name in copied():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, context)
    install = [*(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")]
    # Without the network: setuptools is the one installed here.
    install += ["--no-deps", "--no-build-isolation", "--target", str(target), str(context)]
    subprocess.run(install, check=True, cwd=tmp_path)
    for package in (name for name in copied() if (ROOT / name).is_dir()):
        files = {file.relative_to(context) for file in (context / package).rglob("*") if file.is_file()}
        assert {file for file in files if not (target / file).exists()} == set()
    entrypoint = json.loads(instructions("ENTRYPOINT")[0])
    assert (target / "bin" / entrypoint[0]).exists()
    said = subprocess.run(
        [sys.executable, str(target / "bin" / entrypoint[0]), *json.loads(instructions("CMD")[0])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert said.returncode == 0, said.stderr
    assert "train" in said.stdout
