"""Compile every Triton kernel in its launch shapes, with no GPU, and print what each takes: one JSON line a kernel.

Run by `test_triton_compile.py`, or by hand: ``python tests/kernels/compile_triton.py 90``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saehooks.kernels.gpu import across_rows, adam, products, scores, select, weights
from saehooks.kernels.gpu.across_rows import DIGITS
from saehooks.kernels.gpu.launch import GEMM_PLAN, batch_plan, product_plan, select_plan
from saehooks.kernels.gpu.products import SEGMENT

TYPES = {
    "Z": "*fp32", "QUERIES": "*bf16", "KEYS": "*bf16", "LEFT": "*fp32", "TABLE": "*fp32", "OUT": "*fp32",
    "PLACES": "*i32", "GROUPS": "*i32", "COUNTS": "*i32", "QUOTA": "*i32", "SIZES": "*i32",
    "LISTED": "*i32", "PREFIX": "*i32", "RANK": "*i32", "ABOVE": "*i32", "TIES": "*i32",
    "OFFSETS": "*i64", "INDICES": "*i64", "ROWS": "*i64", "STARTS": "*i64", "EXTRAS": "*i64", "OWNERS": "*i64",
    "slope_of": "fp32", "power": "fp32", "total": "fp32",
    "beta1": "fp32", "beta2": "fp32", "eps": "fp32", "weight_decay": "fp32",
}  # fmt: skip
"""Arguments by name; other pointers are float32, other numbers int32."""


def cases():
    """(name, kernel, constants, warps, stages, types that differ) of every kernel as it is launched."""
    wide = select_plan(49152)
    kinds = {"sparsemax": (0, True), "entmax": (0, False), "topk": (1, True), "threshold": (2, True)}
    for name, (kind, linear) in kinds.items():
        shape = {"KIND": kind, "BIASED": True, "TILE": wide.tile, "CAP": wide.cap}
        made = {**shape, "LINEAR": linear, "SCALAR": False, "step": 1, "GATHER": wide.gather}
        yield f"collect {name}", select.collect_kernel, made, wide.collect_warps, 3, {}
        shape["TILE"] = wide.stream
        made = {**shape, "LINEAR": linear, "STREAM": True}
        yield f"finish {name}", select.finish_kernel, made, wide.finish_warps, 3, {}
        made = {**shape, "SCALAR": False, "STREAM": True}
        yield f"fill {name}", select.fill_kernel, made, wide.finish_warps, 3, {}
    # Numbers equal to 1 become constants at run time.
    made = {"KIND": 1, "BIASED": False, "LINEAR": True, "k": 1, "CAP": wide.cap}
    reading = {"SCALAR": True, "step": 1, "TILE": wide.tile, "GATHER": wide.gather}
    yield "collect top 1", select.collect_kernel, {**made, **reading}, wide.collect_warps, 3, {}
    yield "finish top 1", select.finish_kernel, {**made, "STREAM": True, "TILE": wide.stream}, 2, 3, {}
    yield from batch_cases()
    plan = product_plan(768)
    rowwise = {"WIDTH": plan.width, "ENTRIES": plan.entries}
    columnwise = {"WIDTH": plan.width, "ENTRIES": plan.column_entries, "SEGMENT": SEGMENT}
    long = {"PLACES": "*i64"}
    yield "sddmm", products.sddmm_kernel, rowwise, plan.warps, 3, {}
    yield "spmm", products.spmm_kernel, rowwise, plan.warps, 3, {}
    segments = {**columnwise, "ENTRIES": plan.entries}
    yield "spmm_segments", products.spmm_segments_kernel, segments, plan.warps, 3, long
    yield "spmm_columns", products.spmm_columns_kernel, columnwise, plan.warps, 3, long
    yield "center", weights.center_kernel, {"ENTRIES": 128}, 1, 3, {}
    yield "entmax weights", weights.weights_kernel, {"ENTRIES": 128}, 1, 3, {"OUT": "*fp64"}
    for learned in (False, True):
        made, doubles = {"ENTRIES": 128, "LEARNED": learned}, {"WEIGHTS": "*fp64", "D_ALPHA": "*fp64"}
        yield f"entmax gradient {learned}", weights.gradient_kernel, made, 1, 3, doubles
    both = {f"{name}_{side}": "*i64" for name in ("PLACES", "ROWS", "STARTS", "EXTRAS") for side in "AB"}
    for two in (False, True):
        made = {**columnwise, "TWO": two, "SPARSE": True}
        yield (
            f"adam {1 + two}",
            adam.step_kernel,
            made,
            plan.warps,
            3,
            both,
        )
    gemm = {
        "STEP": GEMM_PLAN.step, "BIASED": True, "CAP": GEMM_PLAN.cap, "ROWS": GEMM_PLAN.rows,
        "LATENTS": GEMM_PLAN.latents, "DEPTH": GEMM_PLAN.depth, "BAND": GEMM_PLAN.band,
    }  # fmt: skip
    yield "scores_above", scores.scores_above_kernel, gemm, GEMM_PLAN.warps, GEMM_PLAN.stages, {}
    yield "scores_above all", scores.scores_above_kernel, {**gemm, "STEP": 0}, GEMM_PLAN.warps, GEMM_PLAN.stages, {}
    whole = {"QUERIES": "*fp32", "KEYS": "*fp32"}
    made = {"BIASED": True, "CAP": GEMM_PLAN.cap, "WIDTH": plan.width, "ENTRIES": plan.entries}
    yield "rescore", scores.rescore_kernel, made, plan.warps, 3, whole
    yield "order", scores.order_kernel, {"CAP": GEMM_PLAN.cap}, 1, 3, {}


def batch_cases():
    """The same of batch top-k."""
    plan = batch_plan(49152, 64)
    wide = {"BIASED": True, "TILE": plan.select.tile}
    yield "batch maxima", across_rows.maxima_kernel, wide, plan.select.collect_warps, 3, {}
    wide |= {"SHIFT": DIGITS[1], "GATHER": plan.select.gather, "CAP": plan.select.cap}
    yield "batch gather", across_rows.gather_kernel, wide, plan.select.collect_warps, 3, {}
    for shift in DIGITS[:2]:
        made = {"SHIFT": shift, "FOLD": plan.fold, "BLOCK": plan.block}
        yield f"batch tally_maxima {shift}", across_rows.tally_maxima_kernel, made, plan.warps, 3, {}
    made = {"BIASED": True, "CAP": plan.select.cap, "BLOCK": plan.block}
    for shift in DIGITS:
        yield f"batch tally_rows {shift}", across_rows.tally_rows_kernel, {**made, "SHIFT": shift}, plan.warps, 3, {}
    yield "batch count_rows", across_rows.count_rows_kernel, made, plan.warps, 3, {}
    for clamp in (False, True):
        yield f"batch descend {clamp}", across_rows.descend_kernel, {"CLAMP": clamp}, 1, 3, {}


def compile_one(kernel, constants, warps, stages, types, capability):
    """The compiled kernel, for a GPU that need not be here."""
    names = kernel.arg_names
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name) or TYPES.get(name, "*fp32" if name.isupper() else "i32")
        for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # Rows are laid out on 16 bytes, as torch allocates them: this lets loads be wide, as at run time.
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if aligned(name, signature[name])},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def aligned(name, kind):
    return kind.startswith("*") or name in ("width", "d_sae", "rows", "groups", "share") or "stride" in name


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread, bytes of stack (spills) a thread, and bytes of shared memory, from the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", out)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def main() -> None:
    capability = int(sys.argv[1])
    wanted = sys.argv[2:]
    for name, kernel, constants, warps, stages, types in cases():
        if wanted and not any(name.startswith(start) for start in wanted):
            continue
        made = compile_one(kernel, constants, warps, stages, types, capability)
        row = {
            "kernel": name,
            "sm": capability,
            "warps": warps,
            **usage(made.asm["cubin"]),
            "shared": made.metadata.shared,
        }
        row["wgmma"] = "wgmma" in made.asm["ptx"]
        row["wide_loads"] = bool(re.search(r"ld\.global\S*\.v4|cp\.async", made.asm["ptx"]))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
