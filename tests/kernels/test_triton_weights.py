"""Entmax probabilities on the Triton kernels: those of the reference, in one order, without waiting."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import waiting
from forced import forced

from saehooks import SAE, kernels
from saehooks.activations.entmax import entmax_weights
from saehooks.support import offsets_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")


def rows_of_scores(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one entry, none, few, equal ones, and more than a warp takes at a time."""
    offsets = offsets_of(torch.tensor([1, 0, 5, 3, 300])).to(DEVICE)
    scores = torch.randn(309, generator=torch.Generator().manual_seed(0)) * scale
    scores[6:9] = scores[6]
    return scores.to(DEVICE), offsets


def weights_and_gradients(name, scores, offsets, alpha, grad):
    scores, alpha = scores.clone().requires_grad_(), torch.tensor(alpha, device=DEVICE, requires_grad=True)
    with forced(name):
        weights = entmax_weights(scores, offsets, alpha)
        weights.backward(grad)
    return weights.detach(), scores.grad, alpha.grad


@pytest.mark.parametrize("alpha", [1.05, 1.5, 1.9, 2.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 1000.0])
def test_weights_and_gradients_are_those_of_the_reference(alpha, scale):
    """Any sizes of rows, with entries that get no weight; the gradients of the scores and of alpha."""
    scores, offsets = rows_of_scores(scale)
    grad = torch.randn(309, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = weights_and_gradients("gpu", scores, offsets, alpha, grad)
    expected = weights_and_gradients("reference", scores, offsets, alpha, grad)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    sums = torch.segment_reduce(found[0], "sum", offsets=offsets, initial=0.0)
    torch.testing.assert_close(sums, torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], device=DEVICE))


def test_a_row_without_a_finite_maximum_is_not_a_number():
    """NaN or infinity stays visible in its own row, forward and backward."""
    scores, offsets = rows_of_scores(1.0)
    scores[0], scores[4], scores[200] = float("inf"), float("nan"), float("nan")
    grad = torch.ones_like(scores)
    weights, d_scores, _ = weights_and_gradients("gpu", scores, offsets, 1.5, grad)
    for found in (weights, d_scores):
        assert found[:6].isnan().all()
        assert found[6:9].isfinite().all()
        assert found[9:].isnan().all()


def test_padding_has_no_weight_and_nothing_waits():
    """Entries past the last row get weight and gradient 0; a fixed alpha never reaches the host."""
    scores, offsets = rows_of_scores(1.0)
    exact, d_exact, _ = weights_and_gradients("gpu", scores, offsets, 1.5, torch.ones_like(scores))
    padded = torch.cat([scores, scores.new_full((7,), 3.0)]).requires_grad_()
    sae = SAE(4, 8, activation="entmax", values="weight", device=DEVICE)
    support = kernels.Support(torch.zeros(316, dtype=torch.int64, device=DEVICE), offsets, padded.detach())
    with forced("gpu"), waiting.never(DEVICE):
        weights = sae.activation.values(padded, support)
        weights.sum().backward()
    assert torch.equal(weights[:309], exact)
    assert torch.equal(padded.grad[:309], d_exact)
    assert not weights[309:].any()
    assert not padded.grad[309:].any()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_sae_trains_as_on_the_reference_path(learned, dtype):
    """Weights, their gradients and alpha's, through the whole SAE; in half precision alpha keeps its digits."""
    made = torch.Generator().manual_seed(0)
    x, kept = torch.randn(6, 8, generator=made).to(DEVICE, dtype), {}
    for name in ("reference", "gpu"):
        torch.manual_seed(0)
        sae = SAE(8, 60, activation="entmax", values="weight", alpha=1.37, learn_alpha=learned).to(DEVICE, dtype)
        with forced(name):
            (sae(x).recons - x).square().sum().backward()
        kept[name] = {key: p.grad for key, p in sae.named_parameters() if p.grad is not None}
    assert kept["gpu"].keys() == kept["reference"].keys()
    assert ("activation.raw_alpha" in kept["gpu"]) == learned
    for key, grad in kept["gpu"].items():
        torch.testing.assert_close(
            grad, kept["reference"][key], **({} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1})
        )
