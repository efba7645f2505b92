"""The report's pictures: matplotlib figures as inline SVG that takes the page's colours and font.

Figures are drawn in placeholder colours that become CSS variables, so that one picture is readable in light,
dark and print; text stays text. The same input gives the same bytes: no dates, salted ids, no global state.
They are drawn for about 360 CSS pixels, a phone's width, and grow by a third on a wide screen.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from emoray.metrics import Array, Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colour -> CSS variable of report.html.j2.
_COLOURS = {
    "#000001": "--ink",
    "#000002": "--muted",
    "#000003": "--line",
    "#000004": "--accent",
    "#000005": "--second",
}
INK, MUTED, LINE, ACCENT, SECOND = _COLOURS

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same metrics on every machine
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
_FEW = 10  # rows of a bin below which its accuracy is drawn pale
_POINTS = 400  # a curve of more steps is averaged: a picture of 360 pixels shows no more


def loss(history: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]) -> str:
    """Training loss over steps (raw and smoothed), with the validation loss of each evaluation.

    Args:
        history: rows of history.jsonl.
        epochs: entries of results.json.
    """

    def draw(axes: Axes) -> None:
        if history:
            steps, values = _thin(history, "loss")
            axes.plot(steps, values, color=ACCENT, alpha=0.25, linewidth=0.9)
            axes.plot(steps, _smooth(values), color=ACCENT, linewidth=1.8, label="training")
        if epochs:
            x, y = [row["step"] for row in epochs], [row["validation_loss"] for row in epochs]
            axes.plot(x, y, color=SECOND, marker="o", markersize=5, linewidth=1.2, label="validation")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        legend(axes)

    ends = f"; validation ends at {epochs[-1]['validation_loss']:.4f}" if epochs else ""
    return svg("loss", f"Loss over steps{ends}", draw)


def learning_rate(history: Sequence[Mapping[str, Any]]) -> str:
    """Learning rate over steps."""
    steps, values = _thin(history, "learning_rate")

    def draw(axes: Axes) -> None:
        axes.plot(steps, values, color=ACCENT, linewidth=1.8)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=False)
        axes.yaxis.get_offset_text().set_color(MUTED)

    return svg("rate", f"Learning rate over steps, at most {values.max():.3g}", draw)


def reliability(bins: Reliability, ece: float, name: str) -> str:
    """Accuracy (bars) against mean confidence (marks) per bin; their distance is what ECE averages."""
    filled = bins["count"] > 0
    low, width = bins["edges"][:-1][filled], np.diff(bins["edges"])[filled]
    confidence, accuracy = bins["confidence"][filled], bins["accuracy"][filled]

    def draw(axes: Axes) -> None:
        for many, alpha in ((True, 0.85), (False, 0.25)):  # pale: a handful of rows says little
            some = (bins["count"][filled] >= _FEW) == many
            name = "accuracy" if many else f"of under {_FEW} rows"
            if some.any():
                axes.bar(
                    low[some], accuracy[some], width[some] * 0.9, align="edge", color=ACCENT, alpha=alpha, label=name
                )
        axes.hlines(confidence, low, low + width * 0.9, color=SECOND, linewidth=2, label="confidence")
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, dashes=(3, 3))
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence")
        legend(axes)

    return svg(name, f"Reliability diagram {name}: expected calibration error {ece:.4f}", draw)


def confidence(top: Array, right: Array) -> str:
    """How often the model is how sure, rows that it gets right and wrong stacked."""

    def draw(axes: Axes) -> None:
        edges = np.linspace(0, 1, 21)
        _stack(axes, top[right], top[~right], edges, ("right", "wrong"))
        axes.set(xlim=(0, 1), xlabel="confidence")
        legend(axes)

    mean = f"{top[right].mean():.2f}" if right.any() else "none"
    wrong = f"{top[~right].mean():.2f}" if (~right).any() else "none"
    return svg("confidence", f"Histogram of confidence: mean {mean} where right, {wrong} where wrong", draw)


def lengths(tokens: Array, truncated: Array) -> str:
    """Texts by their number of tokens, the truncated ones apart."""
    longest = int(tokens.max())
    width = max(1, -(-(longest + 1) // 30))

    def draw(axes: Axes) -> None:
        edges = np.arange(0, longest + width + 1, width)
        _stack(axes, tokens[~truncated], tokens[truncated], edges, ("whole", "truncated"))
        axes.set(xlabel="tokens", xlim=(0, edges[-1]))
        if truncated.any():
            legend(axes)

    return svg("lengths", f"Histogram of text lengths: {tokens.mean():.1f} tokens on average", draw)


def legend(axes: Axes) -> None:
    """Above the axes, where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0.2, handlelength=1.4)


def _stack(axes: Axes, first: Array, second: Array, edges: Array, names: tuple[str, str]) -> None:
    """Two histograms on one another; bars, since matplotlib's hist draws a stack of outlines."""
    below, above = np.histogram(first, edges)[0], np.histogram(second, edges)[0]
    width = np.diff(edges) * 0.9
    axes.bar(edges[:-1], below, width, align="edge", color=ACCENT, alpha=0.85, label=names[0])
    axes.bar(edges[:-1], above, width, below, align="edge", color=SECOND, alpha=0.85, label=names[1])
    axes.yaxis.set_major_locator(_whole_numbers())


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, integer=True)


def _thin(history: Sequence[Mapping[str, Any]], key: str) -> tuple[Array, Array]:
    """Steps and values, averaged in equal pieces where there are more than a picture can show."""
    steps = np.array([row["step"] for row in history], dtype=np.float64)
    values = np.array([row[key] for row in history], dtype=np.float64)
    pieces = min(len(steps), _POINTS)
    return tuple(  # type: ignore[return-value]
        np.array([piece.mean() for piece in np.array_split(column, pieces)]) for column in (steps, values)
    )


def _smooth(values: Array) -> Array:
    """Mean over a window of a twentieth of the curve, narrower at its ends."""
    half = max(1, len(values) // 40)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def svg(name: str, alternative: str, draw: Any) -> str:
    """Draw one picture of 360 x 210 units.

    Args:
        name: unique in the page; keeps the ids of two pictures apart.
        alternative: what the picture says, in words, for those who don't see it.
        draw: draws on the axes it is given.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    out = io.StringIO()
    # "default" first: a matplotlibrc on this machine must not change the picture.
    with style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        figure: Figure = Figure(figsize=(5.0, 2.9), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _inline(out.getvalue(), alternative)


def _inline(svg: str, alternative: str) -> str:
    """The bare <svg> element: no prolog, metadata or fixed size; in the page's own colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    label = escape(alternative, quote=True)
    svg = re.sub(r"<svg[^>]*>", f'<svg {view[0]} role="img" aria-label="{label}">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # matplotlib before 3.10
    svg = re.sub(r" font-family: [^;\"]*;", "", svg).replace("rotate(-0 ", "rotate(0 ")
    svg = re.sub(r' transform="rotate\(0 [^"]*"', "", svg)
    for placeholder, variable in _COLOURS.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg.strip()
