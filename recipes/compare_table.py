"""Table and picture of compare_architectures.py, from its rows of results."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np

from saehooks.show import figures

CURVE = ("topk, k/2", "topk", "topk, 2k")
"""The arms between which TopK's figures at any L0 are read off."""


def at_same_l0(rows: list[dict]) -> None:
    """TopK's figures at each row's own L0: between (or beyond) its three arms, straight in logarithms."""
    for row in rows:
        arms = [r for r in rows if r["d_sae"] == row["d_sae"] and r["arm"] in CURVE]
        for key in ("nmse", "token_nmse", "ce_degradation"):
            row[f"topk_{key}"] = on_curve(row["l0"], sorted((r["l0"], r[key]) for r in arms))


def on_curve(l0: float, curve: list[tuple[float, float]]) -> float:
    if len(curve) < 2 or l0 <= 0 or min(value for _, value in curve) <= 0:
        return math.nan
    x, (xs, ys) = math.log(l0), np.log(np.array(curve)).T
    i = int(np.clip(np.searchsorted(xs, x), 1, len(xs) - 1))
    return math.exp(ys[i - 1] + (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1]) * (x - xs[i - 1]))


COLUMNS = {
    "arm": "{}",
    "d_sae": "{}",
    "l0": "{:.1f}",
    "l0_q05": "{}",
    "l0_median": "{}",
    "l0_q95": "{}",
    "dead": "{}",
    "nmse": "{:.4f}",
    "topk_nmse": "{:.4f}",
    "token_nmse": "{:.4f}",
    "topk_token_nmse": "{:.4f}",
    "fvu": "{:.4f}",
    "ce_spliced": "{:.4f}",
    "ce_degradation": "{:.4f}",
    "topk_ce_degradation": "{:.4f}",
    "ce_recovered": "{:.4f}",
    "ms_per_step": "{:.0f}",
    "encode_ms": "{:.1f}",
    "peak_mb": "{:.0f}",
    "encoder_parameters": "{}",
    "steps": "{}",
}


def write_tables(rows: list[dict], facts: dict, folder: Path) -> None:
    """table.csv, and table.md with the facts above the table."""
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        lines.append("| " + " | ".join(form.format(row.get(name, math.nan)) for name, form in COLUMNS.items()) + " |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")


FIGURES = {
    "nmse": "NMSE (few tokens of huge norm weigh most)",
    "token_nmse": "mean over tokens of squared error / squared norm",
    "ce_degradation": "CE degradation (nats)",
}


def draw(rows: list[dict], path: Path) -> None:
    """Three figures against L0, and the support sizes of the largest dictionaries."""
    from matplotlib import colormaps

    figure, (*against_l0, supports) = figures.blank(2, 2, width=17, height=12)
    names = dict.fromkeys(row["arm"] for row in rows)
    colours = {name: colormaps["tab20"](i % 20) for i, name in enumerate(names)}
    for axis, (key, label) in zip(against_l0, FIGURES.items(), strict=True):
        draw_against_l0(axis, rows, key, colours)
        axis.set_ylabel(label)
    largest = max(row["d_sae"] for row in rows)
    draw_supports(supports, [row for row in rows if row["d_sae"] == largest], colours)
    supports.set_title(f"d_sae {largest}")
    figure.savefig(path, dpi=110)


def draw_against_l0(axis, rows: list[dict], key: str, colours: dict) -> None:
    """A mark for each arm, one shape for each size, and TopK's curve through its arms."""
    sizes = sorted({row["d_sae"] for row in rows})
    for i, d_sae in enumerate(sizes):
        own = [row for row in rows if row["d_sae"] == d_sae]
        curve = sorted((row["l0"], row[key]) for row in own if row["arm"] in CURVE)
        axis.plot([l0 for l0, _ in curve], [value for _, value in curve], "-", color="grey", linewidth=0.8)
        axis.plot([], [], "os^D"[i % 4], color="grey", label=f"d_sae {d_sae}")
        for row in own:
            axis.plot(row["l0"], row[key], "os^D"[i % 4], color=colours[row["arm"]], markersize=8)
            if d_sae == sizes[-1]:
                where = {"xytext": (4, 4), "textcoords": "offset points"}
                axis.annotate(row["arm"], (row["l0"], row[key]), fontsize=7, **where)
    axis.set(xscale="log", yscale="log", xlabel="L0 (mean support size)")
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower left")


def draw_supports(axis, rows: list[dict], colours: dict) -> None:
    """For each arm a bar over the quantiles of its support sizes."""
    for place, row in enumerate(rows):
        q = row["support_quantiles"]
        axis.plot([q[1], q[-2]], [place, place], "-", color=colours[row["arm"]], linewidth=2)
        axis.plot([q[5], q[15]], [place, place], "-", color=colours[row["arm"]], linewidth=7)
        axis.plot(q[10], place, "|", color="black", markersize=12)
    axis.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize=8)
    axis.set(xscale="symlog", xlabel="support size of a token: 5, 25, 50, 75, 95%")
    axis.grid(alpha=0.3)
