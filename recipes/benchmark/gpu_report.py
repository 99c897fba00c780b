"""The machine, tables and pictures of the GPU benchmark; needs nothing but torch."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

SECTIONS = {
    "exact": "Against float64: largest distance from the threshold, relative to the scores, of an entry that only one "
    "of the two selected; gradients as relative norms.",
    "peaks": "What this device does at best; the floors below are taken from it.",
    "profile": "One step at the reference size, each part on its own, in the order of the step.",
    "kernels": "The same step as torch.profiler accounts for it, by kernel.",
    "select": "Selection on given scores; ours and amax as CUDA graphs.",
    "encode": "Product and selection, scores written and not, against the vendor's bfloat16 product.",
    "decode": "Sparse products against the dense one, order by column included in spmm_transposed.",
    "step": "Ours as CUDA graphs, unless it says Python. fb is forward and backward with written gradients; step adds "
    "Adam, fused into the tables' gradients.",
    "others": "Steps of others with fused Adam, products in bfloat16, launched from Python, and how many times as long "
    "they take as ours launched likewise (and as our CUDA graph).",
    "trainer": "`Trainer.step`, launched from Python: means over ten steps, one of which writes a record; none dead.",
    "attach": "A forward of a decoder with bfloat16 weights, an SAE at half depth.",
    "generate": "The same decoder generating token by token through its KV cache, on the host's clock.",
    "select plans": "Launch shapes of the selection, the default first.",
    "product plans": "Launch shapes of the product that writes no scores, selection included, the default first.",
}
"""Sections in the order of the report, and what their numbers are."""


def machine(interpreted: bool) -> dict[str, Any]:
    """Versions and hardware, without names of hosts or people."""
    versions = {}
    for name in ("torch", "triton", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions, "interpreted": interpreted}
    if not interpreted:
        found["gpu"] = torch.cuda.get_device_name()
        found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9)
        found["cuda"] = torch.version.cuda
    return found


def ratio(mine: float | None, other: float | None) -> float | None:
    """mine / other where both were measured."""
    return None if mine is None or other is None else mine / other


def page(found: dict[str, Any], goals: list[Row], explanations: list[str], advice: list[str]) -> str:
    """The report in Markdown: goals, what missed them, what did not run, then a table a section."""
    said = json.dumps(found["machine"])
    parts = [f"# GPU benchmark\n\n`{said}`\n\n{found['rows']} rows; times are medians, in ms; - was not measured."]
    if found["machine"]["interpreted"]:
        parts.append("Run in Triton's interpreter at toy size, to show that it runs: **nothing was timed**.")
    where = ", ".join(f"{key} {value:,}" for key, value in found["reference"].items())
    parts.append(f"## Goals\n\nMeasured at {where}.\n\n{table(goals)}")
    if explanations:
        parts.append(
            "Missed, and the parts of the profile that take longest beyond their floor:\n\n" + "\n".join(explanations)
        )
    for title in ("failed", "uncaptured", "skipped"):
        if found[title]:
            parts.append(f"## {title.capitalize()}\n\n" + "\n".join(f"- {line}" for line in found[title]))
    for name, meaning in SECTIONS.items():
        if found.get(name):
            parts.append(f"## {name.capitalize()}\n\n{meaning}\n\n{table(found[name])}")
    parts.append("## Launch shapes\n\n" + "\n".join(f"- {line}" for line in advice))
    return "\n\n".join(parts) + f"\n\n{found['minutes']:.1f} minutes.\n"


def table(rows: list[Row]) -> str:
    """A Markdown table of rows, whose columns are all that any row names; what was not measured is a dash."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = [header, *([_short(row.get(key)) for key in header] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    shown = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([shown[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *shown[1:]])


def _short(cell: Any) -> str:
    if cell is None:
        return "-"
    if not isinstance(cell, float):
        return f"{cell:,}" if type(cell) is int else str(cell).replace("|", "/")
    return f"{cell:.1e}" if 0 < abs(cell) < 1e-3 else f"{cell:.3f}" if abs(cell) < 10 else f"{cell:.0f}"


def bars(where: Path, title: str, groups: dict[str, dict[str, float | None]]) -> None:
    """Horizontal bars as SVG: groups of named values, the scale shared. Nothing measured, nothing drawn."""
    values = [value for group in groups.values() for value in group.values() if value is not None]
    if not values:
        return
    most, y, parts = max(values), 34, []
    for group, named in groups.items():
        parts.append(f'<text x="8" y="{y + 4}" font-weight="bold">{group}</text>')
        y += 18
        for name, value in named.items():
            if value is None:
                continue
            colour = "#b8442c" if name.startswith(("saehooks", "step", "ms")) else "#8a93a0"
            parts.append(f'<text x="16" y="{y + 4}">{name}</text>')
            parts.append(f'<rect x="250" y="{y - 7}" width="{360 * value / most:.1f}" height="12" fill="{colour}"/>')
            parts.append(f'<text x="{256 + 360 * value / most:.1f}" y="{y + 4}">{_short(value)}</text>')
            y += 17
        y += 8
    where.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{y}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="16" font-size="13">{title}</text>'
        + "".join(parts)
        + "</svg>\n"
    )


def pictures(found: dict[str, Any], folder: Path) -> None:
    """One SVG for each section that has times to compare; none where nothing was timed."""
    titles = {
        "select": lambda row: f"{row['d_sae']:,} latents, support {row['support']}",
        "step": lambda row: f"{row['d_sae']:,} latents, width {row['d_in']:,}, support {row['support']}",
        "others": lambda row: f"{row['who']}, {row['d_sae']:,} latents, width {row['d_in']:,}",
        "profile": lambda row: row["part"],
        "attach": lambda row: f"{row['verb']}, {row['SAE']}, capacity: {row['capacity']}",
    }
    for name, title in titles.items():
        groups = {
            title(row): {
                key.removesuffix(" ms"): value for key, value in row.items() if key.endswith(" ms") or key == "ms"
            }
            for row in found.get(name, [])
        }
        bars(folder / f"gpu_{name}.svg", f"{name}: milliseconds, {found['rows']:,} rows", groups)
