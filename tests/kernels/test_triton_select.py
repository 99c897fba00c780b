"""The selection tests of every path, on the Triton kernels: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from forced import forced
from hard_scores import KINDS, scores_of
from test_select import (  # noqa: F401
    test_empty_batches_and_one_latent,
    test_rows_without_a_finite_maximum_keep_their_argmax_alone,
    test_selection_by_hand,
    test_strides_of_the_scores_do_not_matter,
    test_what_cannot_be_selected_is_refused,
)
from test_select import test_sparsemax_is_exact as check_sparsemax
from test_select import test_threshold_takes_what_is_above as check_threshold
from test_select import test_topk_takes_the_largest_positive_scores_and_of_equals_the_first as check_topk

from saehooks import SAE, kernels
from saehooks.errors import ConfigError
from saehooks.kernels import Capacity, Entmax, Sparsemax, Step, Support, Threshold, TopK, reference, select_rows
from saehooks.kernels.gpu import scores as scores_module
from saehooks.kernels.gpu import select as select_module
from saehooks.kernels.gpu.launch import SelectPlan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")


@pytest.fixture
def path():
    with forced("gpu"):
        yield "gpu"


@pytest.fixture
def device(path):
    return torch.device(DEVICE)


def same(found: Support, expected: Support) -> bool:
    return torch.equal(found.offsets, expected.offsets) and torch.equal(found.indices, expected.indices)


# The interpreter is slow: fewer sizes than the other paths get.


@pytest.mark.parametrize("kind", KINDS)
def test_selection_is_exact_for_every_kind_of_row(path, device, kind):
    """Sparsemax at four scales, and top-k with its ties, at a width that fills no tile."""
    check_sparsemax(path, device, kind, 600)
    check_topk(path, device, kind, 7, 600)


@pytest.mark.parametrize("d_sae", [1, 2, 65, 4096])
def test_selection_is_exact_for_every_width(path, device, d_sae):
    """One latent, few, and rows of several tiles."""
    check_sparsemax(path, device, "trained", d_sae)
    check_topk(path, device, "trained", min(300, d_sae), d_sae)


@pytest.mark.parametrize("kind", ["random", "tied", "equal"])
def test_thresholds_are_exact(path, device, kind):
    """One number, or one for each latent."""
    check_threshold(path, device, kind)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_entmax_agrees_with_the_reference(path, device, alpha):
    """Newton's rule in float32 registers ends where the reference in float64 does."""
    for kind in ("random", "trained", "equal", "spike"):
        scores = scores_of(kind, 2, 600, 3.0).to(device)
        found, expected = select_rows(scores, Entmax(alpha)), reference.select_rows(scores, Entmax(alpha))
        assert same(found, expected)
        torch.testing.assert_close(found.threshold, expected.threshold, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rule", [Sparsemax(), TopK(40), Threshold(-2.0), Entmax(1.5)], ids=lambda rule: type(rule).__name__
)
def test_rows_with_more_candidates_than_are_kept_are_read_again(path, device, rule):
    """A short list changes nothing: rows that do not fit it are streamed, on the device."""
    scores = torch.cat([scores_of(kind, 1, 200, 0.1) for kind in KINDS if kind != "two_level"]).to(device)
    expected = reference.select_rows(scores, rule)
    described = select_module.describe(rule, 200, device)
    plan = SelectPlan(tile=64, gather=32, cap=16, stream=32, collect_warps=1, finish_warps=1)
    (found,) = select_module.select_scores([scores], described, plan=plan)
    assert same(found, expected)
    assert torch.equal(found.scores, scores[kernels_rows(found), found.indices])


def kernels_rows(support: Support) -> torch.Tensor:
    from saehooks.support import rows_of

    return rows_of(support.offsets, support.indices.numel())


def test_supports_may_be_as_large_as_the_dictionary(path, device):
    """Silent rows select everything, next to rows that select one latent."""
    scores = torch.zeros(6, 3000, device=device)
    scores[::2, 7] = 5.0
    assert select_rows(scores, Sparsemax()).offsets.diff().tolist() == [1, 3000] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_widened_not_rounded_further(path, device, dtype):
    """Scores given in half precision are selected from as float32 of the same values."""
    scores = scores_of("random", 3, 500, 1.0).to(device, dtype)
    assert same(select_rows(scores, Sparsemax()), reference.select_rows(scores.float(), Sparsemax()))


@pytest.mark.parametrize("rule", [Sparsemax(), Entmax(1.5), TopK(3)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("biased", [False, True])
def test_selection_without_writing_the_scores_is_the_same(path, device, rule, biased):
    """Scores filtered in the product's kernel by a bound from every eighth latent give the same support."""
    from saehooks.kernels.gpu.launch import GemmPlan

    made = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(5, 40, generator=made).to(device) * 0.4, torch.randn(300, 40, generator=made).to(device)
    bias = torch.randn(300, generator=made).to(device) if biased else None
    plan = GemmPlan(step=4, rows=16, latents=32, depth=16, band=2, warps=4, stages=2, cap=64)
    described = select_module.describe(rule, 300, device)
    found = scores_module.select_unwritten(queries, keys, described, bias, plan=plan)
    scores = queries @ keys.T + (0 if bias is None else bias)
    expected = reference.select_rows(scores, rule)
    assert found is not None
    assert same(found, expected)
    torch.testing.assert_close(found.scores, scores[kernels_rows(found), found.indices])
    assert scores_module.select_unwritten(queries, keys, described, bias, plan=plan._replace(cap=2)) is None, (
        "too many for it"
    )
    queries[3, 2] = float("nan")
    assert scores_module.select_unwritten(queries, keys, described, bias, plan=plan) is None, (
        "a NaN is left to the other form"
    )


@pytest.mark.parametrize("rule", [Sparsemax(), Entmax(1.5), TopK(3)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("biased", [False, True])
def test_selection_through_a_bfloat16_screen_is_that_of_float32(path, device, rule, biased):
    """Candidates found in bfloat16, some of them last bits apart, are selected from by their float32 scores."""
    from saehooks.kernels.gpu.launch import GemmPlan

    made = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(5, 40, generator=made) * 0.4, torch.randn(300, 40, generator=made)
    keys[100:130] = keys[7] * (1 + 2.0**-12 * torch.randint(-3, 4, (30, 1), generator=made))
    queries, keys = queries.to(device), keys.to(device)
    bias = torch.randn(300, generator=made).to(device) if biased else None
    plan = GemmPlan(step=4, rows=16, latents=32, depth=16, band=2, warps=4, stages=2, cap=128)
    described = select_module.describe(rule, 300, device)
    found = scores_module.select_screened(queries, keys, described, bias, plan=plan)
    scores = queries @ keys.T + (0 if bias is None else bias)
    assert found is not None
    assert same(found, reference.select_rows(scores, rule))
    torch.testing.assert_close(found.scores, scores[kernels_rows(found), found.indices])
    assert scores_module.select_screened(queries, keys, described, bias, plan=plan._replace(cap=2)) is None
    for value in (float("nan"), float("inf"), 1e30):
        broken = queries.clone()
        broken[3, 2] = value
        assert scores_module.select_screened(broken, keys, described, bias, plan=plan) is None, "left to the other form"


def test_the_screen_serves_float32_queries_where_it_is_switched_on(path, device, monkeypatch):
    """By default it is off; on, the same support comes of it."""
    from saehooks.kernels.gpu import launch

    queries, keys = 0.4 * torch.randn(4, 40, device=device), torch.randn(300, 40, device=device)
    calls, plain = [], scores_module.select_screened
    monkeypatch.setattr(scores_module, "select_screened", lambda *given: calls.append(1) or plain(*given))
    expected = kernels.select(queries, keys, TopK(5))
    assert not calls
    monkeypatch.setattr(launch, "SCREENED_FROM", 0)
    assert torch.equal(kernels.select(queries, keys, TopK(5)).indices, expected.indices)
    assert calls == ([1] if path == "gpu" else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_selection_from_queries_is_that_of_scores_in_float32(path, device, dtype, monkeypatch):
    """Half-precision queries are scored with float32 sums, chunk by chunk; scores beyond float16 stay finite."""
    from saehooks.kernels.gpu import scores as scores_module

    queries, keys = torch.randn(5, 16, device=device).to(dtype), torch.randn(90, 16, device=device).to(dtype)
    bias = torch.randn(90, device=device).to(dtype)
    queries[2] = queries[2].clamp(-2, 2) * 30_000  # scores beyond the range of float16
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = queries.to(wide) @ keys.to(wide).T + bias.to(wide)
    assert scores.isfinite().all()
    monkeypatch.setattr(scores_module, "score_rows", lambda rows, d_sae: 2)
    found = kernels.select(queries, keys, Sparsemax(), bias)
    assert same(found, reference.select_rows(scores, Sparsemax()))
    assert dtype == torch.float64 or found.scores.dtype == torch.float32


def test_medium_matmul_precision_scores_float32_in_bfloat16(path, device):
    """torch's own switch decides; sums and thresholds stay float32."""
    queries, keys = torch.randn(3, 32, device=device), torch.randn(90, 32, device=device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = kernels.select(queries, keys, Sparsemax())
    finally:
        torch.set_float32_matmul_precision(before)
    scores = queries.bfloat16().float() @ keys.bfloat16().float().T
    assert same(found, reference.select_rows(scores, Sparsemax()))


def test_tensors_on_different_devices_are_refused(path, device):
    """The error names the devices and what to write."""
    support = Support(torch.zeros(1, dtype=torch.long), torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match=r"live on .* and .*: move them to one device"):
        kernels.spmm(torch.zeros(1), support, torch.zeros(3, 4, device="meta"))


def test_an_unsupported_gpu_falls_back_with_one_warning(monkeypatch):
    """Whatever keeps the kernels from running, plain torch serves the device and says so once."""
    from saehooks.kernels import backend

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    backend._has_kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"do not run on cuda:7 .*compute capability \(7, 0\).*plain torch"):
        assert not backend._has_kernels(torch.device("cuda:7"))
    backend._has_kernels.cache_clear()


def test_cpu_tensors_need_the_interpreter():
    """Forced onto CPU tensors without it, the path says what to set instead of failing inside Triton."""
    if DEVICE == "cuda":
        pytest.skip("needs no GPU")
    code = (
        "import torch; from saehooks import kernels\n"
        "try:\n    kernels.select_rows(torch.zeros(2, 3), kernels.Sparsemax())\n"
        "except kernels.backend.ConfigError as error: print(error)"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**env, "SAEHOOKS_KERNELS": "gpu"}
    )
    assert "TRITON_INTERPRET=1" in done.stdout, done.stderr


def test_a_capacity_gives_codes_of_a_fixed_size(path, device):
    """Padding belongs to no row and names a selected latent; offsets and entries are otherwise the same."""
    scores = scores_of("random", 4, 300, 3.0).to(device)
    exact = select_rows(scores, Sparsemax())
    nnz = exact.indices.numel()
    room = Capacity(nnz + 9)
    found = select_rows(scores, Sparsemax(), step=Step(capacity=room))
    assert found.indices.shape == found.scores.shape == (nnz + 9,)
    assert torch.equal(found.offsets, exact.offsets)
    assert torch.equal(found.indices[:nnz], exact.indices)
    assert set(found.indices[nnz:].tolist()) <= set(exact.indices.tolist())
    assert not found.scores[nnz:].any()
    assert (room.used, room.overflowed, float(room.found_inf)) == (nnz, False, 0.0)


def test_codes_with_padding_read_as_codes_without(path, device):
    """What is asked of codes of a fixed size does not see their padding."""
    torch.manual_seed(0)
    sae, x = SAE(8, 20, device=device), torch.randn(2, 3, 8, device=device)
    exact = sae.encode(x)
    codes = sae.encode(x, step=Step(capacity=Capacity(6 * 20 + 1)))
    assert codes.indices.numel() == 121
    assert torch.equal(codes.dense(), exact.dense())
    assert torch.equal(codes.counts(), exact.counts())
    assert torch.equal(codes.of(3), exact.of(3))
    assert torch.equal(codes.top(4).latents, exact.top(4).latents)
    assert torch.equal(codes[1].dense(), exact[1].dense())
    assert torch.equal(codes.cat([codes, codes]).indices, exact.cat([exact, exact]).indices)
    assert codes.trimmed().indices.numel() == exact.indices.numel()


def test_a_capacity_holds_for_all_chunks_together(path, device, monkeypatch):
    """Rows scored in several chunks fill one list, as if they had been scored at once."""
    from saehooks.kernels.gpu import scores as scores_module

    queries, keys = torch.randn(5, 16, device=device), torch.randn(90, 16, device=device)
    exact = kernels.select(queries, keys, Sparsemax())
    nnz = exact.indices.numel()
    monkeypatch.setattr(scores_module, "score_rows", lambda rows, d_sae: 2)
    room = Capacity(nnz + 3)
    found = kernels.select(queries, keys, Sparsemax(), step=Step(capacity=room))
    assert room.used == nnz
    assert torch.equal(found.offsets, exact.offsets)
    assert torch.equal(found.indices[:nnz], exact.indices)
    torch.testing.assert_close(found.threshold, exact.threshold)
    room = Capacity(4)
    found = kernels.select(queries, keys, Sparsemax(), step=Step(capacity=room))
    assert room.overflowed
    assert torch.equal(found.offsets, exact.offsets.clamp(max=4))
    assert torch.equal(found.indices, exact.indices[:4])


def test_a_capacity_that_does_not_suffice_says_so_and_writes_nowhere_else(path, device):
    """An overflow is seen on the device, so that the optimiser can leave the step out."""
    scores = scores_of("random", 4, 300, 1.0).to(device)
    exact = select_rows(scores, Sparsemax())
    room = Capacity(10)
    found = select_rows(scores, Sparsemax(), step=Step(capacity=room))
    assert float(room.found_inf) == 1.0
    assert (room.used, room.overflowed) == (exact.indices.numel(), True)
    assert torch.equal(found.indices, exact.indices[:10])
    assert int(found.offsets[-1]) == 10
    room.reset()
    assert not room.overflowed
    with pytest.raises(ConfigError, match="at least one"):
        Capacity(0)
