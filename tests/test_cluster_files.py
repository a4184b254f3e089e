"""The files to launch with are what Accelerate reads, and the README's lines name them rightly."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from launching import ROOT

FILES = sorted((ROOT / "cluster/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_accelerate_reads_the_file(file: Path) -> None:
    config = load_config_from_file(str(file))  # refuses unknown keys
    assert config.mixed_precision == "no", "the run's own --precision decides"
    assert not config.use_cpu, "accelerate starts one process where the file says CPU"
    assert (config.num_processes > 1) == (config.distributed_type.value == "MULTI_GPU")


def test_several_nodes_meet_at_the_first_ones_address() -> None:
    config = load_config_from_file(str(ROOT / "cluster/accelerate/several_nodes.yaml"))
    assert (config.num_machines, config.machine_rank, config.rdzv_backend) == (2, 0, "static")
    assert config.main_process_ip
    assert config.main_process_port


def test_every_file_has_its_line_in_the_readme() -> None:
    named = set(re.findall(r"cluster/accelerate/\w+\.yaml", (ROOT / "README.md").read_text()))
    assert named == {str(file.relative_to(ROOT)) for file in FILES}
