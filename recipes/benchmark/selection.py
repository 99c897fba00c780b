"""How much the threshold costs: selecting from given scores, in units of the product that made them.

    python recipes/benchmark/selection.py [--quick] [--device cuda]

All sides get the same scores, in one process: saehooks (sparsemax, top-k, threshold), sparsemax by torch.sort, entmax
with and without k, torch.topk, and one pass over the scores (amax). Every rule is first held against float64.
"""

from __future__ import annotations

import torch
from common import Bench, Case, arguments, queries_and_keys
from torch import Tensor

from saehooks import kernels
from saehooks.kernels import Entmax, Sparsemax, Threshold, TopK, reference, select_rows

CPU = [
    Case(512, 24576), Case(512, 3072), Case(512, 49152), Case(1, 24576), Case(16, 24576), Case(256, 24576, support=512),
]  # fmt: skip
CUDA = [Case(4096, d_sae, 768, support) for d_sae in (49152, 24576, 3072, 262144) for support in (64, 16, 200)]


def sort_sparsemax(scores: Tensor) -> Tensor:
    """Sparsemax as it is published: sort, cumulative sum, threshold. Source: arXiv:1602.02068, Alg. 1."""
    ordered = scores.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - 1
    rank = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
    size = (rank * ordered > excess).sum(1, keepdim=True)
    return (scores - excess.gather(1, size - 1) / size).clamp(min=0)


def hard_rows(d_sae: int) -> dict[str, Tensor]:
    """(8, d_sae) scores that are hard to select from."""
    z = torch.randn(8, d_sae, generator=torch.Generator().manual_seed(0))
    return {
        "random": z,
        "tied": z.round(),
        "sorted": z.sort(dim=1).values,
        "block": z + 5.0 * (torch.arange(d_sae) < d_sae // 16),
        "all equal": torch.ones(8, d_sae),
        "two levels": torch.where(z > 0, 1.0, 1.0 - 2.0 / d_sae),
        "geometric": -torch.logspace(-12, 0, d_sae).expand(8, -1),
    }


def exactness(bench: Bench, d_sae: int) -> None:
    """Largest distance from the threshold, relative to the scores, of a latent that only we or float64 selected."""
    rules = {
        "sparsemax": Sparsemax(),
        "entmax 1.5": Entmax(1.5),
        "top-k": TopK(min(64, d_sae)),
        "above 0.5": Threshold(0.5),
    }
    for kind, rows in hard_rows(d_sae).items():
        errors = {}
        for name, rule in rules.items():
            worst = 0.0
            for scale in (1e-4, 1.0, 1e4):
                scores = (rows * scale).to(bench.device)
                mine, exact = select_rows(scores, rule), reference.select_rows(scores.double(), rule)
                worst = max(worst, _distance(scores, mine, exact))
            errors[name] = {"ratio": worst, "note": f"{worst:.1e}"}
            if worst > 1e-5:
                raise SystemExit(f"NOT EXACT: {name} on {kind} rows is off by {worst:.1e}")
        bench.add("exact", Case(8, d_sae), errors, kind=kind)


def _distance(scores: Tensor, mine: kernels.Support, exact: kernels.Support) -> float:
    chosen = torch.zeros(2, *scores.shape, dtype=torch.bool, device=scores.device)
    for mask, support in zip(chosen, (mine, exact), strict=True):
        mask[support.rows, support.indices] = True
    gap = (scores.double() - exact.threshold[:, None]).abs() / scores.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return float((gap * (chosen[0] != chosen[1])).max())


def measure(bench: Bench, case: Case) -> None:
    """Every side on one set of scores."""
    queries, keys = queries_and_keys(case, bench.device)
    scores, k = queries @ keys.T, min(64, case.d_sae)

    def entmax(k: int | None = None) -> None:
        from entmax import sparsemax

        sparsemax(scores, dim=1, k=k)

    jobs = {
        "product": lambda: torch.mm(queries, keys.T, out=scores),
        "saehooks sparsemax": lambda: select_rows(scores, Sparsemax()),
        "saehooks top-k": lambda: select_rows(scores, TopK(k)),
        "torch.topk": lambda: scores.topk(k, dim=1),
        "amax": lambda: scores.amax(1),
        "sort": lambda: sort_sparsemax(scores),
        "entmax k=512": lambda: entmax(512),
        "entmax": entmax,
    }
    if case.rows > 512:  # a sort of so many takes too long, and too much memory
        jobs = {name: job for name, job in jobs.items() if name not in ("sort", "entmax")}
    support = select_rows(scores, Sparsemax()).indices.numel() / case.rows
    bench.add("selection", case, bench.time(jobs, "product", before=jobs["product"]), measured_support=support)


def main() -> None:
    bench = Bench(arguments(__doc__.splitlines()[0]))
    cases = bench.cases(CPU, CUDA)
    exactness(bench, cases[0].d_sae)
    for case in cases:
        measure(bench, case)
    bench.save("selection")


if __name__ == "__main__":
    main()
