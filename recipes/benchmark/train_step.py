"""What a training step costs: forward and backward, in units of one score product.

    recipes/benchmark/peers_env && .venv-peers/bin/python recipes/benchmark/train_step.py [--quick] [--device cuda]

All sides get the same activations, width 576 and support 64, in one process, in turn: saehooks (concepts and a linear
dictionary), SAELens's TopK dense and with sparse activations, and the published sparsemax formulation, written plainly.
Without SAELens (any other environment) its columns are left out. Also: memory, one optimiser step, supports that grow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import arguments, figure, interleaved, machine, peak_memory, save, summary, table
from peers import Peer, PublishedSparsemax, installed, sae_lens_topk
from torch import Tensor, nn

from saehooks import SAE

WIDTH, SUPPORT = 576, 64
OURS = "saehooks sparsemax"


def stepper(model: Any, x: Tensor, recons: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """One forward and backward of the mean squared error; gradients start from nothing."""

    def step() -> None:
        (recons(x) - x).square().sum(1).mean().backward()
        forget_gradients(model)

    return step


def forget_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def peer_stepper(peer: Peer, x: Tensor) -> Callable[[], None]:
    """One forward and backward of a peer's own loss."""

    def step() -> None:
        peer.loss(x).backward()
        forget_gradients(peer.model)

    return step


def concepts(d_sae: int, x: Tensor, support: float = SUPPORT) -> tuple[SAE, float]:
    """A concept SAE whose keys are scaled so that it selects about ``support`` latents a row."""
    sae = SAE(WIDTH, d_sae).to(x.device)
    low, high = 0.05, 50.0
    with torch.no_grad():
        for _ in range(12):
            scale = (low * high) ** 0.5
            sae.dictionary.W_k.copy_(torch.eye(WIDTH) * scale)
            size = float(sae.encode(x[:64]).support_size.double().mean())
            low, high = (scale, high) if size > support else (low, scale)
    return sae, scale


def case(rows: int, d_sae: int, args: Any, peers: bool = True) -> dict[str, Any]:
    """Time a step of every side on one batch."""
    torch.manual_seed(0)
    x = torch.randn(rows, WIDTH, device=args.device)
    sae, scale = concepts(d_sae, x)
    linear = SAE(WIDTH, d_sae, "linear", "topk", k=SUPPORT).to(args.device)
    keys, scores = sae.dictionary.C.detach(), x.new_empty(rows, d_sae)
    jobs: dict[str, Callable[[], Any]] = {
        "product": lambda: torch.mm(x, keys.T, out=scores),
        OURS: stepper(sae, x, lambda x: sae(x).recons),
        "saehooks topk, linear": stepper(linear, x, lambda x: linear(x).recons),
    }
    if peers:
        concept = nn.functional.normalize(torch.randn(d_sae, WIDTH), dim=1).to(args.device)
        published = PublishedSparsemax(concept, scale)
        jobs["published sparsemax"] = stepper(published, x, published)
        if installed("sae_lens"):
            sizes = WIDTH, d_sae, SUPPORT, x.device
            jobs["SAELens topk"] = peer_stepper(sae_lens_topk(*sizes), x)
            jobs["SAELens topk, rescaled"] = peer_stepper(sae_lens_topk(*sizes, rescale=True), x)
            jobs["SAELens topk, sparse"] = peer_stepper(sae_lens_topk(*sizes, sparse=True), x)
    found = summary(interleaved(jobs, args), "product")
    memory = {name: peak_memory(job, args.device) for name, job in jobs.items() if name != "product"}
    support = float(sae.encode(x).support_size.double().mean())
    return {"rows": rows, "d_sae": d_sae, "support": support, "times": found, "peak_mb": memory}


def optimiser(d_sae: int, args: Any) -> dict[str, Any]:
    """Adam on the SAE's parameters, fused and as torch does it by default, beside one step's forward and backward."""
    x = torch.randn(1024, WIDTH, device=args.device)
    sae, _ = concepts(d_sae, x)
    (sae(x).recons - x).square().sum(1).mean().backward()
    grads = [parameter.grad for parameter in sae.parameters()]
    scores = x.new_empty(1024, d_sae)
    jobs: dict[str, Callable[[], Any]] = {"product": lambda: torch.mm(x, sae.dictionary.C.detach().T, out=scores)}
    for name, settings in (("Adam fused", {"fused": True}), ("Adam default", {})):
        adam = torch.optim.Adam(sae.parameters(), lr=1e-9, **settings)

        def update(adam: torch.optim.Adam = adam) -> None:
            for parameter, grad in zip(sae.parameters(), grads, strict=True):
                parameter.grad = grad
            adam.step()

        jobs[name] = update
    return {"rows": 1024, "d_sae": d_sae, "times": summary(interleaved(jobs, args), "product")}


def largest_memory(rows: int, d_sae: int, args: Any) -> dict[str, float]:
    """Megabytes of a step beyond the parameters, their gradients and the optimiser's state."""
    x = torch.randn(rows, WIDTH, device=args.device)
    sae, _ = concepts(d_sae, x)
    grads = sum(parameter.numel() * parameter.element_size() for parameter in sae.parameters()) / 2**20
    peak = peak_memory(stepper(sae, x, lambda x: sae(x).recons), args.device)
    return {"rows": rows, "d_sae": d_sae, "peak_mb_beyond_gradients": peak - grads, "gradients_mb": grads}


def supports(rows: int, d_sae: int, wanted: tuple[int, ...], args: Any) -> list[dict[str, Any]]:
    """A step as the support grows, as it does in the first steps of a training."""
    out = []
    x = torch.randn(rows, WIDTH, device=args.device)
    scores = x.new_empty(rows, d_sae)
    for support in wanted:
        sae, _ = concepts(d_sae, x, support)
        keys = sae.dictionary.C.detach()
        jobs = {
            "product": lambda keys=keys: torch.mm(x, keys.T, out=scores),
            OURS: stepper(sae, x, lambda x, sae=sae: sae(x).recons),
        }
        measured = float(sae.encode(x).support_size.double().mean())
        found = summary(interleaved(jobs, args), "product")
        out.append({"rows": rows, "d_sae": d_sae, "support": measured, "times": found})
    return out


def report(cases: list[dict[str, Any]], what: str = "step") -> None:
    """Ratios to the product, and of the peers to us."""
    names = [name for name in cases[0]["times"] if name != "product"]
    head = ("rows", "latents", *names)
    rows = [(c["rows"], c["d_sae"], *(c["times"][n]["ratio"] if n in c["times"] else "" for n in names)) for c in cases]
    print(f"\nA {what}, in units of the score product (medians of ratios within a round):")
    print(table(rows, head))
    if OURS in names:
        rows = [
            (
                c["rows"],
                c["d_sae"],
                *(c["times"][n]["ratio"] / c["times"][OURS]["ratio"] for n in names if n in c["times"]),
            )
            for c in cases
        ]
        print(f"\nHow many times as long as {OURS}:")
        print(table(rows, head))
    if "peak_mb" in cases[0]:
        rows = [(c["rows"], c["d_sae"], *(c["peak_mb"].get(n, "") for n in names)) for c in cases]
        print("\nPeak megabytes beyond the parameters, gradients included:")
        print(table(rows, head))


def draw(axes: Any, sweeps: dict[str, Any]) -> None:
    """Steps over latents and rows, and ours over the support."""
    for axis, (over, key) in zip(axes, (("latents", "d_sae"), ("rows", "rows"), ("support", "support")), strict=True):
        for name in sweeps[over][0]["times"]:
            xs = [c[key] for c in sweeps[over] if name in c["times"]]
            ys = [c["times"][name]["fastest"] * 1e3 for c in sweeps[over] if name in c["times"]]
            axis.plot(xs, ys, marker="o", ms=3, lw=2.5 if name.startswith("saehooks") else 1, label=name)
        axis.set(xscale="log", yscale="log", xlabel=over, ylabel="milliseconds")
    axes[0].legend(fontsize=6)


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    print(machine(args))
    main_rows = 512 if args.quick else 2048
    latents = (3072,) if args.quick else (3072, 12288, 49152)
    large = (1024, 24576) if args.quick else (4096, 49152)
    sweeps: dict[str, Any] = {"main": [case(main_rows, 24576, args)]}
    report(sweeps["main"])
    sweeps["latents"] = [case(512, d_sae, args) for d_sae in latents]
    report(sweeps["latents"])
    sweeps["rows"] = [case(rows, 12288, args, peers=False) for rows in ((128,) if args.quick else (128, 512, 2048))]
    sweeps["support"] = supports(256, 12288, (256,) if args.quick else (16, 64, 256, 1024, 4096), args)
    sweeps["optimiser"] = [optimiser(24576, args)]
    report(sweeps["rows"])
    report(sweeps["support"])
    report(sweeps["optimiser"], "update")
    sweeps["memory"] = [largest_memory(*large, args)]
    print(f"\nMemory at {large[0]} rows, {large[1]} latents: {sweeps['memory'][0]}")
    save("train_step", {"width": WIDTH, "support": SUPPORT, "sweeps": sweeps}, args)
    figure("train_step", args, lambda axes: draw(axes, sweeps), panels=3)


if __name__ == "__main__":
    main()
