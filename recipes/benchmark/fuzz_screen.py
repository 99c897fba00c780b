"""Fuzz the CPU's screen against float64: random rules, shapes, scales and adversarial scores, for so many rows.

    python recipes/benchmark/fuzz_screen.py --rows 100000 --seed 0

Every selection is compared with the reference in float64; a latent that only one of the two selected must lie at the
threshold to the last bits of a float32 score. The error of every screened score is compared with its bound.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from saehooks import kernels
from saehooks.kernels import BatchTopK, Entmax, RowRule, Sparsemax, Threshold, TopK
from saehooks.kernels.cpu import screen


def rows_of(kind: int, n: int, d: int, made: torch.Generator) -> Tensor:
    """(n, d) float32 rows of a kind that is hard on rounding, or on selection."""
    x = torch.randn(n, d, generator=made)
    return (
        x,
        x * (torch.rand(n, d, generator=made) < 0.1),
        x.pow(5),
        torch.full((n, d), 1 + 2**-9 * 0.99) + 2**-12 * x,  # all entries round the same way
        torch.ones(n, d) + 1e-3 * x,  # scores of a row differ by little more than rounding
        x * torch.logspace(-6, 2, d),
        x.round(),  # many ties
        x.bfloat16().float(),
    )[kind]


def case(made: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None, RowRule | BatchTopK]:
    """Queries, keys, bias and rule."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=made))

    rows, d_sae, d = draw(1, 400), draw(64, 3000), (1, 3, 16, 33, 64, 130, 576)[draw(0, 7)]
    keys, queries = rows_of(draw(0, 8), d_sae, d, made), rows_of(draw(0, 8), rows, d, made)
    keys = keys / keys.norm(dim=1, keepdim=True).clamp(min=1e-9) if draw(0, 2) else keys
    queries = queries * 10.0 ** (4 * float(torch.rand((), generator=made)) - 2) / d**0.5
    bias = torch.randn(d_sae, generator=made) if draw(0, 2) else None
    theta = torch.rand(d_sae, generator=made) if draw(0, 2) else float(torch.randn((), generator=made))
    rules = (Sparsemax(), Entmax(1.5), Entmax(1.2), TopK(draw(1, 64)), Threshold(theta), BatchTopK(draw(1, 48)))
    return queries, keys, bias, rules[draw(0, len(rules))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = torch.Generator().manual_seed(args.seed)
    screen.MODE = "on"
    done, entries, worst, began = 0, 0, 0.0, time.perf_counter()
    while done < args.rows:
        queries, keys, bias, rule = case(made)
        found = kernels.select(queries, keys, rule, bias)
        wide = None if bias is None else bias.double()
        if isinstance(rule, Threshold) and isinstance(rule.theta, Tensor):
            exact_rule: RowRule | BatchTopK = Threshold(rule.theta.double())
        else:
            exact_rule = rule
        exact = kernels.select(queries.double(), keys.double(), exact_rule, wide)
        per_latent = isinstance(rule, Threshold) and isinstance(rule.theta, Tensor)
        if per_latent:  # each latent has a threshold of its own: compare what is above it
            shifted = (wide if wide is not None else 0.0) - rule.theta.double()
            zero = torch.zeros(len(queries), dtype=torch.float64)
            screen._compare(found, exact.with_threshold(zero), queries, keys, shifted)
        else:
            screen._compare(found, exact, queries, keys, bias)
        rounded = screen.rounded_keys(keys, bias)
        errors = screen._errors(queries[:8], rounded)
        if errors is not None:
            scores = (errors[0] @ rounded.table.T).double()
            truth = queries[:8].double() @ keys.double().T + (0.0 if wide is None else wide)
            bound = torch.from_numpy(errors[2])[:, None].double() + screen.ROUNDING * scores.abs()
            worst = max(worst, float(((scores - truth).abs() / bound).max()))
        done, entries = done + len(queries), entries + found.indices.numel()
    seconds = time.perf_counter() - began
    print(f"{done:,} rows, {entries:,} entries, no difference beyond the last bits of a score; worst error over bound "
          f"{worst:.3f}; {seconds:.0f} s, seed {args.seed}")  # fmt: skip


if __name__ == "__main__":
    main()
