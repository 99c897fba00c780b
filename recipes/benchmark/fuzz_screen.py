"""Fuzz the CPU's screen against float64: random rules, shapes, scales and adversarial scores, for so many rows.

    python recipes/benchmark/fuzz_screen.py --rows 100000 --seed 0 [--out results/cpu/fuzz_screen.json]

Every selection is compared with the reference in float64; a latent that only one of the two selected must lie at the
threshold to the last bits of a float32 score. The error of the first rows' screened scores is compared with its bound.
Most rows meet small tables, so that there can be millions; every sixth case is of a size in use.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from saehooks import kernels
from saehooks.kernels import BatchTopK, Entmax, RowRule, Sparsemax, Step, Threshold, TopK
from saehooks.kernels.cpu import screen
from saehooks.kernels.step import ScreenTables

KINDS = ("normal", "sparse", "heavy", "one way", "alike", "wide", "ties", "bfloat16", "twins", "opposed")


class Case(NamedTuple):
    """One selection."""

    kinds: tuple[str, str]
    """Of keys and queries."""
    queries: Tensor
    keys: Tensor
    bias: Tensor | None
    rule: RowRule | BatchTopK
    kept: bool
    """Whether the table's copy is kept, as an SAE in use keeps it."""


def rows_of(kind: str, n: int, d: int, made: torch.Generator) -> Tensor:
    """(n, d) float32 rows of a kind that is hard on rounding, or on selection."""
    x = torch.randn(n, d, generator=made)
    if kind == "sparse":
        return x * (torch.rand(n, d, generator=made) < 0.1)
    if kind == "heavy":
        return x.pow(5)
    if kind == "one way":  # all entries round the same way
        return torch.full((n, d), 1 + 2**-9 * 0.99) + 2**-12 * x
    if kind == "alike":  # scores of a row differ by little more than rounding
        return torch.ones(n, d) + 1e-3 * x
    if kind == "wide":
        return x * torch.logspace(-6, 2, d)
    if kind == "ties":
        return x.round()
    if kind == "bfloat16":
        return x.bfloat16().float()
    if kind == "twins":  # each row many times, a few last bits apart: scores crowd at any threshold
        few = x[: max(1, n // 16)]
        near = few[torch.randint(0, len(few), (n,), generator=made)]
        return near * (1 + 2.0**-22 * torch.randint(-4, 5, (n, 1), generator=made))
    if kind == "opposed":  # large terms that cancel
        return torch.cat([x, -x], dim=1)[:, :d] * 100 + 0.01 * torch.randn(n, d, generator=made)
    return x


def case(made: torch.Generator) -> Case:
    """A random case."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=made))

    size = draw(0, 6)
    if size < 3:
        rows, d_sae, d = draw(5000, 30000), draw(64, 160), (1, 3, 8, 16)[draw(0, 4)]
    elif size < 5:
        rows, d_sae, d = draw(1, 2000), draw(64, 400), (1, 3, 16, 33, 64)[draw(0, 5)]
    else:
        rows, d_sae, d = draw(1, 200), draw(400, 4000), (1, 33, 130, 576)[draw(0, 4)]
    rows = draw(1, 17) if draw(0, 8) == 0 else rows
    kinds = KINDS[draw(0, len(KINDS))], KINDS[draw(0, len(KINDS))]
    keys, queries = rows_of(kinds[0], d_sae, d, made), rows_of(kinds[1], rows, d, made)
    keys = keys / keys.norm(dim=1, keepdim=True).clamp(min=1e-9) if draw(0, 2) else keys
    queries = queries * 10.0 ** (4 * float(torch.rand((), generator=made)) - 2) / d**0.5
    bias = torch.randn(d_sae, generator=made) if draw(0, 2) else None
    theta = torch.rand(d_sae, generator=made) if draw(0, 2) else float(torch.randn((), generator=made))
    rules = (Sparsemax(), Entmax(1.5), Entmax(1.2), TopK(draw(1, 64)), Threshold(theta), BatchTopK(draw(1, 48)))
    return Case(kinds, queries, keys, bias, rules[draw(0, len(rules))], bool(draw(0, 2)))


def compare(one: Case) -> int:
    """Entries that the screen selected; an error where float64 selects others."""
    queries, keys, bias, rule = one.queries, one.keys, one.bias, one.rule
    found = kernels.select(queries, keys, rule, bias, step=Step(screen_tables=ScreenTables() if one.kept else None))
    wide = None if bias is None else bias.double()
    if isinstance(rule, Threshold) and isinstance(rule.theta, Tensor):
        # Each latent has a threshold of its own: compare what is above it.
        exact = kernels.select(queries.double(), keys.double(), Threshold(rule.theta.double()), wide)
        shifted = (wide if wide is not None else 0.0) - rule.theta.double()
        exact = exact.with_threshold(torch.zeros(len(queries), dtype=torch.float64))
        screen._compare(found, exact, queries, keys, shifted)
    else:
        exact = kernels.select(queries.double(), keys.double(), rule, wide)
        screen._compare(found, exact, queries, keys, bias)
    return found.indices.numel()


def error_over_bound(one: Case, rows: int = 8) -> float:
    """The largest error of a screened score of the first rows, shifted as selection may shift them, over its bound."""
    queries, keys, bias = one.queries[:rows].contiguous(), one.keys, one.bias
    rounded = screen.rounded_keys(keys, bias)
    made = screen.rounded_queries(queries)
    errors = screen.rounding_errors(made, rounded)
    if errors is None:
        return 0.0
    truth = queries.double() @ keys.double().T + (0.0 if bias is None else bias.double())
    shifts = torch.zeros(len(queries))
    given = rounded, made.table, made.norms[0].astype(float), errors, shifts.numpy()
    job = screen._Job(queries, keys, one.rule, one.rule, bias, *given)
    worst = 0.0
    for shift in (0.0, float(truth.max())):
        job.shift_all(shift)
        scores = (job.half @ rounded.table.T).double()
        bound = torch.from_numpy(job.errors)[:, None].double() + screen.ROUNDING * scores.abs()
        worst = max(worst, float(((scores - truth + shifts[:, None]).abs() / bound).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file, written over every minute")
    args = parser.parse_args()
    made = torch.Generator().manual_seed(args.seed)
    screen.MODE = "on"
    done, entries, worst, began, told = 0, 0, 0.0, time.perf_counter(), 0.0
    by_rule: Counter[str] = Counter()
    while done < args.rows:
        one = case(made)
        entries += compare(one)
        worst = max(worst, error_over_bound(one))
        done += len(one.queries)
        by_rule[type(one.rule).__name__] += len(one.queries)
        if time.perf_counter() - told > 60 or done >= args.rows:
            told = time.perf_counter()
            found = {
                "rows": done, "entries": entries, "worst_error_over_bound": worst, "rows_by_rule": dict(by_rule),
                "seed": args.seed, "seconds": round(told - began), "torch": torch.__version__, "cores": os.cpu_count(),
            }  # fmt: skip
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{done:,} rows, {entries:,} entries, no difference beyond the last bits of a score; worst error "
                  f"over bound {worst:.3f}; {told - began:.0f} s, seed {args.seed}", flush=True)  # fmt: skip
            if worst > 1:
                raise SystemExit("the bound does not hold")


if __name__ == "__main__":
    main()
