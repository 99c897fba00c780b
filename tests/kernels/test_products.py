"""The sparse products: equal to dense algebra, in value and gradient, on every path."""

from __future__ import annotations

import gc

import pytest
import torch
from hard_scores import dense_mask

from saehooks import kernels
from saehooks.codes import offsets_of, rows_of
from saehooks.kernels import Sparsemax, Support


def case(device, *, rows=30, d_sae=70, width=24, dtype=torch.float32, sizes=None):
    """left (rows, width), table (d_sae, width) and a random support with empty, single and full rows."""
    made = torch.Generator().manual_seed(3)  # small values keep float32 close to float64
    sizes = torch.tensor(sizes) if sizes else torch.randint(0, 9, (rows,), generator=made)
    if rows > 2 and not int(sizes[1]):
        sizes[2] = d_sae
    indices = [torch.randperm(d_sae, generator=made)[: int(n)].sort().values for n in sizes]
    left = torch.randn(rows, width, generator=made, dtype=dtype) / width**0.5
    table = torch.randn(d_sae, width, generator=made, dtype=dtype) / width**0.5
    return left.to(device), table.to(device), torch.cat(indices).to(device), offsets_of(sizes).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 24, 600])
def test_products_equal_dense_algebra_with_gradients(path, device, dtype, width):
    """sddmm samples left @ table.T, spmm is codes @ table; their gradients are those of the dense products."""
    left, table, indices, offsets = case(device, width=width, dtype=dtype)
    rows = rows_of(offsets, indices.numel())
    values = torch.randn(indices.numel(), dtype=dtype, device=device)
    bias = torch.randn(table.shape[0], dtype=dtype, device=device)
    inputs = [tensor.requires_grad_() for tensor in (left, table, values, bias)]
    picked = kernels.sddmm(left, table, indices, offsets, bias=bias)
    sums = kernels.spmm(values * picked, indices, offsets, table)
    found = torch.autograd.grad(sums.sin().sum(), inputs)
    dense_picked = (left @ table.T + bias)[rows, indices]
    codes = torch.zeros(left.shape[0], table.shape[0], dtype=dtype, device=device)
    dense_sums = codes.index_put((rows, indices), values * dense_picked) @ table
    expected = torch.autograd.grad(dense_sums.sin().sum(), inputs)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {}
    torch.testing.assert_close(picked, dense_picked, **tolerance)
    torch.testing.assert_close(sums, dense_sums, **tolerance)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def test_gradcheck(path, device):
    """Numerical derivatives agree with both backward passes in float64."""
    left, table, indices, offsets = case(device, rows=4, d_sae=9, width=3, dtype=torch.float64, sizes=[2, 0, 9, 1])
    values, bias = torch.randn(12, dtype=torch.float64, device=device), table[:, 0].clone()
    for tensor in (left, table, values, bias):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b, c: kernels.sddmm(a, b, indices, offsets, bias=c), (left, table, bias), raise_exception=True
    )
    assert torch.autograd.gradcheck(lambda a, b: kernels.spmm(a, indices, offsets, b), (values, table))


def test_known_scores_are_passed_through_and_still_carry_gradients(path, device):
    """With the result at hand only the gradient is computed."""
    left, table, indices, offsets = case(device)
    table.requires_grad_()
    known = torch.arange(indices.numel(), dtype=torch.float32, device=device)
    found = kernels.sddmm(left, table, indices, offsets, known=known)
    assert torch.equal(found, known)
    found.sum().backward()
    expected = torch.zeros_like(table).index_add(0, indices, left[rows_of(offsets, indices.numel())])
    torch.testing.assert_close(table.grad, expected)


def test_no_entries_no_rows_and_strides(path, device):
    """Empty supports give zeros; transposed operands give what contiguous ones give."""
    left, table, indices, offsets = case(device)
    none, zero = indices[:0], torch.zeros_like(offsets)
    table.requires_grad_()
    values = torch.zeros(0, device=device)
    sums = kernels.spmm(values, none, zero, table)
    assert sums.shape == (30, 24)
    assert not sums.any()
    (sums.sum() + kernels.sddmm(left, table, none, zero).sum()).backward()
    assert not table.grad.any()
    assert kernels.spmm(values, none, zero[:1], table).shape == (0, 24)
    picked = kernels.sddmm(left, table, indices, offsets)
    strided = kernels.sddmm(left.T.contiguous().T, table.detach().T.contiguous().T, indices, offsets)
    torch.testing.assert_close(strided, picked.detach())


@pytest.mark.parametrize("share", [2.0, 0.0])
def test_not_a_number_stays_where_it_is(path, device, share, monkeypatch):
    """A NaN in one row of the left operand, or one row of the table, reaches only the entries that use it."""
    if path == "cpu":
        monkeypatch.setattr("saehooks.kernels.cpu_dense.SHARE", share)
    left, table, indices, offsets = case(device)
    rows = rows_of(offsets, indices.numel())
    left[3], table[5] = float("nan"), float("nan")
    picked = kernels.sddmm(left, table, indices, offsets)
    assert torch.equal(picked.isnan(), (rows == 3) | (indices == 5))
    sums = kernels.spmm(torch.ones_like(picked), indices, offsets, table)
    touched = torch.zeros(30, dtype=torch.bool, device=device).index_put(
        (rows[indices == 5],), torch.ones_like(rows[indices == 5], dtype=torch.bool)
    )
    assert torch.equal(sums.isnan().any(1), touched)


def test_gradients_of_a_selected_step_equal_dense_autograd(path, device):
    """Encode, select, decode with one shared table: gradients are those of masked dense autograd."""
    made = torch.Generator().manual_seed(0)
    queries = torch.randn(64, 16, generator=made).to(device).requires_grad_()
    table = torch.randn(256, 16, generator=made).to(device).requires_grad_()
    support = kernels.select(queries, table, Sparsemax())
    scores = kernels.sddmm(queries, table, support.indices, support.offsets, known=support.scores)
    recons = kernels.spmm(scores, support.indices, support.offsets, table)
    found = torch.autograd.grad((recons - queries.detach()).square().sum(), (queries, table))
    dense = queries @ table.T
    masked = dense * dense_mask(dense.detach(), support)
    expected = torch.autograd.grad((masked @ table - queries.detach()).square().sum(), (queries, table))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


def test_supports_that_are_a_good_share_of_all_latents_are_multiplied_densely(monkeypatch):
    """The dense way gives what gathering gives, block by block, in value and gradient."""
    pytest.importorskip("numba")
    from saehooks.kernels import cpu_dense

    left, table, indices, offsets = case("cpu")
    results = []
    for share in (2.0, 0.0):
        monkeypatch.setattr(cpu_dense, "SHARE", share)
        monkeypatch.setattr(cpu_dense, "BLOCK_BYTES", 4 * 70 * 7)
        inputs = [tensor.detach().requires_grad_() for tensor in (left, table)]
        with kernels.force("cpu"):
            picked = kernels.sddmm(*inputs, indices, offsets)
            sums = kernels.spmm(picked, indices, offsets, inputs[1])
            results.append((picked, sums, *torch.autograd.grad(sums.square().sum(), inputs)))
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(dense, sparse, rtol=1e-4, atol=1e-5)


def test_the_column_index_is_made_once_and_forgotten_with_its_support():
    """Backward passes over one support share its column-sorted index, which a changed support does not reuse."""
    pytest.importorskip("numba")
    from saehooks.kernels import columns as module

    _, table, indices, offsets = case("cpu")
    first = module.columns(indices, offsets, table.shape[0])
    assert module.columns(indices, offsets, table.shape[0]) is first
    assert torch.equal(first.places.sort().values, torch.arange(indices.numel()))
    assert torch.equal(indices[first.places], indices.sort().values)
    assert torch.equal(rows_of(offsets, indices.numel())[first.places], first.rows)
    before = len(module.columns.kept)
    indices.fill_(1)
    assert module.columns(indices, offsets, table.shape[0]).starts.tolist()[:3] == [0, 0, indices.numel()]
    del indices
    gc.collect()
    assert len(module.columns.kept) == before - 1


def test_support_from_another_source_needs_no_scores(path, device):
    """A support without scores at hand is as good: they are computed."""
    left, table, indices, offsets = case(device)
    support = Support(indices, offsets, torch.zeros(30, device=device))
    assert support.scores is None
    expected = (left @ table.T)[rows_of(offsets, indices.numel()), indices]
    torch.testing.assert_close(kernels.sddmm(left, table, indices, offsets, known=support.scores), expected)
