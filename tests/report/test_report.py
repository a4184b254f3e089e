"""The report from run directories: what it says, what it refuses, and what damaged files do to it."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from synthetic_runs import FIGURES, write_evaluation, write_run

from distributed_batchcam.cli import run
from distributed_batchcam.errors import InputError
from distributed_batchcam.report import paper, plots
from distributed_batchcam.report.html import write_report
from distributed_batchcam.report.several_runs import pareto_front
from distributed_batchcam.report.wording import bare_figure_text, duration, figure_text, number, plain, printable


def text_of(report: Path) -> str:
    """A report's text, without its markup, pictures, styles and scripts."""
    page = re.sub(r"(?s)<(style|script)>.*?</\1>", "", report.read_text(encoding="utf-8"))
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_report_stands_in_the_run_directory_and_replaces_only_reports(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    assert write_report([run_dir]) == run_dir / "report.html"
    first = (run_dir / "report.html").read_text(encoding="utf-8")
    write_report([run_dir])
    second = (run_dir / "report.html").read_text(encoding="utf-8")
    made = re.compile(r"Made \d{4}-\d\d-\d\d \d\d:\d\d UTC by")
    assert len(made.findall(first)) == 1
    assert made.sub("", first) == made.sub("", second)


def test_report_of_several_stands_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "sweep/a/trial")
    write_run(tmp_path / "sweep/b/trial", figures={"accuracy": 91.5})
    monkeypatch.chdir(tmp_path)
    assert run(["report", "sweep"]) == 0
    text = text_of(tmp_path / "report.html")
    assert "a/trial" in text
    assert "91.50" in text
    # The same run twice is one run.
    assert "2 runs" in text_of(write_report([Path("sweep"), Path("sweep/a/trial")]))


def test_file_depends_on_nothing_outside_and_its_policy_forbids_it(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in "ab"]
    for report in (write_report(runs[:1]), write_report(runs, tmp_path / "report.html")):
        page = report.read_text(encoding="utf-8")
        assert "default-src 'none'; img-src data:; style-src 'sha256-" in page.replace("&#39;", "'")
        assert "unsafe" not in page
        assert set(re.findall(r'(?:src|href)="([^"#][^:"]*)[:"]', page)) <= {"data", "./a/report.html"}
        assert not re.search(r'\sstyle="|<(?:link|iframe|object|base)\b|@import|url\((?!#)', page)


# What it says --------------------------------------------------------------------------------------------


def test_report_tells_what_is_missing_and_the_command_that_makes_it(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "my run", evaluated=False)
    command = f"batchcam evaluate &#39;{run_dir}&#39;"
    assert command in text_of(write_report([run_dir]))
    write_evaluation(run_dir, ("a", "b"), {**FIGURES, "relevance_mass": None, "insertion_auc": None})
    text = text_of(write_report([run_dir]))
    assert f"Figures that are independent evidence have not been measured. Measure with {command}" in text
    write_evaluation(run_dir, ("a", "b"), FIGURES)
    (run_dir / "metrics.jsonl").unlink()
    text = text_of(write_report([run_dir]))
    assert "evaluate" not in text
    assert "No learning curves" in text


def test_closeness_to_prototypes_is_said_to_be_no_independent_evidence(tmp_path: Path) -> None:
    trained = text_of(write_report([write_run(tmp_path / "a")]))
    assert "Closeness to prototypes: no independent evidence These are what the objectives optimise." in trained
    baseline = text_of(write_report([write_run(tmp_path / "b", objective="baseline")]))
    assert "This run did not optimise them" in baseline
    # λ of a run without a loss on the explanations is nothing.
    assert "λ = 0.1" in trained
    assert "λ =" not in baseline


def test_figures_of_every_evaluated_set_stand_side_by_side(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    write_evaluation(run_dir, ("a", "b"), {**FIGURES, "accuracy": 12.34}, split="decoy-test")
    text = text_of(write_report([run_dir]))
    assert "Figure test decoy test Better" in text
    assert "Accuracy 90.00 % 12.34 % higher" in text


def test_many_classes_show_the_least_accurate_and_a_picture_of_the_confusion(tmp_path: Path) -> None:
    classes = tuple(f"class {index}" for index in range(60))
    run_dir = write_run(tmp_path / "run", classes=classes)
    document = json.loads((run_dir / "evaluation-test.json").read_text())
    document["per_class"][59]["accuracy"] = 1.0
    (run_dir / "evaluation-test.json").write_text(json.dumps(document))
    page = write_report([run_dir]).read_text(encoding="utf-8")
    assert "The 48 least accurate of 60 classes." in page
    assert 'alt="class 59: prototype"' in page
    assert 'alt="class 58: prototype"' not in page
    assert 'alt="confusion of 60 classes"' in page


def test_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    once = write_report([run_dir]).read_text(encoding="utf-8")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    # Killed within epoch 3, begun again; the first attempt wrote other figures, and half a line.
    other = lines[6].replace('"loss": ', '"loss": 7')
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines[:6], other, *lines[6:], '{"step": 3']) + "\n")
    assert (
        once.split("Learning curves")[2]
        == write_report([run_dir]).read_text(encoding="utf-8").split("Learning curves")[2]
    )


def test_accuracy_of_the_paper_stands_beside_ours(tmp_path: Path) -> None:
    write_run(tmp_path / "s/same", figures={"accuracy": 99.5})
    write_run(tmp_path / "s/other", image_size=64)
    page = write_report([tmp_path / "s"], tmp_path / "report.html").read_text(encoding="utf-8")
    rows = {row[1]: row[0] for row in re.findall(r'(<tr id="run-\d+".*?>(same|other)</a>.*?</tr>)', page)}
    assert 'data-value="99.0">99.00</td><td class="number" data-value="0.5">+0.50</td>' in rows["same"]
    assert 'data-value="">–</td><td class="number" data-value="">–</td>' in rows["other"]


def test_options_that_differ_are_columns_and_what_all_share_is_said_once(tmp_path: Path) -> None:
    for name, lr in (("a", 0.001), ("b", 0.01)):
        run_dir = write_run(tmp_path / "s" / name)
        (run_dir / "config.yaml").write_text(f"lr: {lr}\nbatch_size: 64\nworkers: {len(name)}\n")
    text = text_of(write_report([tmp_path / "s"], tmp_path / "report.html"))
    assert "In all of them: mnist, simple_cnn, bcpl_l1, images of 28×28 pixels, 3 epochs, seed 0." in text
    assert "Run λ lr Accuracy, %" in text
    assert "0.01" in text


def test_table_of_the_paper_is_whole() -> None:
    lines = Path(paper.__file__).with_name("paper_accuracy.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert len(rows) == 46
    assert paper.paper_accuracy(paper.Setting("convnextv2_tiny", "fashion_mnist", "bcpl_l1", 112)) == 95.01
    assert paper.paper_accuracy(paper.Setting("simple_cnn", "mnist", "pl_l1", 28)) == 98.75
    assert paper.paper_accuracy(paper.Setting("simple_cnn", "mnist", "pl_l1", 56)) is None


def test_pareto_front_holds_what_no_other_point_beats() -> None:
    random = np.random.default_rng(0)
    points = [tuple(map(float, pair)) for pair in random.integers(0, 12, (60, 2))]
    front = pareto_front(points)
    for index, (x, y) in enumerate(points):
        beaten = False
        for u, v in points:
            if (u > x and v >= y) or (u >= x and v > y):
                beaten = True
        assert front[index] is not beaten
    assert pareto_front([(1.0, 1.0), (1.0, 1.0)]) == [True, True]


def test_numbers_and_texts_read_as_people_write_them() -> None:
    assert [plain(value) for value in (None, 0.0, 1234.5678, -0.5, 0.00012)] == [
        "–",
        "0.000",
        "1,234.568",
        "−0.500",
        "1.20e−04",
    ]
    assert figure_text("accuracy", 99.174) == "99.17 %"
    assert bare_figure_text("accuracy", 99.174) == "99.17"
    assert figure_text("constant_maps", 3.0) == "3"
    assert [duration(value) for value in (None, 4.52, 150.0, 8000.0)] == ["–", "4.5 s", "2 min", "2 h 13 min"]
    assert [number(value) for value in (True, "1", None, float("nan"), 10**400, [1], 3)] == [None] * 6 + [3.0]
    assert printable("a\nb\u202ec\ud800" + "x" * 300, limit=8) == "a�b�c�xx…"


def test_plots_have_no_styles_no_dates_and_ids_of_their_own() -> None:
    lines = [plots.Line("train", [1, 2], [3, 4])]
    first, second = plots.curves("first", "a < b", lines), plots.curves("second", "c", lines)
    assert plots.curves("first", "a < b", lines) == first
    ids = [set(re.findall(r'\bid="([^"]+)"', plot)) for plot in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for plot, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', plot)) <= {(name, "") for name in own} | {
            ("", name) for name in own
        }
        assert "style" not in plot
        assert not re.search(r"#0[0-9]0[0-9]0[0-9]", plot)  # every stand-in has become a colour of the page
    assert 'aria-label="a &lt; b"' in first


# What it refuses -----------------------------------------------------------------------------------------


def refused(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["report", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("batchcam: error: ")
    assert said.count("\n") == 1
    return said


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped/config.yaml").write_text("dataset: mnist\n")
    assert "does not exist: name a run directory" in refused(tmp_path / "nowhere", capsys=capsys)
    assert "is a file: name a run directory" in refused(tmp_path / "file", capsys=capsys)
    assert "is not a run directory and holds none" in refused(tmp_path / "empty", capsys=capsys)
    assert "unfinished run: no summary.json (batchcam train" in refused(tmp_path / "stopped", capsys=capsys)
    said = refused(tmp_path, "-o", tmp_path / "r.html", capsys=capsys)
    assert "none of these 1 runs is finished and readable; the first:" in said
    assert refused(capsys=capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "stopped"]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: path.mkdir(), "is a folder: name a file in it"),
        (lambda path: path.write_text("<html>my own page</html>"), "exists and is not a report"),
        (lambda path: path.write_bytes(b""), "exists and is not a report"),
        (lambda path: path.symlink_to("nowhere"), "exists and is not a file"),
        (lambda path: os.mkfifo(path), "exists and is not a file"),
    ],
    ids=["folder", "page", "empty", "broken link", "pipe"],
)
def test_nothing_but_a_report_is_overwritten(
    make: Callable[[Path], Any], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, output = write_run(tmp_path / "run"), tmp_path / "out.html"
    make(output)
    before = _untouched(output)
    assert complaint in refused(run_dir, "-o", output, capsys=capsys)
    assert _untouched(output) == before
    assert "there is no folder" in refused(run_dir, "-o", tmp_path / "no/out.html", capsys=capsys)


def _untouched(path: Path) -> tuple[int, ...]:
    """What a write would change; to be read, as a page is to see what it is, changes the time of access alone."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


# Damaged files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"test_accuracy": NaN}'])
def test_damaged_summary_is_one_line_and_in_a_sweep_a_reason(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "s/good")
    (write_run(tmp_path / "s/bad") / "summary.json").write_bytes(content)
    assert "summary.json" in refused(tmp_path / "s/bad", capsys=capsys)
    text = text_of(write_report([tmp_path / "s"], tmp_path / "report.html"))
    assert "Not in the table: " in text
    assert "bad/summary.json" in text


@pytest.mark.parametrize(
    ("file", "content", "note"),
    [
        ("evaluation-test.json", b"{", "evaluation-test.json is damaged: it is not JSON"),
        ("evaluation-test.json", b'{"samples": -1}', "evaluation-test.json is damaged: samples"),
        ("evaluation-test.safetensors", b"\x00" * 20, "evaluation-test.safetensors is damaged"),
        ("evaluation-test.safetensors", None, "evaluation-test.safetensors is missing"),
        ("metrics.jsonl", b"nothing\n[1, 2]\n", "metrics.jsonl has no line of metrics"),
        ("config.yaml", b"a: [", "config.yaml is damaged: it is not YAML"),
        ("config.yaml", b"- 1", "config.yaml is damaged: it does not hold options"),
    ],
)
def test_other_damaged_files_are_named_in_the_report(
    file: str, content: bytes | None, note: str, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / file).unlink()
    if content is not None:
        (run_dir / file).write_bytes(content)
    text = text_of(write_report([run_dir]))
    assert note in text
    assert "90.00 %" in text


@pytest.mark.parametrize(
    ("entry", "value", "note"),
    [
        ("confusion", [[1, 2], [3]], "confusion is not a table"),
        ("per_class", [{}], "per_class is not a list of all classes"),
        ("mistakes", [{"index": 0, "target": 9, "predicted": 0, "confidence": 0.5}], "mistakes name a class"),
        (
            "calibration",
            [{"low": 0, "high": 2, "samples": 1, "confidence": 0.1, "accuracy": 0.1}],
            "calibration.0.high",
        ),
        ("classes", [], "classes"),
    ],
)
def test_evaluation_that_contradicts_itself_is_not_believed(entry: str, value: Any, note: str, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    file = run_dir / "evaluation-test.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), entry: value}))
    assert note in text_of(write_report([run_dir]))


@pytest.mark.parametrize("name", ["class_maps", "counts_wrong", "mistake_images", "mistake_maps_target"])
@pytest.mark.parametrize("change", ["dropped", "cut", "flat", "nan"])
def test_tensors_that_do_not_fit_cost_their_pictures_alone(name: str, change: str, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    file = run_dir / "evaluation-test.safetensors"
    tensors = load_file(file)
    if change == "dropped":
        del tensors[name]
    else:
        made = {"cut": lambda t: t[:1], "flat": lambda t: t.reshape(len(t), -1, 1, 1, 1), "nan": lambda t: t * np.nan}
        tensors[name] = np.ascontiguousarray(made[change](tensors[name].astype(np.float32)))
    save_file(tensors, file)
    text = text_of(write_report([run_dir]))
    lost = "No class maps: " if "class" in name or "counts" in name else "No pictures of mistakes: "
    assert (lost in text) == (change != "nan")
    assert "Accuracy per class" in text


ODD = st.sampled_from(
    [None, True, -1, 10**400, 1e308, float("nan"), "<b>\ud800\u202e", [], {}, [[]], {"a": 1}, "1", [None]]
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_odd_value_anywhere_is_a_traceback(data: st.DataObject, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    run_dir = write_run(tmp_path / "run")
    file = run_dir / data.draw(st.sampled_from(["summary.json", "evaluation-test.json", "metrics.jsonl"]))
    lines = file.read_text().splitlines()
    place = data.draw(st.integers(0, len(lines) - 1))
    document = json.loads(lines[place])
    # Down to any depth: an odd value in the place of one that belongs there.
    at: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not at[key] or not isinstance(at[key], dict | list) or data.draw(st.booleans()):
            at[key] = data.draw(ODD)
            break
        at = at[key]
    lines[place] = json.dumps(document)
    file.write_text("\n".join(lines))
    for runs in ([run_dir], [tmp_path]):
        with suppress(InputError):  # the summary, then
            write_report(runs, tmp_path / "report.html")


def test_path_that_is_not_utf8_is_shown_as_well_as_can_be(tmp_path: Path) -> None:
    run_dir = write_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9t\xe9")))
    assert "�" in text_of(write_report([run_dir]))
    write_report([tmp_path], tmp_path / "report.html")
