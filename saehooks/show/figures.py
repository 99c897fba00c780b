"""Matplotlib pictures. Matplotlib is imported where a figure is made, and pyplot's global state is left alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saehooks.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREY = "#286ee1", "#d74128", "#8a8f98"
INK = "#767c86"
"""Text and lines: stands out from white paper and from dark, four to one."""
GREYS = ("#5f6670", "#8a8f98", "#b3b8c0", "#cdd1d7")
COLOURS = (BLUE, RED, "#2a9d6f", "#e09f1f", "#7b4fc9", "#8a8f98")


def blank(rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure of a grid of axes, outside pyplot (nothing to close), that notebooks show as a PNG; its paper is
    transparent, so that it reads on light and dark pages.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib; write: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    figure._repr_png_ = lambda: png(figure)  # type: ignore[attr-defined]
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(INK)
        ax.set_facecolor("none")
        ax.tick_params(colors=INK)
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_color(INK)
    return figure, axes


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as the bytes of a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def support_size_histogram(support_size: Any, *, title: str = "Latents per token", ax: Axes | None = None) -> Figure:
    """Histogram of support sizes, with the mean and the 5, 50 and 95% quantiles marked.

    Args:
        support_size: any shape, counts (a tensor, an array or a list).
        title: above the axes.
        ax: where to draw; by default a new figure.
    Raises:
        ConfigError: there are no counts.
    """
    sizes = _array(support_size)
    if not sizes.size:
        raise ConfigError("no support sizes to draw: the codes have no rows")
    figure, ax = _axes(ax)
    step = max(1, int(np.ceil((sizes.max() - sizes.min() + 1) / 60)))
    ax.hist(sizes, bins=list(np.arange(sizes.min() - 0.5, sizes.max() + step + 0.5, step)), color=BLUE, alpha=0.85)
    low, mid, high = np.quantile(sizes, [0.05, 0.5, 0.95])
    ax.axvline(sizes.mean(), color=RED, label=f"mean {sizes.mean():.1f}")
    for value, name in ((low, "5%"), (mid, "50%"), (high, "95%")):
        ax.axvline(value, color=GREY, linestyle="--", linewidth=1, label=f"{name}: {value:.0f}")
    ax.set(xlabel="latents in the support", ylabel="tokens", title=title)
    ax.legend(frameon=False, labelcolor=INK)
    return figure


def training_curves(
    history: Sequence[Mapping[str, float]],
    metrics: Sequence[str] | None = None,
    *,
    x: str = "step",
    log: Sequence[str] = (),
) -> Figure:
    """One small plot for each metric of a training history, over the steps.

    Args:
        history: rows like ``{"step": 10, "loss": 0.5, "nmse": 0.4}``; a row may lack a metric.
        metrics: which to draw; by default all but ``x``.
        x: the name of the horizontal axis.
        log: metrics drawn on a logarithmic axis.
    Raises:
        ConfigError: no row, or no metric to draw.
    """
    names = list(metrics or dict.fromkeys(name for row in history for name in row if name != x))
    if not history or not names:
        raise ConfigError("no training history to draw: train at least one step first")
    columns = 2 if len(names) in (2, 4) else min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = blank(rows, columns, width=3.3 * columns, height=2.5 * rows)
    for ax, name in zip(axes, names, strict=False):
        points = [(row[x], row[name]) for row in history if row.get(name) is not None]
        ax.plot(*zip(*points, strict=True), color=BLUE, marker="." if len(points) < 12 else None)
        ax.set(xlabel=x, title=name, yscale="log" if name in log else "linear")
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    return figure


def ranking_bars(
    labels: Sequence[Any], values: Sequence[float], *, title: str = "", xlabel: str = "effect", ax: Axes | None = None
) -> Figure:
    """Horizontal bars, first label on top; positive values blue, negative ones red.

    Raises:
        ConfigError: labels and values are not equally many, or there are none.
    """
    _same_length(labels, values)
    figure, ax = _axes(ax, height=0.8 + 0.3 * len(labels))
    numbers = _array(values)
    ax.barh(range(len(labels)), numbers, color=[BLUE if value >= 0 else RED for value in numbers])
    ax.set_yticks(range(len(labels)), [str(label) for label in labels])
    ax.invert_yaxis()
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set(xlabel=xlabel, title=title)
    return figure


def paired_bars(
    labels: Sequence[Any],
    series: Mapping[str, Sequence[float]],
    *,
    title: str = "",
    xlabel: str = "probability",
    highlight: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Horizontal bars of several series side by side: a next-token distribution before and after an edit.

    Args:
        highlight: the series that matters, in blue, the others in greys; by default each in its own colour.
    Raises:
        ConfigError: a series has not one value per label.
    """
    for values in series.values():
        _same_length(labels, values)
    figure, ax = _axes(ax, height=0.9 + 0.36 * len(labels))
    thickness = 0.8 / max(1, len(series))
    for i, (name, values) in enumerate(series.items()):
        places = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * thickness
        ax.barh(places, _array(values), height=thickness, color=_colour(i, name, highlight), label=name)
    ax.set_yticks(range(len(labels)), [str(label) for label in labels])
    ax.invert_yaxis()
    ax.set(xlabel=xlabel, title=title)
    ax.legend(frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def effect_curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    highlight: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Lines of an effect over the strength of an edit, one for each name: ``{name: (x, y)}``.

    Args:
        highlight: the line that matters, in blue, the others in greys; by default each in its own colour.
    Raises:
        ConfigError: x and y of a line are not equally long.
    """
    figure, ax = _axes(ax)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        _same_length(xs, ys)
        ax.plot(_array(xs), _array(ys), color=_colour(i, name, highlight), marker="o", markersize=4, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(series) > 1:
        ax.legend(frameon=False, labelcolor=INK)
    return figure


def concept_overlay(
    images: Sequence[Any],
    values: Any,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 6,
    high: float | None = None,
) -> Figure:
    """Images with one latent's activation on their patches laid over them, strongest opaque.

    Args:
        images: n images, (height, width, 3) uint8 or floats in 0..1.
        values: (n, patch rows, patch columns); at or below 0 nothing is drawn.
        titles: a line above each image.
        columns: images in a row.
        high: the value drawn at full strength; by default the largest.
    Raises:
        ConfigError: not one grid of patches for each image.
    """
    grids = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=float)
    if grids.ndim != 3 or len(grids) != len(images) or not len(images):
        raise ConfigError(f"one grid of patches per image: got {len(images)} images and values of shape {grids.shape}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, axes = blank(rows, columns, width=1.5 * columns, height=1.7 * rows)
    strongest = max(float(grids.max()) if high is None else high, 1e-12)
    for i, ax in enumerate(axes):
        ax.axis("off")
        if i < len(images):
            _overlay(ax, np.asarray(images[i]), grids[i] / strongest)
            ax.set_title("" if titles is None else titles[i], fontsize=9)
    return figure


def _overlay(ax: Axes, image: np.ndarray, strength: np.ndarray) -> None:
    """One image, greyed a little, with red patches whose opacity is their strength."""
    picture = image / 255 if image.dtype == np.uint8 else image
    height, width = picture.shape[:2]
    ax.imshow(picture, interpolation="nearest")
    heat = np.zeros((*strength.shape, 4))
    heat[..., :3] = (0.95, 0.15, 0.1)
    heat[..., 3] = 0.75 * np.clip(strength, 0, 1)
    ax.imshow(heat, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")


def _colour(place: int, name: str, highlight: str | None) -> str:
    """The colour of a series: its own, or blue for the one that matters and greys for the others."""
    if highlight is None:
        return COLOURS[place % len(COLOURS)]
    return BLUE if name == highlight else GREYS[place % len(GREYS)]


def _axes(ax: Axes | None, height: float = 3.4) -> tuple[Any, Axes]:
    """The given axes and their figure, or new ones."""
    if ax is not None:
        return ax.figure, ax
    figure, axes = blank(height=height)
    return figure, axes[0]


def _array(values: Any) -> np.ndarray:
    """A flat float array out of a tensor, an array or a sequence."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=float).reshape(-1)


def _same_length(labels: Sequence[Any], values: Sequence[float]) -> None:
    if len(labels) != len(values) or not len(labels):
        raise ConfigError(f"one value per label, at least one: got {len(labels)} labels and {len(values)} values")
