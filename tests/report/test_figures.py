"""The picture of class maps."""

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from distributed_batchcam.report import figures
from distributed_batchcam.report.figures import save_class_maps

TITLE = r"a run in the folder $\frac$"  # no mathematics


def drawn_texts(monkeypatch: pytest.MonkeyPatch, path: Path, names: list[str]) -> list[str]:
    """All that is written in the picture of so many classes, the last of which has no image."""
    texts: list[str] = []
    save = Figure.savefig

    def spy(self: Figure, *arguments: object, **options: object) -> None:
        texts.extend(text.get_text() for text in self.findobj(lambda artist: hasattr(artist, "get_text")))
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    count = len(names)
    counts = torch.arange(count).flip(0)
    rows = {label: (torch.rand(count, 8, 8), counts) for label in ("all", "right", "wrong")}
    save_class_maps(path, torch.rand(count, 8, 8), rows, names, TITLE)
    return texts


def test_each_class_has_its_name_its_similarities_and_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = drawn_texts(monkeypatch, tmp_path / "maps.png", ["$x$", "plain", "empty"])
    assert {"$x$", "plain", "empty", "prototype", "all", "right", "wrong", TITLE} <= set(texts)
    assert texts.count("no image") == 3
    assert sum(text.endswith("· 2") for text in texts) == 3
    with Image.open(tmp_path / "maps.png") as image:
        assert image.width > 300


def test_of_very_many_classes_the_first_are_drawn_and_the_title_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "MOST_CLASSES", 12)
    texts = drawn_texts(monkeypatch, tmp_path / "maps.png", [f"class {index}" for index in range(14)])
    assert f"{TITLE}; the first 12 of 14 classes" in texts
    assert "class 11" in texts
    assert "class 12" not in texts
