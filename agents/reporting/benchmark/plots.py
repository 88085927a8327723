"""Drawings by matplotlib, as SVG: no background, grey axes and middle tones stand on light and dark pages alike."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_GREY: Final = "#838a93"
_TONES: Final = ("#3d82e0", "#d2741c", "#1fa377", "#cf5aae", "#8a6fe0", "#b0941a", "#1f9fb8", "#df5353")
_SIZE: Final = (4.4, 3.0)  # inches of 72 pixels
_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "benchmark",  # the same data, the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _GREY,
    "axes.labelcolor": _GREY,
    "axes.edgecolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
}


def hexbin(
    queries: NDArray[np.float64],
    rewards: NDArray[np.float64],
    mean: tuple[Sequence[float], Sequence[float]],
    limits: tuple[float, float],
    color: str,
) -> str:
    """How the rewards of single pictures are spread, measurement by measurement (thesis, figure 5.3).

    Args:
        queries: of each picture, `(N,)`.
        rewards: of each picture, `(N,)`.
        mean: reward queries and mean reward of the measurements, drawn as a line.
        limits: of the reward axis.
        color: classes of the page's style, of which the colour is taken.

    Returns:
        SVG.
    """
    with _drawing() as (figure, axes):
        last, columns = float(queries.max()), max(8, 2 * len(np.unique(queries)))
        across = last * (0.5 / columns) if last else 1.0
        extent = (-across, last + across, *limits)
        drawn = axes.hexbin(
            queries, rewards, gridsize=(columns, 14), extent=extent, mincnt=1, cmap=_fading(color), linewidths=0
        )
        axes.plot(*mean, color=_GREY, linewidth=2)
        axes.set_xlim(extent[:2])
        axes.set_ylim(*limits)
        axes.set_xlabel("reward queries")
        axes.set_ylabel("reward of a picture")
        bar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.03)
        bar.set_label("pictures")
        bar.outline.set_visible(False)
        return _svg(figure)


def embedding(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    limits: tuple[NDArray[np.float64], NDArray[np.float64]],
    color: str,
) -> str:
    """A map of pictures before and after, those from the same noise joined by a line (thesis, figure 5.14).

    Args:
        before: places of the pretrained model's pictures, `(N, 2)`.
        after: of the trained model's, from the same noise.
        limits: lower and upper corner of the map, `(2,)` each.
        color: classes of the page's style, of which the colour is taken.

    Returns:
        SVG.
    """
    with _drawing() as (figure, axes):
        for first, second in zip(before, after, strict=True):
            axes.plot([first[0], second[0]], [first[1], second[1]], color=_GREY, linewidth=0.6, alpha=0.35, zorder=1)
        axes.scatter(*before.T, s=16, facecolors="none", edgecolors=_GREY, linewidths=1, label="pretrained", zorder=2)
        axes.scatter(*after.T, s=18, color=_tone(color), linewidths=0, alpha=0.85, label="tuned", zorder=3)
        axes.set_xlim(limits[0][0], limits[1][0])
        axes.set_ylim(limits[0][1], limits[1][1])
        axes.set_xlabel("first component")
        axes.set_ylabel("second component")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.2)
        return _svg(figure)


def principal_axes(features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean `(D,)` and first two principal axes `(2, D)` of features `(N, D)`; an axis' largest entry is positive."""
    center = features.mean(0)
    axes = np.linalg.svd(features - center, full_matrices=False)[2][:2]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])
    return center, axes * np.where(signs == 0, 1, signs)[:, None]


@contextmanager
def _drawing() -> Iterator[tuple[Any, Any]]:
    """A figure with one plot; the style holds while it is drawn and saved."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return stream.getvalue()


def _tone(color: str) -> str:
    series = color.split()[0].rpartition("-")[2]
    return _TONES[(int(series) - 1) % len(_TONES)]


def _fading(color: str) -> Any:
    """A colour map from faint to full, so that few pictures look faint on any page."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    red, green, blue = to_rgb(_tone(color))
    return LinearSegmentedColormap.from_list("fading", [(red, green, blue, 0.12), (red, green, blue, 1.0)])
