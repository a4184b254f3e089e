"""The fault suite in short: every kind of fault, a few of each. `make faults` tries them by the thousand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment

KINDS = ["kills", "pairs", "writes", "space", "damage", "disks", "stops", "hangs", "fuzz"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_faults_of_each_kind_are_survived(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "faults", "--short", "--only", kind, "--out", str(tmp_path / "figures.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment())
    assert result.returncode == 0, result.stderr
    for figures in json.loads((tmp_path / "figures.json").read_text()):
        if figures["note"].startswith("not tried"):
            pytest.skip(figures["note"])
        assert figures["tried"] > 0
        assert figures["survived"] == figures["tried"], figures["failures"]
