"""The files to launch with are what Accelerate reads, and the documents' lines name them rightly."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from launch_files import CLUSTER, DOCUMENTS, shell_lines
from launching import ROOT

FILES = sorted((CLUSTER / "accelerate").glob("*.yaml"))
DOCUMENTED = [line for document in DOCUMENTS for line in shell_lines(document) if "accelerate launch" in line]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_accelerate_reads_the_file(file: Path) -> None:
    config = load_config_from_file(str(file))  # refuses unknown keys
    assert config.mixed_precision == "no", "the run's own --precision decides"
    assert not config.use_cpu, "accelerate starts one process where the file says CPU"
    assert (config.num_processes > 1) == (config.distributed_type.value == "MULTI_GPU")


@pytest.mark.parametrize("name", ["cpu_gloo", "one_node"])
def test_runs_beside_each_other_on_one_machine_share_no_port(name: str) -> None:
    assert load_config_from_file(str(CLUSTER / f"accelerate/{name}.yaml")).main_process_port == 0


def test_several_nodes_meet_at_the_first_ones_address() -> None:
    config = load_config_from_file(str(CLUSTER / "accelerate/several_nodes.yaml"))
    assert (config.num_machines, config.machine_rank, config.rdzv_backend) == (2, 0, "static")
    assert config.main_process_ip
    assert config.main_process_port


@pytest.mark.parametrize("line", DOCUMENTED)
def test_accelerate_reads_the_documented_line(line: str) -> None:
    words = shlex.split(line)
    arguments = launch_command_parser().parse_args(words[words.index("launch") + 1 :])
    assert (arguments.module, arguments.training_script) == (True, "distributed_batchcam")
    assert arguments.config_file is None or (ROOT / arguments.config_file).exists()


def test_every_file_has_its_line_in_the_readme() -> None:
    named = set(re.findall(r"cluster/accelerate/\w+\.yaml", (ROOT / "README.md").read_text()))
    assert named == {str(file.relative_to(ROOT)) for file in FILES}
