"""Tables and scores of more than 2^31 numbers: the Triton kernels reach what lies beyond.

The rows here are few but so far apart that the last begins past element 2^31. What lies between them is never touched,
so that it costs addresses, not memory.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from forced import forced
from hard_scores import parts, scores_of

from saehooks import kernels
from saehooks.kernels import BatchTopK, Entmax, Sparsemax, Support, Threshold, TopK
from saehooks.kernels.gpu import across_rows
from saehooks.kernels.gpu import scores as scores_module
from saehooks.kernels.gpu import select as select_module
from saehooks.kernels.gpu.launch import BatchPlan, GemmPlan, SelectPlan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
SELECT = SelectPlan(tile=64, gather=32, cap=16, stream=32, collect_warps=1, finish_warps=1)
PLANS = {"listed": None, "streamed": SELECT}


def far(near: torch.Tensor) -> torch.Tensor:
    """The same rows of float16, the last of them beyond element 2^31."""
    rows, width = near.shape
    stride = 2**31 // (rows - 1) + 64
    try:
        memory = torch.empty((rows - 1) * stride + width, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of addresses are not to be had here: {error}")
    apart = memory.as_strided((rows, width), (stride, 1))
    assert apart[-1:].storage_offset() > 2**31
    return apart.copy_(near)


@pytest.fixture(autouse=True)
def _gpu_path():
    with forced("gpu"):
        yield


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "rule", [Sparsemax(), Entmax(1.5), TopK(9), Threshold(0.5)], ids=lambda rule: type(rule).__name__
)
def test_scores_far_apart_are_selected_from(rule, plan):
    """Candidates, their thresholds and rows that are read again, of the last row too."""
    near = torch.cat([scores_of(kind, 1, 200, 1.0) for kind in ("random", "tied", "equal")]).to(DEVICE).half()
    described = select_module.describe(rule, 200, DEVICE)
    (found,) = select_module.select_scores([far(near)], described, plan=PLANS[plan])
    (expected,) = select_module.select_scores([near], described, plan=PLANS[plan])
    for mine, theirs in zip(parts(found), parts(expected), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("plan", PLANS)
def test_batch_top_k_takes_scores_far_apart(plan):
    """All its kernels read rows by their own address."""
    near = torch.cat([scores_of(kind, 1, 200, 1.0) for kind in ("random", "tied", "equal")]).to(DEVICE).half()
    described = select_module.describe(BatchTopK(20), 200, DEVICE)
    made = None if plan == "listed" else BatchPlan(SELECT, fold=1, share=64, block=32, warps=1)
    found, expected = (across_rows.select_batch(scores, described, plan=made) for scores in (far(near), near))
    for mine, theirs in zip(parts(found), parts(expected), strict=True):
        assert torch.equal(mine, theirs)


def test_selection_without_writing_the_scores_reads_tables_far_apart():
    """Queries and keys of the product that keeps only candidates."""
    made = torch.Generator().manual_seed(0)
    queries = (torch.randn(5, 24, generator=made) * 0.5).to(DEVICE).half()
    keys = torch.randn(70, 24, generator=made).to(DEVICE).half()
    plan = GemmPlan(step=4, rows=16, latents=32, depth=16, band=2, warps=4, stages=2, cap=64)
    described = select_module.describe(Sparsemax(), 70, DEVICE)
    expected = scores_module.select_unwritten(queries, keys, described, None, plan=plan)
    for pair in ((far(queries), keys), (queries, far(keys))):
        found = scores_module.select_unwritten(*pair, described, None, plan=plan)
        for mine, theirs in zip(parts(found), parts(expected), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_sparse_products_read_tables_far_apart():
    """Left and right tables of the sampled product, the table of decoding, and the rows a gradient sums."""
    made = torch.Generator().manual_seed(0)
    left, table = (torch.randn(3, 40, generator=made).to(DEVICE).half() for _ in range(2))
    indices = torch.tensor([0, 2, 1, 2, 0, 2], device=DEVICE)
    offsets = torch.tensor([0, 2, 3, 6], device=DEVICE)
    values = torch.randn(6, generator=made).to(DEVICE).half()
    path = kernels.backend_for(left)
    support = Support(indices, offsets)
    expected = path.sddmm(left, table, support)
    assert torch.equal(path.sddmm(far(left), table, support), expected)
    assert torch.equal(path.sddmm(left, far(table), support), expected)
    expected = path.spmm(values, support, table)
    assert torch.equal(path.spmm(values, support, far(table)), expected)
    expected = path.spmm_transposed(values, support, left, 4)
    assert torch.equal(path.spmm_transposed(values, support, far(left), 4), expected)


def test_long_columns_sum_rows_far_apart(monkeypatch):
    """Segments of a column read their rows by the same addresses."""
    from saehooks.kernels.gpu import products

    monkeypatch.setattr(products, "SEGMENT", 16)
    made = torch.Generator().manual_seed(0)
    left = torch.randn(50, 8, generator=made).to(DEVICE).half()
    indices, offsets = torch.zeros(50, dtype=torch.int64, device=DEVICE), torch.arange(51, device=DEVICE)
    values = torch.ones(50, device=DEVICE, dtype=torch.float16)
    path = kernels.backend_for(left)
    expected = path.spmm_transposed(values, Support(indices, offsets), left, 2)
    assert torch.equal(path.spmm_transposed(values, Support(indices.clone(), offsets), far(left), 2), expected)
