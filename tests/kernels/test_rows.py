"""What is computed row by row, against its formula in float64, on every path there is without a GPU."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch

from saehooks import kernels
from saehooks.kernels import Step, backend_for

SIZES = ((1, 1), (3, 577), (700, 40), (2100, 600))


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """A backend that computes rows on this machine."""
    if request.param == "cpu":
        pytest.importorskip("numba")
    return backend_for(torch.zeros(1), Step(backend=request.param))


def matrices(rows, d, count=2, dtype=torch.float32):
    made = torch.Generator().manual_seed(rows + d)
    return [torch.randn(rows, d, generator=made, dtype=torch.float64).to(dtype) for _ in range(count)]


def close(found, wanted, atol=3e-6):
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=3e-6, atol=atol)


@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_rows_are_what_their_formulas_say(backend, rows, d):
    """Products, directions about an offset, gradients of a scale, squared errors and scaled differences."""
    x, y = matrices(rows, d)
    wide, other = x.double(), y.double()
    factor, offset = x[:, 0].contiguous(), y[0].contiguous()
    cancelled = 2**-22 * d  # of a sum whose terms have either sign
    close(backend.row_products(x, y), (wide * other).sum(1), cancelled)
    for given in (None, offset):
        centred = wide if given is None else wide - given.double()
        directions, norm = backend.directions(
            x + (0 if given is None else 1), None if given is None else given + 1, 0.5
        )
        close(norm, centred.norm(dim=1))
        close(directions, centred / (centred.norm(dim=1) + 0.5)[:, None])
    d_recons, d_scale = backend.scaled_gradient(x, y, factor)
    close(d_recons, wide * factor.double()[:, None])
    close(d_scale, (wide * other).sum(1), cancelled)
    close(backend.squared_errors(x, y), (wide - other).square().sum(1))
    close(backend.squared_errors(x, offset[None]), (wide - offset.double()).square().sum(1))
    close(backend.scaled_difference(x, y, factor), factor.double()[:, None] * (wide - other))


def test_rows_of_any_layout_and_type(backend):
    """Transposed, strided and empty matrices, and those of other types, which plain torch serves."""
    x, y = matrices(40, 40)
    for a, b in ((x.T, y.T), (x[::2], y[::2]), (x[:0], y[:0]), (x.double(), y.double()), (x.bfloat16(), y.bfloat16())):
        wide, other = a.double(), b.double()
        tolerance = {"rtol": 0.03, "atol": 0.3} if a.dtype == torch.bfloat16 else {"rtol": 3e-6, "atol": 3e-6}
        for found, wanted in (
            (backend.row_products(a, b), (wide * other).sum(1)),
            (backend.squared_errors(a, b), (wide - other).square().sum(1)),
            (backend.directions(a, None, 1e-6)[1], wide.norm(dim=1)),
            (backend.scaled_difference(a, b, a[:, 0]), wide[:, :1] * (wide - other)),
            (backend.scaled_gradient(a, b, b[:, 1])[0], wide * other[:, 1:2]),
        ):
            assert found.dtype == a.dtype
            torch.testing.assert_close(found.double(), wanted, **tolerance)


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_a_row_that_is_not_finite_reaches_no_other(backend, value):
    """It becomes what it is in plain torch."""
    x, y = matrices(5, 20)
    x[2, 3] = value
    for found in (
        backend.row_products(x, y),
        backend.squared_errors(x, y),
        *backend.directions(x, None, 0.0),
        *backend.scaled_gradient(x, y, y[:, 0].contiguous()),
        backend.scaled_difference(x, y, y[:, 0].contiguous()),
    ):
        rows = found.reshape(5, -1).isfinite().all(1)
        assert rows.tolist() == [True, True, False, True, True]


def test_a_row_of_zeros_has_no_direction(backend):
    """With eps it stays 0; without, as in the authors' code, it is 0 / 0."""
    x = torch.zeros(2, 8)
    directions, norm = backend.directions(x, None, 1e-6)
    assert not directions.any()
    assert not norm.any()
    assert backend.directions(x, None, 0.0)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squared_errors_have_the_gradients_of_their_formula(dtype):
    """Of both sides, a second time too; where one side alone is asked for, that of the other is None."""
    x, y = (one.requires_grad_() for one in matrices(7, 30, dtype=dtype))
    weights = torch.linspace(-1, 2, 7, dtype=dtype)
    found = torch.autograd.grad((kernels.squared_errors(x, y) * weights).sum(), (x, y), create_graph=True)
    wanted = torch.autograd.grad(((x - y).square().sum(1) * weights).sum(), (x, y), create_graph=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    again, expected = (torch.autograd.grad(grads[0].pow(3).sum(), (x, y)) for grads in (found, wanted))
    for one, other in zip(again, expected, strict=True):
        torch.testing.assert_close(one, other)
    (alone,) = torch.autograd.grad(kernels.squared_errors(x, y.detach()).sum(), x)
    torch.testing.assert_close(alone, 2 * (x - y).detach())
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(kernels.squared_errors, (x, y))
        assert torch.autograd.gradgradcheck(kernels.squared_errors, (x, y))


def test_squared_errors_carry_forward_derivatives():
    """A dual tensor goes through plain torch."""
    x, y = matrices(4, 9)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, y)
        found = torch.autograd.forward_ad.unpack_dual(kernels.squared_errors(dual, y)).tangent
    torch.testing.assert_close(found, (2 * (x - y) * y).sum(1))
