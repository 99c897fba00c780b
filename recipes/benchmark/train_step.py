"""What a training step costs: forward and backward, in units of one score product, beside the steps of others.

    recipes/benchmark/peers_env && .venv-peers/bin/python recipes/benchmark/train_step.py [--quick] [--device cuda]

All sides get the same activations in one process: saehooks (sparsemax over concepts, and four activations of a linear
dictionary), SAELens, sparsify and the published sparsemax; their packages where installed, their algorithms in plain
torch where not. Also: memory, a step with Adam, and `Trainer.step` by operation (torch.profiler).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Bench, Case, Job, arguments, concept_sae, dense_products, per_fastest
from peers import PACKAGES, PLAIN, Peer, published_sparsemax
from torch import Tensor, nn

from saehooks import SAE, TrainConfig, Trainer
from saehooks.training.losses import LossConfig, training_loss

CPU = [Case(2048, 24576), Case(2048, 4608), Case(512, 3072), Case(512, 49152), Case(256, 24576, support=512)]
CUDA = [
    Case(4096, 49152, 768), Case(4096, 24576, 768), Case(4096, 3072, 768), Case(4096, 49152, 2048),
    Case(4096, 262144, 768),
]  # fmt: skip
LINEAR: dict[str, dict[str, Any]] = {
    "topk": {"activation": "topk"}, "batchtopk": {"activation": "batchtopk"}, "jumprelu": {"activation": "jumprelu"},
}  # fmt: skip


def forward_backward(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Job:
    """One forward and backward; gradients start from nothing."""

    def job() -> None:
        loss(x).backward()
        for parameter in model.parameters():
            parameter.grad = None

    return job


def ours(sae: SAE, x: Tensor) -> Job:
    """What a step of `saehooks.Trainer` does without its optimiser."""
    config = LossConfig(reconstruction="mse")
    return forward_backward(sae, x, lambda x: training_loss(sae, x, config).total)


def linear(case: Case, x: Tensor, **settings: Any) -> SAE:
    """A linear SAE in train mode that selects about ``support`` latents a row."""
    k = min(case.support, case.d_sae)
    more = {"start_l0": float(k)} if settings["activation"] == "jumprelu" else {"k": k}
    sae = SAE(case.d_in, case.d_sae, "linear", **settings, **more).to(x.device).train()
    sae.initialise(x)
    return sae


def with_adam(sae: SAE, x: Tensor, forecast: bool = True) -> Job:
    """`Trainer.step` on the same batch; without the forecast of code sizes each selection waits for the GPU."""
    trainer = Trainer(sae, TrainConfig(batch_size=len(x), buffer_rows=2 * len(x), lr=1e-6, log_every=10**9))
    if not forecast:
        trainer._forecast.capacity_for = lambda rows, d_sae: None
    return lambda: trainer.step(x)


def by_operation(bench: Bench, job: Job, rows: int = 12) -> None:
    """Print what torch.profiler saw of one step, by operation (CPU) or kernel (CUDA)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        job()
    order = f"self_{bench.device.type}_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=60))


def peers(case: Case, keys: Tensor, scale: float) -> dict[str, Callable[[], Peer]]:
    """Makers of the steps of others for one case."""
    sizes = case.d_in, case.d_sae, min(case.support, case.d_sae), keys.device
    makers = {name: partial(make, *sizes) for name, make in {**PLAIN, **PACKAGES}.items()}
    return makers | {"published sparsemax": partial(published_sparsemax, keys, scale)}


def measure(bench: Bench, case: Case, with_peers: bool) -> None:
    """Every side on one batch."""
    x = torch.randn(case.rows, case.d_in, generator=torch.Generator().manual_seed(0)).to(bench.device)
    sae, scale = concept_sae(case, x)
    jobs: dict[str, Job] = dense_products(x, sae.dictionary.C.detach())
    products = list(jobs)
    jobs["sparsemax, concepts"] = ours(sae, x)
    for name, settings in LINEAR.items():
        jobs[f"{name}, linear"] = ours(linear(case, x, **settings), x)
    jobs["Trainer.step"] = with_adam(concept_sae(case, x)[0], x)
    if bench.device.type == "cuda" or bench.toy:
        jobs["Trainer.step, no forecast"] = with_adam(concept_sae(case, x)[0], x, forecast=False)
    mine = list(jobs)[len(products) :]
    for name, make in (peers(case, sae.dictionary.C.detach(), scale) if with_peers else {}).items():
        with contextlib.suppress(ImportError):
            peer = make()
            jobs[name] = forward_backward(peer.model, x, peer.loss)
    times = per_fastest(bench.time(jobs, "torch.mm"), products)
    memory = {name: bench.peak_mb(jobs[name]) for name in mine[:2]}
    support = float(sae.encode(x).support_size.double().mean())
    bench.add("train step", case, times, measured_support=support, peak_mb=memory)
    if bench.args.profile:
        by_operation(bench, jobs["Trainer.step"])


def main() -> None:
    bench = Bench(arguments(__doc__.splitlines()[0], lambda p: p.add_argument("--profile", action="store_true")))
    for i, case in enumerate(bench.cases(CPU, CUDA)):
        measure(bench, case, with_peers=i < 2 and not bench.toy)
    bench.save("train_step")


if __name__ == "__main__":
    main()
