"""The fault suite in short: every kind of fault, a few of each. `make faults` tries them by the thousand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment


@pytest.mark.slow
def test_a_few_faults_of_each_kind_are_survived(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "faults", "--short", "--out", str(tmp_path / "figures.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment())
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert len(found) == 19
    for figures in found:
        assert figures["tried"] > 0 or figures["note"].startswith("not tried")
        assert figures["survived"] == figures["tried"], figures["failures"]
