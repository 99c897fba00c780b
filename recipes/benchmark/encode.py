"""What encoding costs: product and selection together, in units of the fastest exact float32 product.

    python recipes/benchmark/encode.py [--quick] [--device cuda] [--threads 1 --clock cpu]

Sparsemax, top-k, batch top-k and thresholds over 3,072 to 262,144 latents, 1 to 2,048 rows, supports 16 to 200: as an
SAE in use selects, which keeps its copy of the keys; "in training" makes it anew. On CPU also without the screen (see
saehooks/kernels/cpu/screen.py).
"""

from __future__ import annotations

from functools import partial

import torch
from common import Bench, Case, Job, arguments, dense_products, per_fastest, queries_and_keys
from torch import Tensor

from saehooks import kernels
from saehooks.kernels import BatchTopK, RowRule, Sparsemax, Step, Threshold, TopK
from saehooks.kernels.step import ScreenTables

CPU = [
    Case(2048, 24576), Case(2048, 4608), Case(512, 3072), Case(512, 49152), Case(2048, 24576, support=16),
    Case(2048, 24576, support=200), Case(512, 262144), Case(128, 24576), Case(16, 24576), Case(1, 24576), Case(1, 3072),
]  # fmt: skip
CUDA = [
    Case(4096, 49152, 768), Case(4096, 24576, 768), Case(16384, 24576, 768), Case(4096, 262144, 768),
    Case(1, 49152, 768),
]  # fmt: skip


def unscreened(queries: Tensor, keys: Tensor) -> kernels.Support:
    """Selection from float32 products of everything."""
    from saehooks.kernels.cpu import screen

    before, screen.MODE = screen.MODE, "off"
    try:
        return kernels.select(queries, keys, Sparsemax())
    finally:
        screen.MODE = before


def screened_on_gpu(queries: Tensor, keys: Tensor) -> kernels.Support:
    """Selection from bfloat16 products and float32 scores of the candidates; off by default until it is measured."""
    from saehooks.kernels.gpu import scores, select

    rule = select.describe(Sparsemax(), keys.shape[0], keys.device)
    found = scores.select_screened(queries, keys, rule, None) if rule else None
    if found is None:
        raise RuntimeError("a row had too many candidates")
    return found


def main() -> None:
    bench = Bench(arguments(__doc__.splitlines()[0]))
    for case in bench.cases(CPU, CUDA):
        queries, keys = queries_and_keys(case, bench.device)
        k = min(case.support, case.d_sae)
        theta = float(kernels.select(queries, keys, TopK(k)).threshold.median())
        rules: dict[str, RowRule | BatchTopK] = {
            "sparsemax": Sparsemax(), "top-k": TopK(k), "batch top-k": BatchTopK(k), "threshold": Threshold(theta),
        }  # fmt: skip
        jobs: dict[str, Job] = dense_products(queries, keys)
        products = list(jobs)
        if bench.device.type == "cuda":
            half = queries.bfloat16(), keys.bfloat16().T
            jobs["bfloat16 product"] = lambda half=half: torch.mm(*half)
            jobs["sparsemax, screened"] = partial(screened_on_gpu, queries, keys)
        kept = Step(screen_tables=ScreenTables())
        for name, rule in rules.items():
            jobs[name] = partial(kernels.select, queries, keys, rule, step=kept)
        jobs["sparsemax, in training"] = partial(kernels.select, queries, keys, Sparsemax())
        if bench.device.type == "cpu" and not bench.toy:
            jobs["sparsemax, no screen"] = partial(unscreened, queries, keys)
        times = per_fastest(bench.time(jobs, "torch.mm"), products)
        found = kernels.select(queries, keys, Sparsemax()).indices.numel() / case.rows
        bench.add("encode", case, times, measured_support=found)
    bench.save("encode")


if __name__ == "__main__":
    main()
