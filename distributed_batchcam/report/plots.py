"""Plots as inline SVG that follows the colours of the page around it, light or dark."""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

# matplotlib draws with stand-ins; each becomes what CSS calls it. A point of a figure is a pixel on the page.
_COLOURS = {
    "#010101": "currentColor",
    "#020202": "var(--rule)",
    "#030303": "var(--muted)",
    "#040404": "var(--surface)",
    **{f"#05050{index}": f"var(--series-{index})" for index in range(8)},
}
INK, RULE, MUTED, SURFACE, *SERIES = _COLOURS
_MARKERS = "osD^vPX*"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "text.parse_math": False,
}
_REFERENCE = re.compile(r'(?:url\(#|href="#)([\w-]+)')
_XLINK = "{http://www.w3.org/1999/xlink}href"


class Line(NamedTuple):
    """One curve of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


class ReliabilityBin(NamedTuple):
    """Predictions of like confidence, in percent."""

    middle: float
    confidence: float
    accuracy: float
    samples: int


class Point(NamedTuple):
    """One run of a scatter plot."""

    x: float
    y: float
    series: str
    link: str  # what a click on it leads to
    title: str
    mark: str = ""  # text beside a point of the front
    front: bool = False


class Axis(NamedTuple):
    """An axis's label, and whether higher is better."""

    label: str
    higher: bool = True


def curves(name: str, label: str, lines: Sequence[Line]) -> Markup:
    """Curves over epochs; `name` tells the plots of a page apart, `label` is for those who cannot see it."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = _figure(320, 200, top=26 if len(lines) > 1 else 8)
        axes = figure.subplots()
        for index, (text, x, y) in enumerate(lines):
            dashes, marker = "-" if index == 0 else (0, (5, 1.5)), "o" if len(x) < 30 else ""
            axes.plot(x, y, label=text, color=SERIES[index], linestyle=dashes, marker=marker, markersize=3.5)
        axes.set_xlabel("epoch")
        axes.set_xlim(0, 1.03 * max(1, *(value for line in lines for value in line.x)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if len(lines) > 1:
            figure.legend(loc="upper left", bbox_to_anchor=(36 / 320, 1.03), ncols=len(lines), handlelength=2.4)
        return _svg(figure, name, label)


def reliability(name: str, label: str, bins: Sequence[ReliabilityBin]) -> Markup:
    """Accuracy over confidence, with the number of images below."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = _figure(340, 360, left=60)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        above.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        # A bin of few images says little: its point is small.
        most = max([1, *(one.samples for one in bins)])
        sizes = [12 + 60 * (one.samples / most) ** 0.5 for one in bins]
        above.scatter([one.confidence for one in bins], [one.accuracy for one in bins], s=sizes, color=SERIES[0])
        above.set(ylabel="accuracy, %", ylim=(-3, 103), xlim=(-3, 103))
        below.bar([one.middle for one in bins], [one.samples for one in bins], width=5, color=SERIES[0])
        below.set(xlabel="confidence, %", ylabel="images", yscale="log")
        # Not as powers of ten, which would be matplotlib's mathematics.
        below.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
        below.yaxis.set_minor_locator(NullLocator())
        below.xaxis.grid(visible=False)
        figure.align_ylabels()
        return _svg(figure, name, label)


def scatter(name: str, label: str, points: Sequence[Point], x: Axis, y: Axis, series: Sequence[str]) -> Markup:
    """Points that are links, those of the Pareto front filled and connected.

    Args:
        series: all that the page knows, so that each has its colour and marker in every plot.
    """
    here = [(number, text) for number, text in enumerate(series) if any(point.series == text for point in points)]
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = _figure(340, 300 + 18 * -(-len(here) // 3), bottom=46 + 18 * -(-len(here) // 3), left=62)
        axes = figure.subplots()
        front = sorted((point.x, point.y) for point in points if point.front)
        axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        for number, text in here:
            colour, marker = SERIES[number % len(SERIES)], _MARKERS[number % len(_MARKERS)]
            axes.plot([], [], color=colour, marker=marker, linestyle="", label=text)
            for on_front in (False, True):
                chosen = [point for point in points if point.series == text and point.front == on_front]
                drawn = axes.scatter(
                    [point.x for point in chosen],
                    [point.y for point in chosen],
                    s=72 if on_front else 40,
                    marker=marker,
                    facecolors=colour if on_front else SURFACE,
                    edgecolors=colour,
                    linewidths=1.6,
                    zorder=3 if on_front else 2,
                )
                drawn.set_urls([point.link for point in chosen])
        for point in points:
            if point.mark:
                axes.annotate(point.mark, (point.x, point.y), (6, 5), textcoords="offset points", fontsize=9.5)
        axes.margins(0.14, 0.1)
        axes.set(xlabel=_with_arrow(x), ylabel=_with_arrow(y))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        figure.legend(loc="lower left", bbox_to_anchor=(0.1, -0.01), ncols=3, handletextpad=0.1, columnspacing=1.2)
        return _svg(figure, name, label, {point.link: point.title for point in points})


def _with_arrow(axis: Axis) -> str:
    return f"{axis.label} (higher is better)" if axis.higher else f"{axis.label} (lower is better)"


def _figure(width: int, height: int, *, left: int = 46, bottom: int = 38, top: int = 8) -> Figure:
    """A figure in pixels. Fixed margins take half the time of a layout that fits."""
    figure = Figure(figsize=(width / 72, height / 72))
    figure.subplots_adjust(left / width, bottom / height, 1 - 10 / width, 1 - top / height, hspace=0.12)
    return figure


# SVG -----------------------------------------------------------------------------------------------------


def _svg(figure: Figure, name: str, label: str, links: Mapping[str, str] | None = None) -> Markup:
    buffer = BytesIO()
    with warnings.catch_warnings():
        # matplotlib measures text in its own font, which may lack a script that the page's font has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - what matplotlib just wrote
    used = set(_REFERENCE.findall(buffer.getvalue().decode()))
    box = root.get("viewBox", "")
    root.attrib.clear()
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in list(root.iter()):
        _make_plain(element, name, used, links or {})
    root.attrib.update({"viewBox": box, "class": "plot", "role": "group" if links else "img", "aria-label": label})
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 - the serializer escapes text


def _make_plain(element: ElementTree.Element, name: str, used: Collection[str], links: Mapping[str, str]) -> None:
    """Attributes in place of styles, which the page's content security policy forbids, and ids of one plot only."""
    element.tag = element.tag.rpartition("}")[2]
    element.tail = None
    if element.tag != "text":
        element.text = None
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font" and (size := re.search(r"([\d.]+)px", value)):
            element.set("font-size", size[1])
        elif key and key not in ("font", "font-family"):
            element.set(key, value)
    for key in ("fill", "stroke"):
        if (value := element.get(key, "")) in _COLOURS:
            element.set(key, _COLOURS[value])
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if (identity := element.attrib.pop("id", None)) in used:
        element.set("id", f"{name}-{identity}")
    if clip := element.get("clip-path"):
        element.set("clip-path", clip.replace("#", f"#{name}-"))
    if (target := element.attrib.pop(_XLINK, None)) is None:
        return
    element.set("href", target if element.tag == "a" else target.replace("#", f"#{name}-"))
    if element.tag == "a":
        del element.attrib["target"]  # a new tab
        element.set("class", "point")
        title = ElementTree.Element("title")
        title.text = links[target]
        element.insert(0, title)
