"""Launch shapes of the GPU, tried out: which selection and which product it prefers, and whether scores are written.

    python recipes/benchmark/sweep.py --device cuda

Each must select exactly what the default selects. The best of them belongs into saehooks/kernels/gpu/launch.py.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import Bench, Case, Job, arguments, queries_and_keys

from saehooks import kernels
from saehooks.kernels import Capacity, Sparsemax, Step, Support

CASES = [Case(4096, 49152, 768), Case(4096, 3072, 768)]


def plans(launch: Any, d_sae: int, toy: bool) -> tuple[list[Any], list[Any]]:
    """Shapes of the selection and of the product that writes no scores, the defaults first."""
    default, gemm = launch.select_plan(d_sae), launch.GEMM_PLAN
    tiles = (16, 32) if toy else (1024, 2048, 4096, 8192)
    selections = [
        default._replace(tile=tile, gather=max(1, tile // 4), collect_warps=max(1, tile // each))
        for tile in tiles
        for each in (256, 512)
        if tile <= launch.power_of_two(d_sae) and tile // each <= 16  # more warps spill registers
    ]
    if toy:
        small = {"step": 4, "rows": 16, "latents": 32, "depth": 16, "band": 2, "warps": 4, "stages": 2, "cap": 64}
        return [default, *selections], [gemm._replace(**small)]
    changes: tuple[dict[str, Any], ...] = (
        {"stages": 4}, {"step": 16}, {"rows": 64, "warps": 4, "stages": 4}, {"rows": 64, "latents": 256},
        {"rows": 256, "latents": 64}, {"depth": 128, "stages": 2}, {"band": 16}, {"step": 4},
    )  # fmt: skip
    return [default, *selections], [gemm, *(gemm._replace(**change) for change in changes)]


def same(found: Support | None, expected: Support) -> bool:
    """Whether both selected alike, but for latents a rounding of a score away from the threshold."""
    if found is None:
        return True  # too many candidates: the scores are written after all
    used = int(found.offsets[-1])
    return abs(used - expected.indices.numel()) <= max(1, used // 1000)


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    if args.device == "cpu":
        sys.exit("launch shapes are a GPU's: --device cuda, or --device interpret to see that the code runs")
    bench = Bench(args)
    from saehooks.kernels.gpu import launch, scores, select

    for case in bench.cases([], CASES):
        queries, keys = queries_and_keys(case, bench.device)
        rule = select.describe(Sparsemax(), case.d_sae, bench.device)
        given, expected = queries @ keys.T, kernels.select(queries, keys, Sparsemax())
        halves = (queries, keys) if bench.toy else (queries.bfloat16(), keys.bfloat16())
        rounded = kernels.select(*halves, Sparsemax())
        step = Step(capacity=Capacity(max(1, int(1.25 * expected.indices.numel()))))
        selections, products = plans(launch, case.d_sae, bench.toy)
        jobs: dict[str, Job] = {"default": lambda s=given, r=rule, t=step: select.select_scores([s], r, step=t)}
        for plan in selections:
            jobs[f"select {plan}"] = lambda p=plan, s=given, r=rule, t=step: select.select_scores(
                [s], r, step=t, plan=p
            )
            if not same(select.select_scores([given], rule, plan=plan)[0], expected):
                sys.exit(f"{plan} selects something else than the default")
        jobs["written"] = lambda q=halves, t=step: kernels.select(*q, Sparsemax(), step=t)
        for shape in products:
            jobs[f"unwritten {shape}"] = lambda p=shape, q=halves, r=rule, t=step: scores.select_unwritten(
                *q, r, None, t, plan=p
            )
            if not same(scores.select_unwritten(*halves, rule, None, plan=shape), rounded):
                sys.exit(f"{shape} selects something else than from written scores")
        bench.add("launch shapes", case, bench.time(jobs, "default", graph=True))
        if bench.timed:
            torch.cuda.empty_cache()
    bench.save("sweep")


if __name__ == "__main__":
    main()
