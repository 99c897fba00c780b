"""Table and picture of compare_architectures.py, from its rows of results."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from statistics import mean

import numpy as np

from saehooks.show import figures

CURVE = ("topk, k/2", "topk", "topk, 2k")
"""The arms between which TopK's figures at any L0 are read off."""


GROUP = ("at", "d_sae", "seed")
"""What rows that are compared have in common."""


def at_same_l0(rows: list[dict]) -> None:
    """TopK's figures at each row's own L0: between (or beyond) its three arms, straight in logarithms."""
    for row in rows:
        arms = [r for r in rows if r["arm"] in CURVE and all(r.get(key) == row.get(key) for key in GROUP)]
        for key in ("nmse", "token_nmse", "ce_degradation"):
            row[f"topk_{key}"] = on_curve(row["l0"], sorted((r["l0"], r[key]) for r in arms))


def on_curve(l0: float, curve: list[tuple[float, float]]) -> float:
    if len(curve) < 2 or l0 <= 0 or min(value for _, value in curve) <= 0:
        return math.nan
    x, (xs, ys) = math.log(l0), np.log(np.array(curve)).T
    i = int(np.clip(np.searchsorted(xs, x), 1, len(xs) - 1))
    return math.exp(ys[i - 1] + (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1]) * (x - xs[i - 1]))


COLUMNS = {
    "at": "{}",
    "d_sae": "{}",
    "seed": "{}",
    "arm": "{}",
    "lr": "{}",
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
    told = "".join(f"{name}: {value}\n" for name, value in facts.items())
    cells = ([form.format(row.get(name, math.nan)) for name, form in COLUMNS.items()] for row in rows)
    text = f"{told}\n{beside_topk(rows)}\nAll figures, each seed by itself:\n\n{markdown_table(COLUMNS, cells)}"
    (folder / "table.md").write_text(text)


BESIDE = {"token_nmse": "NMSE by token", "ce_degradation": "CE +", "nmse": "NMSE"}
"""Figures of `beside_topk`, by the heads of their columns."""


def beside_topk(rows: list[dict]) -> str:
    """A table in Markdown of each arm at each site and size, mean over seeds: its errors, and by what share they are
    above or below TopK's at the same L0."""
    lines: dict[tuple, list[dict]] = {}
    for row in rows:
        lines.setdefault((row["at"], row["d_sae"], row["arm"]), []).append(row)
    heads = ["at", "d_sae", "arm", "seeds", "lr", "L0", "dead"]
    cells = []
    for (at, d_sae, arm), own in lines.items():
        line = [at, str(d_sae), arm, str(len(own)), "{:g}".format(own[0]["lr"])]
        line += [f"{mean(row['l0'] for row in own):.1f}", f"{mean(row['dead'] for row in own):.0f}"]
        for key in BESIDE:
            change = mean(row[key] / row[f"topk_{key}"] for row in own) - 1
            line += [f"{mean(row[key] for row in own):.4f}", "" if math.isnan(change) else f"{change:+.0%}"]
        cells.append(line)
    return markdown_table([*heads, *(one for head in BESIDE.values() for one in (head, "beside TopK"))], cells)


def markdown_table(columns: Collection[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, from the names of its columns and the text of its cells."""
    head, *body = ("| " + " | ".join(line) + " |" for line in [columns, *rows])
    return "\n".join([head, "|" + "---|" * len(columns), *body]) + "\n"


FIGURES = {
    "nmse": "NMSE (few tokens of huge norm weigh most)",
    "token_nmse": "mean over tokens of squared error / squared norm",
    "ce_degradation": "CE degradation (nats)",
}


MINE = ("sparsemax", "sparsemax, the default")
"""The arms that stand out; all others are muted."""


def draw(rows: list[dict], path: Path) -> None:
    """Three figures against L0, and the support sizes of the largest dictionaries."""
    figure, (*against_l0, supports) = figures.blank(2, 2, width=17, height=12)
    for axis, (key, label) in zip(against_l0, FIGURES.items(), strict=True):
        draw_against_l0(axis, rows, key)
        axis.set_ylabel(label)
    largest = max(row["d_sae"] for row in rows)
    draw_supports(supports, [row for row in rows if row["d_sae"] == largest])
    supports.set_title(f"d_sae {largest}", color=figures.INK)
    figure.savefig(path, dpi=110)


def draw_against_l0(axis, rows: list[dict], key: str) -> None:
    """A mark for each arm, one shape for each size, and TopK's curve through its arms."""
    sizes = sorted({row["d_sae"] for row in rows})
    for i, d_sae in enumerate(sizes):
        own = [row for row in rows if row["d_sae"] == d_sae]
        curve = sorted((row["l0"], row[key]) for row in own if row["arm"] in CURVE)
        axis.plot([l0 for l0, _ in curve], [value for _, value in curve], "-", color=figures.GREYS[2], linewidth=1)
        axis.plot([], [], "os^D"[i % 4], color=figures.GREYS[1], label=f"d_sae {d_sae}")
        for row in own:
            mine = row["arm"] in MINE
            look = {"color": figures.BLUE, "markersize": 11, "zorder": 3} if mine else {"color": figures.GREYS[1]}
            axis.plot(row["l0"], row[key], "os^D"[i % 4], **{"markersize": 7, **look})
    axis.set(xscale="log", yscale="log", xlabel="L0 (mean support size)")
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower left", frameon=False, labelcolor=figures.INK)
    label_marks(axis, [row for row in rows if row["d_sae"] == sizes[-1]], key)


PLACES = [(6, 4), (6, -10), (-6, 4), (-6, -10), (6, 14), (6, -20), (-6, 14), (-6, -20), (6, 24), (6, -30)]
"""Where a name may stand beside its mark, in points; the first free one is taken."""


def label_marks(axis, rows: list[dict], key: str) -> None:
    """Names beside marks, none upon another: the arm that matters first, one without a free place not at all."""
    axis.figure.canvas.draw()
    scale, taken = axis.figure.dpi / 72, []
    for row in sorted(rows, key=lambda row: (row["arm"] not in MINE, len(row["arm"]))):
        x, y = axis.transData.transform((row["l0"], row[key]))
        width, height = 5.2 * scale * len(row["arm"]), 9 * scale
        for dx, dy in PLACES:
            left = x + dx * scale - (width if dx < 0 else 0)
            box = (left, y + dy * scale, left + width, y + dy * scale + height)
            if all(box[0] > b[2] or box[2] < b[0] or box[1] > b[3] or box[3] < b[1] for b in taken):
                taken.append(box)
                mine = row["arm"] in MINE
                axis.annotate(
                    row["arm"], (row["l0"], row[key]), xytext=(dx, dy), textcoords="offset points", fontsize=8,
                    ha="left" if dx > 0 else "right", color=figures.BLUE if mine else figures.INK,
                    fontweight="bold" if mine else "normal",
                )  # fmt: skip
                break


def draw_supports(axis, rows: list[dict]) -> None:
    """For each arm a bar from the 5% to the 95% quantile of its support sizes, and the median."""
    for place, row in enumerate(rows):
        colour = figures.BLUE if row["arm"] in MINE else figures.GREYS[1]
        axis.plot([row["l0_q05"], row["l0_q95"]], [place, place], "-", color=colour, linewidth=5)
        axis.plot(row["l0_median"], place, "|", color=figures.INK, markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize=8)
    for text in axis.get_yticklabels():
        text.set_color(figures.BLUE if text.get_text() in MINE else figures.INK)
    axis.set(xscale="symlog", xlabel="support size of a token: 5, 50, 95%")
    axis.grid(alpha=0.3)


def read_table(file: Path) -> list[dict]:
    """The rows of a table.csv."""
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    return [
        {name: value if name in ("arm", "at") else float(value or "nan") for name, value in row.items()} for row in rows
    ]


if __name__ == "__main__":  # python recipes/compare_table.py table.csv comparison.png: draws a table again
    read = read_table(Path(sys.argv[1]))
    draw([{**row, "d_sae": int(row["d_sae"])} for row in read], Path(sys.argv[2]))
