"""Pictures of causal effects: two measurements of the same latents, and edges between two sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saehooks.errors import ConfigError
from saehooks.show.figures import BLUE, GREY, INK, RED, _array, _axes, _same_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def scatter(xs: Any, ys: Any, *, xlabel: str = "", ylabel: str = "", title: str = "", ax: Axes | None = None) -> Figure:
    """A dot for each pair, with the line on which both agree.

    Raises:
        ConfigError: not equally many, or none.
    """
    x, y = _array(xs), _array(ys)
    _same_length(list(x), list(y))
    figure, ax = _axes(ax)
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    ax.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--", label="equal")
    ax.scatter(x, y, s=14, color=BLUE, alpha=0.7, linewidths=0)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.legend(frameon=False, labelcolor=INK)
    return figure


def two_columns(
    edges: Sequence[tuple[Any, Any, float]],
    *,
    titles: tuple[str, str] = ("", ""),
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Nodes in two columns and weighted edges between them, positive blue and negative red.

    Args:
        edges: (node on the left, node on the right, weight).
        titles: above the columns.
    Raises:
        ConfigError: there is no edge.
    """
    if not edges:
        raise ConfigError("no edges to draw")
    sides = [list(dict.fromkeys(edge[side] for edge in edges)) for side in (0, 1)]
    figure, ax = _axes(ax, height=1.2 + 0.28 * max(map(len, sides)))
    heights = [{node: (i + 0.5) / len(nodes) for i, node in enumerate(nodes)} for nodes in sides]
    strongest = max(abs(weight) for *_, weight in edges) or 1.0
    for left, right, weight in reversed(edges):
        share = abs(weight) / strongest
        ends = [heights[0][left], heights[1][right]]
        ax.plot([0, 1], ends, color=BLUE if weight > 0 else RED, linewidth=0.4 + 3.6 * share, alpha=0.25 + 0.7 * share)
    for x, nodes, align, head in zip((0, 1), heights, ("right", "left"), titles, strict=True):
        for node, y in nodes.items():
            ax.text(x + (0.02 if x else -0.02), y, str(node), ha=align, va="center", fontsize=8, color=INK)
        ax.text(x, -0.06, head, ha="center", fontsize=9, color=INK)
    ax.set(xlim=(-0.25, 1.25), ylim=(1.04, -0.12), title=title)
    ax.axis("off")
    return figure
