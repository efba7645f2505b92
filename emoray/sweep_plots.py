"""A sweep's pictures, drawn as those of plots.py: the metric against a key, all keys at once, curves, what mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from emoray.plots import ACCENT, LINE, MUTED, SECOND, legend, svg
from emoray.search_space import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from emoray.search_space import Domain
    from emoray.sweep import Trial

Dots = Sequence[tuple["Trial", float]]
"""Trials with the metric of each."""


def against(domain: Domain, dots: Dots, title: str) -> str:
    """The metric of each trial against the value of one key; those that were stopped are hollow."""
    places = _places(domain)

    def draw(axes: Axes) -> None:
        for ended, label in ((True, "to the end"), (False, "stopped or failed")):
            group = [(t.values[domain.key], y) for t, y in dots if (t.state == "finished") == ended]
            if not group:
                continue
            x = [places(value) for value, _ in group]
            face = ACCENT if ended else "none"
            axes.scatter(
                x, [y for _, y in group], s=36, facecolors=face, edgecolors=ACCENT if ended else SECOND, label=label
            )
        axes.set_xlabel(domain.key)
        if domain.kind == "loguniform":
            axes.set_xscale("log")
            axes.set_xlim(domain.args[0] / 1.2, domain.args[1] * 1.2)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.xaxis.set_minor_formatter(lambda *_: "")
        elif domain.listed:
            axes.set_xticks(range(len(domain.args)), [str(value) for value in domain.args])
            axes.set_xlim(-0.5, len(domain.args) - 0.5)
        legend(axes)

    trial, best = _best(dots)
    words = f"{title} against {domain.key}: best {best:.4f} at {trial.values[domain.key]}"
    return svg(f"against-{domain.key}", words, draw)


def curves(lines: Sequence[tuple[Trial, Sequence[float]]], title: str) -> str:
    """The metric after each evaluation over epochs; a cross where a trial was stopped."""

    def draw(axes: Axes) -> None:
        for trial, values in lines:
            x = [entry["epoch"] for entry in trial.evaluations]
            ended = trial.state == "finished"
            colour = ACCENT if ended else SECOND
            axes.plot(x, values, color=colour, linewidth=1.8 if ended else 1.0, marker="o", markersize=3)
            if not ended:
                axes.plot(x[-1:], values[-1:], color=SECOND, marker="x", markersize=7, markeredgewidth=1.6)
        axes.set_xlabel("epoch")

    stopped = sum(trial.state == "stopped" for trial, _ in lines)
    return svg("curves", f"{title} over epochs of {len(lines)} trials, {stopped} of them stopped early", draw)


def parallel(domains: Sequence[Domain], dots: Dots, title: str) -> str:
    """A line a trial through its values, each axis from its lowest to its highest, to the metric at the right."""
    low, high = min(y for _, y in dots), max(y for _, y in dots)

    def draw(axes: Axes) -> None:
        for trial, y in sorted(dots, key=lambda dot: dot[1]):
            heights = [_height(domain, trial.values[domain.key]) for domain in domains]
            heights.append((y - low) / (high - low) if high > low else 0.5)
            ended = trial.state == "finished"
            axes.plot(
                range(len(heights)),
                heights,
                color=ACCENT if ended else SECOND,
                alpha=0.9 if ended else 0.45,
                linewidth=2.0 if ended else 1.0,
            )
        for place, domain in enumerate(domains):
            ends = (domain.args[0], domain.args[-1]) if domain.listed else domain.args[:2]
            _axis(axes, place, _text(ends[0]), _text(ends[1]))
        _axis(axes, len(domains), f"{low:.3f}", f"{high:.3f}")
        axes.set_xticks(range(len(domains) + 1), [*(short(d.key) for d in domains), title])
        axes.set_yticks([])
        axes.set(ylim=(-0.16, 1.16), xlim=(-0.35, len(domains) + 0.35))
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)

    return svg("parallel", f"The values of {len(dots)} trials and their {title}, a line each", draw)


def bars(weights: Mapping[str, float]) -> str:
    """How much of the variation each key explains."""

    def draw(axes: Axes) -> None:
        names = list(weights)[::-1]
        axes.barh(names, [weights[name] for name in names], color=ACCENT, alpha=0.85, height=0.35)
        axes.set(xlim=(0, 1))
        axes.grid(axis="x")
        axes.grid(False, axis="y")

    words = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
    return svg("importance", f"Share of the variation that each key explains: {words}", draw)


def _axis(axes: Axes, place: int, low: str, high: str) -> None:
    axes.plot([place, place], [0, 1], color=LINE, linewidth=1.2, zorder=0)
    for y, text, side in ((-0.04, low, "top"), (1.04, high, "bottom")):
        axes.text(place, y, text, ha="center", va=side, color=MUTED, fontsize=8.5)


def _best(dots: Dots) -> tuple[Trial, float]:
    finished = [dot for dot in dots if dot[0].state == "finished"] or list(dots)
    return max(finished, key=lambda dot: dot[1])


def _places(domain: Domain) -> Any:
    """Where a value lies on the axis of its key."""
    return domain.args.index if domain.listed else float


def _height(domain: Domain, value: Any) -> float:
    """A value's place between the ends of its domain, 0 to 1."""
    if domain.listed:
        return float(domain.args.index(value) / max(1, len(domain.args) - 1))
    low, high, x = (float(v) for v in (*domain.args[:2], value))
    if domain.kind == "loguniform":
        low, high, x = math.log(low), math.log(high), math.log(x)
    return float(np.clip((x - low) / (high - low), 0, 1))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return f"{value:g}" if _is_number(value) else str(value)
