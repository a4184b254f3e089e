"""The report in a real browser: it renders everywhere, sorts, filters, and asks for nothing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from synthetic_runs import write_run

from distributed_batchcam.cli import run
from distributed_batchcam.report.html import write_report

SCRIPT = "<script>alert(1)</script>"

# Text whose contrast with what is behind it is below 4.5, as WCAG AA has it; translucent layers are blended.
POOR_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a)];
  const background = (element) =>
    !element ? [255, 255, 255] :
    over(rgba(getComputedStyle(element).backgroundColor), background(element.parentElement));
  const luminance = (color) => {
    const [r, g, b] = color.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const unseen = ["SCRIPT", "STYLE", "OPTION", "title"];
  const poor = [];
  let seen = 0;
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    if (!text || !element.getClientRects().length || unseen.includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const behind = background(element);
    const ink = over(rgba(element.tagName === "text" ? style.fill : style.color), behind);
    const [low, high] = [luminance(ink), luminance(behind)].sort((a, b) => a - b);
    seen += 1;
    if ((high + 0.05) / (low + 0.05) < 4.5) poor.push(`${element.tagName}: ${text}`);
  }
  return { seen, poor };
}"""

OVERFLOW = "() => document.documentElement.scrollWidth - window.innerWidth"


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return write_report([write_run(tmp_path / "run")])


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Seven runs: two data sets, one unfinished, one without evaluation."""
    sweep = tmp_path / "sweep"
    for number, (weight, accuracy) in enumerate(((0.01, 99.0), (0.1, 98.9), (1.0, 9.5), (10.0, 98.0))):
        figures = {"accuracy": accuracy, "class_cam_ssim": 0.2 * number}
        write_run(sweep / f"mnist-{number}", figures=figures, weight=weight)
    write_run(sweep / "base", figures={"accuracy": 98.95, "relevance_mass": None}, objective="baseline")
    write_run(sweep / "old", evaluated=False, dataset="digits")
    write_run(sweep / "fashion", dataset="fashion_mnist", model="resnet18", figures={"accuracy": 94.0})
    (sweep / "stopped").mkdir()
    (sweep / "stopped/config.yaml").write_text("dataset: mnist\n")
    return write_report([sweep], tmp_path / "several.html")


def names(page: Any) -> list[str]:
    return page.locator("#runs tbody tr:visible th a:first-child").all_inner_texts()


def header(page: Any, title: str) -> Any:
    return page.locator("#runs thead th", has_text=title)


# One run -------------------------------------------------------------------------------------------------


def test_report_of_one_run_shows_every_section(one: Path, open_page: Any) -> None:
    page = open_page(one)
    assert page.locator("h2:visible").all_inner_texts() == [
        *("Figures", "Prototypes and what the model looks at", "The most confident mistakes", "Classes"),
        *("Calibration", "Learning curves", "Configuration"),
    ]
    assert page.locator("svg.plot:visible").count() == 8
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert "no independent evidence" in page.inner_text("#figures")
    assert "The paper has 99.00 %".lower() in page.inner_text("#summary").lower()
    assert "batchcam train --config" in page.inner_text("#repeat")


@pytest.mark.parametrize("report", ["one", "several"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(
    report: str, scheme: str, open_page: Any, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(report), scheme=scheme)
    found = page.evaluate(POOR_CONTRAST)
    assert found["poor"] == []
    assert found["seen"] > 50
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("report", ["one", "several"])
def test_nothing_overflows_a_phone(report: str, open_page: Any, request: pytest.FixtureRequest) -> None:
    page = open_page(request.getfixturevalue(report), width=360)
    assert page.evaluate(OVERFLOW) == 0
    assert page.locator("h2:visible").count() >= 3


@pytest.mark.parametrize("report", ["one", "several"])
def test_print_shows_everything_on_white(report: str, open_page: Any, request: pytest.FixtureRequest) -> None:
    # About A4 within its margins, upright and across.
    page = open_page(request.getfixturevalue(report), width=680 if report == "one" else 1000, scheme="dark")
    on_screen = page.locator("main h2:visible, main img:visible, main tbody tr:visible, main svg:visible").count()
    page.emulate_media(media="print")
    printed = page.locator("main h2:visible, main img:visible, main tbody tr:visible, main svg:visible").count()
    assert printed == on_screen
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    # What would have to be scrolled on a screen would be cut off on paper.
    assert page.evaluate(OVERFLOW) == 0
    assert page.locator("#filters:visible, nav:visible").count() == 0
    assert page.pdf().startswith(b"%PDF")


# Several runs --------------------------------------------------------------------------------------------


def test_numbers_sort_as_numbers_with_missing_last(several: Path, open_page: Any) -> None:
    page = open_page(several)
    accuracy = header(page, "Accuracy, %")
    accuracy.get_by_role("button").click()
    assert accuracy.get_attribute("aria-sort") == "descending"
    ordered = ["mnist-0", "base", "mnist-1", "mnist-3", "fashion", "old", "mnist-2"]
    assert names(page) == ordered
    accuracy.get_by_role("button").click()
    assert accuracy.get_attribute("aria-sort") == "ascending"
    assert names(page) == ordered[::-1]

    mass = header(page, "Relevance mass")
    for _ in range(2):
        mass.get_by_role("button").click()
        assert set(names(page)[-2:]) == {"base", "old"}
    assert accuracy.get_attribute("aria-sort") is None
    assert mass.get_attribute("aria-sort") == "ascending"


def test_table_sorts_by_keyboard(several: Path, open_page: Any) -> None:
    page = open_page(several)
    header(page, "λ").get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert [name for name in names(page) if name.startswith("mnist")] == ["mnist-0", "mnist-1", "mnist-2", "mnist-3"]
    page.keyboard.press("Space")
    assert names(page)[0] == "mnist-3"
    assert names(page)[-1] == "base"


def test_filters_narrow_the_table_and_the_plots(several: Path, open_page: Any) -> None:
    page = open_page(several)
    assert page.inner_text("#shown") == "7 of 7 runs"
    page.get_by_label("Objective").select_option("baseline")
    assert names(page) == ["base"]
    assert page.inner_text("#shown") == "1 of 7 runs"
    assert page.locator("a.point:not(.dim)").count() == page.locator("a.point", has_text="base:").count() == 2
    page.get_by_label("Objective").select_option("")
    page.get_by_label("Data set").select_option("fashion_mnist")
    assert names(page) == ["fashion"]
    page.get_by_label("Data set").select_option("")
    page.get_by_label("Model").select_option("simple_cnn")
    page.get_by_label("Filter").fill("MNIST-  bcpl")
    assert sorted(names(page)) == ["mnist-0", "mnist-1", "mnist-2", "mnist-3"]
    page.get_by_label("Filter").fill("nothing of the kind")
    assert names(page) == []


def test_point_leads_to_its_row_even_if_filtered_out(several: Path, open_page: Any) -> None:
    page = open_page(several)
    page.get_by_label("Filter").fill("fashion")
    page.locator("a.point", has_text="mnist-3:").first.focus()
    page.keyboard.press("Enter")
    page.locator("tr:target:visible").wait_for(timeout=5000)
    assert "mnist-3" in page.inner_text("tr:target")
    assert len(names(page)) == 7


def test_runs_that_cannot_be_shown_are_named_with_the_reason(several: Path, open_page: Any) -> None:
    page = open_page(several)
    notes = page.inner_text(".notes")
    assert "stopped holds an unfinished run: no summary.json" in notes
    assert "1 of 7 runs without figures that are independent evidence" in notes


def test_200_runs_are_one_file_of_sensible_size(tmp_path: Path, open_page: Any) -> None:
    for number in range(200):
        write_run(
            tmp_path / "sweep" / f"run-{number}",
            classes=tuple("0123456789"),
            figures={"accuracy": 90 + number / 25, "class_cam_ssim": 1 - number / 250},
            objective=("pl_l1", "bcpl_l1", "baseline")[number % 3],
            seed=number,
        )
    start = time.monotonic()
    report = write_report([tmp_path / "sweep"], tmp_path / "report.html")
    assert time.monotonic() - start < 60  # a few seconds; this only tells linear from quadratic
    assert report.stat().st_size < 6 * 2**20
    page = open_page(report)
    assert len(names(page)) == 200
    header(page, "Seed").get_by_role("button").click()
    assert names(page) == [f"run-{number}" for number in range(200)]


# Untrusted text ------------------------------------------------------------------------------------------


def test_class_folders_and_paths_that_look_like_markup_are_text(tmp_path: Path, open_page: Any) -> None:
    images = tmp_path / "images"
    # A slash cannot be in a folder's name, so the whole element is put into the files below.
    folders = ["<script>alert(1)", "<img src=x onerror=alert(2)>", "\"'><svg onload=alert(3)>", "{{ 7 * 7 }} $x^2$"]
    for shade, name in enumerate(folders):
        for split, count in (("train", 8), ("test", 4)):
            (images / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("L", (16, 16), 40 * shade + index).save(images / split / name / f"{index}.png")
    out = tmp_path / "<img src=x onerror=alert(4)>"
    options = ["--dataset", "imagefolder", "--data-root", str(images), "--epochs", "1", "--batch-size", "8"]
    assert run(["train", *options, "--image-size", "16", "--device", "cpu", "--out", str(out)]) == 0
    assert run(["evaluate", str(out), "--device", "cpu"]) == 0
    file = out / "evaluation-test.json"
    document = json.loads(file.read_text())
    assert sorted(document["classes"]) == sorted(folders)
    document["classes"][document["classes"].index("<script>alert(1)")] = SCRIPT
    file.write_text(json.dumps(document))
    assert run(["report", str(out)]) == 0

    page = open_page(out / "report.html")
    text = page.inner_text("main")
    for name in [SCRIPT, *folders[1:], out.name]:
        assert name in text
    assert page.inner_text("h1") == out.name

    (tmp_path / "javascript:alert(5)").mkdir()
    run_dir = write_run(tmp_path / "javascript:alert(5)" / SCRIPT.replace("/", "∕"), objective=SCRIPT, dataset=SCRIPT)
    (run_dir / "report.html").write_text("another's")
    page = open_page(write_report([out, run_dir.parent], tmp_path / "both.html"))
    assert SCRIPT in page.inner_text("#runs")
    assert out.name in page.inner_text("#maps")
    page.get_by_label("Objective").select_option(SCRIPT)
    assert len(names(page)) == 1
    assert all(
        link.startswith("./")
        for link in page.locator("a.own").evaluate_all("a => a.map((e) => e.getAttribute('href'))")
    )
    for trap in ("alert(1)", "alert(4)"):
        assert (
            page.locator(
                f'xpath=//*[not(self::script)]/@*[contains(., "{trap}") and starts-with(name(), "on")]'
            ).count()
            == 0
        )
