"""The sparse products: equal to dense algebra, in value and gradient, on every path."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from forced import forced
from hard_scores import dense_mask

from saehooks import SAE, kernels
from saehooks.codes import Codes
from saehooks.errors import ConfigError, LatentError, WidthError
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


def test_a_known_result_beside_what_would_change_it_is_refused():
    """It would be taken for the result, and values and rate left out without a word."""
    left, table, support = torch.randn(1, 3), torch.randn(4, 3), Support(torch.tensor([2]), torch.tensor([0, 1]))
    for more in ({"values": torch.ones(1)}, {"rate": torch.tensor(0.5)}):
        with pytest.raises(ConfigError, match="without values and rate"):
            kernels.sddmm_spmm(left, table, support, known=torch.ones(1), **more)


@pytest.mark.parametrize("share", [2.0, 0.0])
@pytest.mark.parametrize("with_values", [True, False])
def test_both_products_in_one_equal_dense_algebra_with_gradients(path, device, share, with_values, monkeypatch):
    """`sddmm_spmm` moves values by a rate and sums them; so do dense products, in value and gradient."""
    if path == "cpu":
        monkeypatch.setattr("saehooks.kernels.cpu.products.MAX_SHARE", share)
    left, table, indices, offsets = case(device)
    rows = rows_of(offsets, indices.numel())
    made = torch.Generator().manual_seed(5)
    weights = torch.randn(indices.numel(), generator=made).to(device)
    inputs = [left.requires_grad_(), table.requires_grad_()]
    values = rate = None
    if with_values:
        values = torch.randn(indices.numel(), generator=made).to(device).requires_grad_()
        rate = torch.tensor(0.3, device=device, requires_grad=True)
        inputs += [values, rate]
    moved, sums = kernels.sddmm_spmm(left, table, Support(indices, offsets), values=values, rate=rate)
    dense = (left @ table.T)[rows, indices]
    dense = values + rate * dense if values is not None and rate is not None else dense
    codes = torch.zeros(left.shape[0], table.shape[0], device=device)
    dense_sums = codes.index_put((rows, indices), dense) @ table
    torch.testing.assert_close(moved, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums, dense_sums, rtol=1e-4, atol=1e-3)
    for loss in (
        lambda moved, sums: (moved.square() * weights).sum() + sums.sin().sum(),
        lambda moved, sums: sums.sin().sum(),
        lambda moved, sums: (moved.square() * weights).sum(),
    ):
        found = torch.autograd.grad(loss(moved, sums), inputs, retain_graph=True)
        expected = torch.autograd.grad(loss(dense, dense_sums), inputs, retain_graph=True)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("share", [2.0, 0.0])
def test_a_step_of_refinement_equals_dense_algebra(path, device, share, monkeypatch):
    """`refine` moves values against what their sums miss, on the support alone."""
    if path == "cpu":
        monkeypatch.setattr("saehooks.kernels.cpu.products.MAX_SHARE", share)
    target, table, indices, offsets = case(device)
    rows, rate = rows_of(offsets, indices.numel()), torch.tensor(0.3, device=device)
    values = torch.randn(indices.numel(), generator=torch.Generator().manual_seed(5)).to(device).requires_grad_()
    moved = kernels.refine(target, table, Support(indices, offsets), values, rate)
    codes = torch.zeros(target.shape[0], table.shape[0], device=device).index_put((rows, indices), values)
    expected = values + rate * ((target - codes @ table) @ table.T)[rows, indices]
    torch.testing.assert_close(moved, expected.detach(), rtol=1e-4, atol=1e-4)
    assert not moved.requires_grad


def test_gradcheck_of_both_products_in_one(path, device):
    """Numerical derivatives agree in float64, also where only some inputs ask for a gradient."""
    left, table, indices, offsets = case(device, rows=4, d_sae=9, width=3, dtype=torch.float64, sizes=[2, 0, 9, 1])
    values, rate = torch.randn(12, dtype=torch.float64, device=device), torch.tensor(0.7, dtype=torch.float64)
    tensors = [left, table, values, rate.to(device)]

    def both(left, table, values, rate):
        return kernels.sddmm_spmm(left, table, Support(indices, offsets), values=values, rate=rate)

    for asking in ((0, 1, 2, 3), (1,), (0,), (2,), (3,)):
        given = [tensor.detach().requires_grad_(i in asking) for i, tensor in enumerate(tensors)]
        assert torch.autograd.gradcheck(both, given, raise_exception=True)


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


@pytest.mark.parametrize("sorted_inside", [True, False])
def test_tables_larger_than_the_cache_are_gathered_from_in_tiles(monkeypatch, sorted_inside):
    """A tile at a time gives what the whole table gives, whatever the order of latents in a row, empty rows too."""
    pytest.importorskip("numba")
    from saehooks.kernels.cpu import products

    left, table, indices, offsets = case("cpu")
    if not sorted_inside:
        indices = torch.cat([part.flip(0) for part in indices.tensor_split(offsets[1:-1])])
    monkeypatch.setattr(products, "MIN_REUSE", 0)
    rows, values = rows_of(offsets, indices.numel()), torch.randn(indices.numel())
    for bytes_of_a_tile in (4 * 24, 4 * 24 * 7, 2**40):
        monkeypatch.setattr(products, "TILE_BYTES", bytes_of_a_tile)
        inputs = [tensor.detach().requires_grad_() for tensor in (left, table)]
        with forced("cpu"):
            support = Support(indices, offsets)
            picked = kernels.sddmm(*inputs, support)
            sums = kernels.spmm(values * picked, support, inputs[1])
            moved, moved_sums = kernels.sddmm_spmm(*inputs, support, values=values)
            found = torch.autograd.grad(sums.sin().sum() + moved_sums.cos().sum(), inputs)
        own = [tensor.double().requires_grad_() for tensor in (left, table)]
        codes, exact = torch.zeros(len(left), len(table), dtype=torch.float64), (own[0] @ own[1].T)[rows, indices]
        dense = codes.index_put((rows, indices), values * exact) @ own[1]
        dense_moved = codes.index_put((rows, indices), values + exact) @ own[1]
        torch.testing.assert_close(sums.double(), dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moved.double(), values + exact, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moved_sums.double(), dense_moved, rtol=1e-4, atol=1e-4)
        expected = torch.autograd.grad(dense.sin().sum() + dense_moved.cos().sum(), own)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-3)


class TestOneGradientOfATable:
    """Products of one support leave their parts of a table's gradient in one place; nothing else may notice."""

    @pytest.fixture(autouse=True)
    def _made(self, path, device):
        self.left, self.table, self.indices, self.offsets = case(device, dtype=torch.float64)
        self.rows = rows_of(self.offsets, self.indices.numel())
        self.table.requires_grad_()

    def sums(self, support, **settings):
        """(rows, d) the table's rows weighed by their own scores: two products of one support."""
        return kernels.spmm(kernels.sddmm(self.left, self.table, support), support, self.table, **settings)

    def dense(self, table):
        codes = self.left.new_zeros(len(self.left), len(table))
        return codes.index_put((self.rows, self.indices), (self.left @ table.T)[self.rows, self.indices]) @ table

    def expected(self, loss):
        table = self.table.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(self.dense(table), table), table)[0]

    def support(self):
        return Support(self.indices, self.offsets)

    def test_other_uses_of_the_table_count_too(self):
        """A penalty on the table's rows enters before, between and after the products' parts."""
        for weigh in (lambda s, t: s.sin().sum() + t.norm(dim=1).sum(), lambda s, t: t.sum() * s.square().sum()):
            sums = self.sums(self.support())
            weigh(sums, self.table).backward()
            torch.testing.assert_close(self.table.grad, self.expected(weigh))
            self.table.grad = None

    def test_one_part_alone(self):
        """A detached score, or a gradient asked of the table alone, leaves the other part out, or in."""
        support = self.support()
        picked = kernels.sddmm(self.left, self.table, support)
        sums = kernels.spmm(picked.detach(), support, self.table)
        found = torch.autograd.grad(sums.sum(), self.table)[0]
        codes = self.left.new_zeros(len(self.left), len(self.table))
        codes = codes.index_put((self.rows, self.indices), picked.detach())
        torch.testing.assert_close(found, codes.sum(0)[:, None].expand_as(found))
        left = self.left.clone().requires_grad_()
        scores = kernels.sddmm(left, self.table, self.support())
        torch.autograd.grad(scores.sum(), left, retain_graph=True)  # asks nothing of the table
        torch.testing.assert_close(
            torch.autograd.grad(scores.sum(), self.table)[0],
            torch.zeros_like(self.table).index_add_(0, self.indices, self.left[self.rows]),
        )

    def test_passes_do_not_mix(self):
        """A second pass over the graph adds nothing of the first, nor of one that failed."""
        support = self.support()
        sums = self.sums(support)
        broken = sums * 1.0
        broken.register_hook(lambda grad: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                broken.sum().backward(retain_graph=True)
            sums.sum().backward(retain_graph=True)
            torch.testing.assert_close(self.table.grad, self.expected(lambda s, t: s.sum()))
            self.table.grad = None
        again = self.sums(support)  # another forward over the same support
        (sums.sum() + again.sum()).backward()
        torch.testing.assert_close(self.table.grad, 2 * self.expected(lambda s, t: s.sum()))

    def test_hooks_and_changes_in_place(self):
        """A hook of the table sees the whole gradient once; a table changed before backward is still an error."""
        seen = []
        self.table.register_hook(lambda grad: seen.append(grad.clone()))
        sums = self.sums(self.support())
        sums.sum().backward()
        assert len(seen) == 1
        torch.testing.assert_close(seen[0], self.expected(lambda s, t: s.sum()))
        sums = self.sums(self.support())
        with torch.no_grad():
            self.table.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sums.sum().backward()

    def test_a_table_may_change_between_two_uses_of_a_support(self):
        """Codes of before an optimiser's step are decoded with the table of after it, and trained."""
        support = self.support()
        kernels.sddmm(self.left, self.table, support)
        with torch.no_grad():
            self.table.mul_(2)
        self.sums(support).sum().backward()
        torch.testing.assert_close(self.table.grad, self.expected(lambda s, t: s.sum()))

    def test_codes_can_still_be_copied_and_pickled(self):
        """What a support remembers of its table stays behind."""
        support = self.support()
        self.sums(support)
        for other in (copy.deepcopy(support), pickle.loads(pickle.dumps(support))):
            assert torch.equal(other.indices, support.indices)
            self.sums(other).sum().backward()
            torch.testing.assert_close(self.table.grad, self.expected(lambda s, t: s.sum()))
            self.table.grad = None


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
