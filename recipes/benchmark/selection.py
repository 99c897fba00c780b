"""How much the threshold costs: selecting from given scores, in units of the product that made them.

    python recipes/benchmark/selection.py [--quick] [--device cuda]

All sides get the same scores, in one process, in turn: saehooks (sparsemax, top-k), sparsemax by torch.sort, entmax
1.3 with and without k, torch.topk, and one pass over the scores (amax). Sweeps the latents, the rows and the support.
"""

from __future__ import annotations

from typing import Any

import torch
from common import arguments, figure, interleaved, machine, peak_memory, queries_and_keys, save, summary, table
from torch import Tensor

from saehooks import kernels
from saehooks.activations import sparsemax

WIDTH = 576
OURS, OURS_TOPK = "saehooks sparsemax", "saehooks topk 64"
PEERS = ("torch.sort sparsemax", "entmax", "entmax k=512", "torch.topk 64", "amax")


def sort_sparsemax(scores: Tensor) -> Tensor:
    """Sparsemax as it is published: sort, cumulative sum, threshold. Source: arXiv:1602.02068, Alg. 1."""
    ordered = scores.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - 1
    rank = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
    size = (rank * ordered > excess).sum(1, keepdim=True)
    return (scores - excess.gather(1, size - 1) / size).clamp(min=0)


def case(rows: int, d_sae: int, support: int, args: Any, peers: bool = True) -> dict[str, Any]:
    """Time every side on one set of scores."""
    queries, keys = queries_and_keys(rows, d_sae, WIDTH, support, args.device)
    scores = torch.mm(queries, keys.T)
    jobs = {
        "product": lambda: torch.mm(queries, keys.T, out=scores),
        OURS: lambda: kernels.select_rows(scores, kernels.Sparsemax()),
        OURS_TOPK: lambda: kernels.select_rows(scores, kernels.TopK(64)),
        "torch.topk 64": lambda: scores.topk(64, dim=1),
        "amax": lambda: scores.amax(1),
    }
    if peers:
        import entmax

        jobs["torch.sort sparsemax"] = lambda: sort_sparsemax(scores)
        jobs["entmax"] = lambda: entmax.sparsemax(scores, dim=1)
        jobs["entmax k=512"] = lambda: entmax.sparsemax(scores, dim=1, k=512)
    found = summary(interleaved(jobs, args, before=jobs["product"]), "product")
    measured = kernels.select_rows(scores, kernels.Sparsemax()).indices.numel() / rows
    memory = {name: peak_memory(job, args.device) for name, job in jobs.items()} if peers else {}
    return {"rows": rows, "d_sae": d_sae, "support": measured, "times": found, "peak_mb": memory}


def exactness(d_sae: int, args: Any) -> dict[str, float]:
    """Largest L1 distance of a row to sparsemax in float64, over kinds of rows and scales 1e-4 to 1e4."""
    made = torch.Generator().manual_seed(0)
    z = torch.randn(8, d_sae, generator=made)
    kinds = {
        "random": z,
        "trained-like": 0.1 * z + z.abs().pow(3) * (torch.rand(8, d_sae, generator=made) < 0.05),
        "tied": z.round(),
        "sorted columns": z.sort(dim=1).values,
        "block": z + 5.0 * (torch.arange(d_sae) < d_sae // 16),
        "all equal": torch.ones(8, d_sae),
        "two levels": torch.where(z > 0, 1.0, 1.0 - 2.0 / d_sae),
        "geometric": -torch.logspace(-12, 0, d_sae).expand(8, -1),
    }
    out = {}
    for name, rows in kinds.items():
        worst = 0.0
        for scale in (1e-4, 1e-2, 1.0, 1e2, 1e4):
            scores = (rows * scale).to(args.device)
            exact = sort_sparsemax(scores.double() - scores.double().amax(1, keepdim=True))
            worst = max(worst, float((sparsemax(scores).probs.double() - exact).abs().sum(1).max()))
        out[name] = worst
    return out


def report(cases: list[dict[str, Any]]) -> None:
    """Print the ratios to the product, and how far ahead or behind each peer is."""
    names = list(cases[0]["times"])
    rows = [
        (
            case["rows"],
            case["d_sae"],
            case["support"],
            *(case["times"].get(name, {}).get("ratio", "") for name in names),
        )
        for case in cases
    ]
    print("\nTimes, in units of the score product (medians):")
    print(table(rows, ("rows", "latents", "support", *names)))
    peers = [name for name in names if name in PEERS]
    rows = [(case["rows"], case["d_sae"], case["support"], *(_times(case, name) for name in peers)) for case in cases]
    print(f"\nHow many times as long as {OURS}:")
    print(table(rows, ("rows", "latents", "support", *peers)))


def _times(case: dict[str, Any], name: str) -> Any:
    times = case["times"]
    return times[name]["ratio"] / times[OURS]["ratio"] if name in times else ""


def draw(axes: Any, sweeps: dict[str, list[dict[str, Any]]]) -> None:
    """Seconds over latents, rows and support; the first with a line through the larger half, drawn to a million."""
    for axis, (over, key) in zip(axes, (("latents", "d_sae"), ("rows", "rows"), ("support", "support")), strict=True):
        cases = sweeps[over]
        for name in cases[0]["times"]:
            held = [case for case in cases if name in case["times"]]
            xs, ys = [c[key] for c in held], [c["times"][name]["fastest"] / c["rows"] * 1e6 for c in held]
            axis.plot(xs, ys, marker="o", ms=3, lw=2.5 if name.startswith("saehooks") else 1, label=name)
        axis.set(xscale="log", yscale="log", xlabel=over, ylabel="microseconds a row")
    rule = sweeps.get("extrapolation")
    if rule:
        predicted, checked = rule[0]["predicted"], rule[0]["measured"]
        axes[0].plot([rule[0]["d_sae"]], [predicted], "x", color="C1", ms=9, label=f"{OURS}, extrapolated")
        axes[0].plot([rule[0]["d_sae"]], [checked], "*", color="C1", ms=9, label=f"{OURS}, measured")
    axes[0].legend(fontsize=6)


def extrapolate(cases: list[dict[str, Any]], args: Any) -> dict[str, Any]:
    """Extend the line through the two largest dictionaries to 2^20 latents, and measure there."""
    small, large = (case for case in cases[-2:])
    xs = [small["d_sae"], large["d_sae"]]
    ys = [case["times"][OURS]["fastest"] / case["rows"] * 1e6 for case in (small, large)]
    slope = (ys[1] - ys[0]) / (xs[1] - xs[0])
    d_sae = 2**20
    scores = 0.3 * torch.randn(32, d_sae, generator=torch.Generator().manual_seed(0)).to(args.device)
    times = interleaved({OURS: lambda: kernels.select_rows(scores, kernels.Sparsemax())}, args)
    predicted, measured = ys[1] + slope * (d_sae - xs[1]), min(times[OURS]) / 32 * 1e6
    print(f"\nA million latents: {predicted:.0f} microseconds a row extrapolated, {measured:.0f} measured")
    return {"d_sae": d_sae, "predicted": predicted, "measured": measured}


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    print(machine(args))
    latents = (3072, 24576) if args.quick else (3072, 6144, 12288, 24576, 49152)
    rows = 256 if args.quick else 512
    sweeps: dict[str, Any] = {"latents": [case(rows, m, 64, args) for m in latents]}
    sweeps["rows"] = [case(n, 24576, 64, args, peers=False) for n in ((1, 64) if args.quick else (1, 16, 256, 2048))]
    sweeps["support"] = [case(256, 24576, s, args, peers=False) for s in ((256,) if args.quick else (8, 32, 128, 512))]
    for name, cases in sweeps.items():
        print(f"\n== over {name} ==")
        report(cases)
    sweeps["extrapolation"] = [extrapolate(sweeps["latents"], args)]
    exact = exactness(latents[-1], args)
    print("\nLargest L1 distance of a row to float64, over scales 1e-4 to 1e4:")
    print("\n".join(f"  {kind:15} {error:.1e}" for kind, error in exact.items()))
    save("selection", {"width": WIDTH, "sweeps": sweeps, "exactness": exact}, args)
    figure("selection", args, lambda axes: draw(axes, sweeps), panels=3)


if __name__ == "__main__":
    main()
