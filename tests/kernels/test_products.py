"""The sparse products: equal to dense algebra, in value and gradient, on every path."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from forced import forced
from hard_scores import dense_mask

from saehooks import SAE, kernels
from saehooks.codes import Codes
from saehooks.errors import LatentError, WidthError
from saehooks.kernels import FeatureChoice, Sparsemax, Support, Threshold
from saehooks.support import offsets_of, rows_of


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
    picked = kernels.sddmm(left, table, Support(indices, offsets), bias=bias)
    sums = kernels.spmm(values * picked, Support(indices, offsets), table)
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
        lambda a, b, c: kernels.sddmm(a, b, Support(indices, offsets), bias=c),
        (left, table, bias),
        raise_exception=True,
    )
    assert torch.autograd.gradcheck(lambda a, b: kernels.spmm(a, Support(indices, offsets), b), (values, table))


def test_known_scores_are_passed_through_and_still_carry_gradients(path, device):
    """With the result at hand only the gradient is computed."""
    left, table, indices, offsets = case(device)
    table.requires_grad_()
    known = torch.arange(indices.numel(), dtype=torch.float32, device=device)
    found = kernels.sddmm(left, table, Support(indices, offsets), known=known)
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
    sums = kernels.spmm(values, Support(none, zero), table)
    assert sums.shape == (30, 24)
    assert not sums.any()
    (sums.sum() + kernels.sddmm(left, table, Support(none, zero)).sum()).backward()
    assert not table.grad.any()
    assert kernels.spmm(values, Support(none, zero[:1]), table).shape == (0, 24)
    picked = kernels.sddmm(left, table, Support(indices, offsets))
    strided = kernels.sddmm(left.T.contiguous().T, table.detach().T.contiguous().T, Support(indices, offsets))
    torch.testing.assert_close(strided, picked.detach())


@pytest.mark.parametrize("share", [2.0, 0.0])
def test_not_a_number_stays_where_it_is(path, device, share, monkeypatch):
    """A NaN in one row of the left operand, or one row of the table, reaches only the entries that use it."""
    if path == "cpu":
        monkeypatch.setattr("saehooks.kernels.cpu.products.MAX_SHARE", share)
    left, table, indices, offsets = case(device)
    rows = rows_of(offsets, indices.numel())
    left[3], table[5] = float("nan"), float("nan")
    picked = kernels.sddmm(left, table, Support(indices, offsets))
    assert torch.equal(picked.isnan(), (rows == 3) | (indices == 5))
    sums = kernels.spmm(torch.ones_like(picked), Support(indices, offsets), table)
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
    scores = kernels.sddmm(queries, table, support, known=support.scores)
    recons = kernels.spmm(scores, support, table)
    found = torch.autograd.grad((recons - queries.detach()).square().sum(), (queries, table))
    dense = queries @ table.T
    masked = dense * dense_mask(dense.detach(), support)
    expected = torch.autograd.grad((masked @ table - queries.detach()).square().sum(), (queries, table))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


def test_supports_that_are_a_good_share_of_all_latents_are_multiplied_densely(monkeypatch):
    """The dense way gives what gathering gives, block by block, in value and gradient."""
    pytest.importorskip("numba")
    from saehooks.kernels.cpu import products

    left, table, indices, offsets = case("cpu")
    results = []
    for share in (2.0, 0.0):
        monkeypatch.setattr(products, "MAX_SHARE", share)
        monkeypatch.setattr(products, "BLOCK_BYTES", 4 * 70 * 7)
        inputs = [tensor.detach().requires_grad_() for tensor in (left, table)]
        with forced("cpu"):
            picked = kernels.sddmm(*inputs, Support(indices, offsets))
            sums = kernels.spmm(picked, Support(indices, offsets), inputs[1])
            results.append((picked, sums, *torch.autograd.grad(sums.square().sum(), inputs)))
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(dense, sparse, rtol=1e-4, atol=1e-5)


def test_a_support_makes_its_index_by_latent_once():
    """Backward passes over one support share its index, which a changed support does not reuse."""
    pytest.importorskip("numba")
    from saehooks.kernels.cpu.products import sort_by_latent

    _, table, indices, offsets = case("cpu")
    support = Support(indices, offsets)
    first = support.by_latent(sort_by_latent, table.shape[0])
    assert support.by_latent(sort_by_latent, table.shape[0]) is first
    assert support.pattern().by_latent(sort_by_latent, table.shape[0]) is first
    assert torch.equal(first.places.sort().values, torch.arange(indices.numel()))
    assert torch.equal(indices[first.places], indices.sort().values)
    assert torch.equal(rows_of(offsets, indices.numel())[first.places], first.rows)
    other = replace(support, indices=torch.zeros_like(indices))
    assert other.by_latent(sort_by_latent, table.shape[0]).starts[1] == indices.numel(), (
        "the index is of its own tensors"
    )
    indices.fill_(1)
    assert support.by_latent(sort_by_latent, table.shape[0]).starts.tolist()[:3] == [0, 0, indices.numel()]
    gone = weakref.ref(support.by_latent(sort_by_latent, table.shape[0]).rows)
    del support, first, other
    gc.collect()
    assert gone() is None, "the index goes with its support"


def test_forward_and_backward_sort_a_support_once(monkeypatch):
    """Scores and reconstruction of an SAE share one index by latent in the backward pass."""
    pytest.importorskip("numba")
    from saehooks.kernels.cpu import products

    calls = []
    plain = products._count_by_latent
    monkeypatch.setattr(products, "_count_by_latent", lambda *arguments: calls.append(1) or plain(*arguments))
    sae = SAE(16, 256, "linear", "topk", k=4)
    with forced("cpu"):
        x = torch.randn(20, 16)
        (sae(x).recons - x).square().sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("latent", [10**9, 70, -1, -(10**9)])
def test_a_latent_out_of_range_is_an_error(path, device, latent):
    """Following it would read, or write, memory that is not the table's."""
    left, table, indices, offsets = case(device)
    values = torch.ones(indices.numel(), device=device)
    indices[3] = latent
    for call in (
        lambda: kernels.spmm(values, Support(indices, offsets), table),
        lambda: kernels.sddmm(left, table, Support(indices, offsets)),
        lambda: SAE(24, 70, device=device).decode(Codes(indices, values, offsets, (30,), 70)),
    ):
        with pytest.raises(LatentError, match=rf"latent {latent} is out of range: this SAE has latents 0 to 69"):
            call()


def test_a_support_that_was_changed_in_place_is_looked_at_again(path, device):
    """What selection made is followed without a look only until it is written into."""
    left, table = case(device)[:2]
    support = kernels.select(left, table, Sparsemax())
    kernels.sddmm(left, table, support)
    support.indices[0] = 70
    with pytest.raises(LatentError, match="latent 70"):
        kernels.sddmm(left, table, support)


@pytest.mark.parametrize("offsets", [[0, 2, 1, 5], [1, 2, 3, 5], [0, 2, 3, 6], [0, -1, 3, 5]])
def test_offsets_that_leave_the_entries_are_an_error(path, device, offsets):
    """Offsets start at 0, never fall, and end at the entries."""
    support = Support(torch.zeros(5, dtype=torch.int64, device=device), torch.tensor(offsets, device=device))
    with pytest.raises(WidthError, match="offsets"):
        kernels.spmm(torch.ones(5, device=device), support, torch.ones(2, 4, device=device))


def test_operands_that_do_not_fit_are_errors(path, device):
    """Rows, values, widths and biases of another size than the support or the table."""
    left, table, indices, offsets = case(device)
    support, values = Support(indices, offsets), torch.ones(indices.numel(), device=device)
    for call in (
        lambda: kernels.sddmm(left[1:], table, support),
        lambda: kernels.sddmm(left[:, 1:], table, support),
        lambda: kernels.sddmm(left, table, support, bias=values[:3]),
        lambda: kernels.sddmm(left, table, support, known=values[:3]),
        lambda: kernels.spmm(values[:3], support, table),
        lambda: kernels.select(left, table, Sparsemax(), values[:3]),
        lambda: kernels.select(left, table, Threshold(values[:3])),
        lambda: kernels.select(left, table, FeatureChoice(torch.zeros(3, dtype=torch.int64, device=device))),
    ):
        with pytest.raises(WidthError):
            call()


def test_support_from_another_source_needs_no_scores(path, device):
    """A support without scores at hand is as good: they are computed."""
    left, table, indices, offsets = case(device)
    support = Support(indices, offsets, torch.zeros(30, device=device))
    assert support.scores is None
    expected = (left @ table.T)[rows_of(offsets, indices.numel()), indices]
    torch.testing.assert_close(kernels.sddmm(left, table, support, known=support.scores), expected)
