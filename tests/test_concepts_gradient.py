"""The written-out gradient of the concept dictionary's queries."""

from __future__ import annotations

import pytest
import torch

from saehooks import SAE


def plain(dictionary, x):
    """The queries and norms in autograd's own operations."""
    centred = x if dictionary.b_dec is None else x - dictionary.b_dec
    norm = centred.norm(dim=1)
    return (centred / (norm + dictionary.eps)[:, None]) @ dictionary.W_k.T, norm


@pytest.mark.parametrize("through_x", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_queries_have_the_gradients_of_their_formula(through_x, center):
    """Queries, norms and every gradient equal autograd's, with and without a gradient for the activations."""
    torch.manual_seed(0)
    dictionary = SAE(5, 11, dtype=torch.float64, center=center).dictionary
    with torch.no_grad():
        dictionary.W_k.normal_()
        if center:
            dictionary.b_dec.normal_()
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=through_x)
    wanted = [t for t in (x, dictionary.W_k, dictionary.b_dec) if t is not None and t.requires_grad]
    weights = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    results = []
    for queries, norm in (dictionary.prepare(x)[:2], plain(dictionary, x)):
        loss = (queries * weights[0]).sum() + (norm * weights[1]).sum()
        results.append((queries, norm, *torch.autograd.grad(loss, wanted)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_row_of_zeros_has_finite_gradients():
    """A zero row has no direction; its queries are zero and nothing becomes NaN."""
    dictionary = SAE(4, 6).dictionary
    x = torch.zeros(2, 4, requires_grad=True)
    queries, norm = dictionary.prepare(x)[:2]
    (queries.sum() + norm.sum()).backward()
    assert not queries.any()
    for grad in (x.grad, dictionary.W_k.grad, dictionary.b_dec.grad):
        assert grad.isfinite().all()
