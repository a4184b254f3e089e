"""The files of `ray up` are what Ray's launcher and the cloud's own interface read, and their commands work."""

import functools
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch_files import CLUSTER, DOCUMENTS, assert_shell_is_sound, needed_to_install, shell_lines
from launching import ROOT

pytest.importorskip("ray", reason="ray is not installed (the tune extra brings it)")

FILES = sorted((CLUSTER / "ray").glob("*.yaml"))
COMMANDS = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def validate(config: dict[str, Any]) -> None:
    """As `ray up` does before it calls a cloud. (There is no public door to it.)"""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


@each_file
def test_rays_schema_takes_the_file(file: Path) -> None:
    validate(read(file))


def test_rays_schema_refuses_a_misspelt_key() -> None:
    with pytest.raises(Exception, match="idle_timeout"):
        validate({**read(FILES[0]), "idle_timeout": 5})


def enumerations(value: Any, shape: Any, where: str = "") -> Iterator[str]:
    """Values that are not among those that the service model lists: botocore itself does not look."""
    if shape.type_name == "structure":
        for name in value.keys() & shape.members.keys():
            yield from enumerations(value[name], shape.members[name], f"{where}.{name}")
    elif shape.type_name == "list":
        for item in value:
            yield from enumerations(item, shape.member, where)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{where}: {value}"


def ec2_complaints(node_config: dict[str, Any]) -> list[str]:
    """What EC2's RunInstances would not take of a node's configuration: Ray hands it on unread."""
    session = pytest.importorskip("botocore.session", reason="botocore is not installed (the aws extra brings it)")
    from botocore.validate import ParamValidator

    shape = session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    request = {**node_config, "MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(request, shape).generate_report()
    return report.splitlines() + list(enumerations(request, shape))


@pytest.mark.parametrize("node", ["head", "gpu_worker"])
def test_ec2_knows_what_the_aws_file_asks_of_it(node: str) -> None:
    assert ec2_complaints(read(CLUSTER / "ray/aws.yaml")["available_node_types"][node]["node_config"]) == []


def test_ec2_complains_of_what_it_does_not_know() -> None:
    assert len(ec2_complaints({"InstanceTypo": "g6.2xlarge"})) == 1
    assert ec2_complaints({"InstanceType": "g6.2xlarg"}) == [".InstanceType: g6.2xlarg"]


@functools.cache
def compute_schemas() -> dict[str, Any]:
    """Google's own description of Compute Engine, as its client ships it."""
    cache = pytest.importorskip(
        "googleapiclient.discovery_cache", reason="google-api-python-client is not installed (the gcp extra brings it)"
    )
    return json.loads(cache.get_static_doc("compute", "v1"))["schemas"]


def compute_complaints(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """What of `value` does not fit the schema; instances.insert takes what fits `Instance`."""
    schema = compute_schemas()[schema["$ref"]] if "$ref" in schema else schema
    kind = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}[schema["type"]]
    # 64-bit numbers travel as strings; JSON numbers are taken as well.
    if not isinstance(value, kind) and not (schema.get("format") == "int64" and isinstance(value, int)):
        yield f"{where}: {value!r} is no {schema['type']}"
    elif kind is list:
        for item in value:
            yield from compute_complaints(item, schema["items"], where)
    elif kind is dict:
        for name, inner in value.items():
            if name in schema["properties"]:
                yield from compute_complaints(inner, schema["properties"][name], f"{where}.{name}")
            else:
                yield f"{where}: no {name}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value}"


INSTANCE = {"$ref": "Instance"}


@pytest.mark.parametrize("node", ["head", "gpu_worker"])
def test_compute_engine_knows_what_the_gcp_file_asks_of_it(node: str) -> None:
    config = read(CLUSTER / "ray/gcp.yaml")["available_node_types"][node]["node_config"]
    assert list(compute_complaints(config, INSTANCE)) == []


def test_compute_engine_complains_of_what_it_does_not_know() -> None:
    wrong = {"machineTypo": "g2", "scheduling": {"provisioningModel": "CHEAP"}, "disks": [{"boot": "yes"}]}
    assert len(list(compute_complaints(wrong, INSTANCE))) == 3


@each_file
def test_nodes_get_all_that_the_project_is_installed_from(file: Path) -> None:
    mounts = read(file)["file_mounts"]
    code = {local: remote for remote, local in mounts.items() if not local.startswith("~")}
    assert set(code) == needed_to_install()
    assert all(remote == f"~/batchcam/{local}" for local, remote in code.items())
    # Where `ray start` looks for the token with which nodes know each other.
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"


@each_file
def test_shell_commands_are_sound(file: Path) -> None:
    config = read(file)
    for command in (command for key in COMMANDS for command in config.get(key, [])):
        if "bashrc" not in command:  # '$HOME' is written there for a later shell
            assert_shell_is_sound(command, RAY_HEAD_IP="192.0.2.1")


@each_file
def test_ray_start_takes_every_option_asks_for_the_token_and_shows_the_dashboard_on_loopback(file: Path) -> None:
    from ray.scripts.scripts import start

    config = read(file)
    for role in ("head", "worker"):
        line = next(command for command in config[f"{role}_start_ray_commands"] if "ray start" in command)
        before, after = line.split("ray start")
        assert "RAY_AUTH_MODE=token" in before
        options = start.make_context("start", shlex.split(after)).params
        assert options["head"] == (role == "head")
        assert options["dashboard_host"] == "127.0.0.1"


@each_file
def test_setup_commands_install_the_project_and_may_run_twice(file: Path, tmp_path: Path) -> None:
    config = read(file)
    (tmp_path / "batchcam").mkdir()
    (tmp_path / "bin").mkdir()
    # Only these three would change the machine or take minutes.
    stand_in = {
        "sudo": "#!/bin/sh\n",
        "python3": '#!/bin/sh\n[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && cp "$HOME/bin/pip" "$3/bin/pip"\n',
        "pip": '#!/bin/sh\necho "$PWD" "$@" >> "$HOME/pip.log"\n',
    }
    for name, script in stand_in.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for command in config["setup_commands"] * 2:
        subprocess.run(["bash", "-c", command], check=True, env=environment, cwd=tmp_path)
    assert (tmp_path / ".bashrc").read_text().count("/batchcam/.venv/bin:") == 1
    folder, *arguments = (tmp_path / "pip.log").read_text().splitlines()[0].split()
    assert folder == str(tmp_path / "batchcam")
    assert "--constraint constraints.txt" in " ".join(arguments)
    extras = re.fullmatch(r"\.\[(.*)\]", arguments[-1])
    assert extras is not None
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"tune", "wandb"} <= set(extras[1].split(",")) <= set(known)


@pytest.mark.parametrize(
    "line", [line for document in DOCUMENTS for line in shell_lines(document) if line.startswith("ray ")]
)
def test_ray_takes_the_documented_line(line: str) -> None:
    from ray.scripts.scripts import cli

    command, *arguments = shlex.split(line, comments=True)[1:]
    parsed = cli.commands[command].make_context(
        command, arguments[: arguments.index(">")] if ">" in arguments else arguments
    )
    for value in parsed.params.values():
        if isinstance(value, str) and re.fullmatch(r"(cluster|tune)/[\w/]+\.(yaml|py)", value):
            assert (ROOT / value).exists()
