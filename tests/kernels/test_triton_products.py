"""The product tests of every path, on the Triton kernels: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from forced import forced
from test_products import (  # noqa: F401
    case,
    test_gradcheck,
    test_known_scores_are_passed_through_and_still_carry_gradients,
    test_no_entries_no_rows_and_strides,
    test_not_a_number_stays_where_it_is,
    test_support_from_another_source_needs_no_scores,
)

from saehooks import SAE, TrainConfig, Trainer, kernels
from saehooks.activations.sparsemax import simplex_weights
from saehooks.errors import ConfigError
from saehooks.kernels import Capacity, Step, Support, reference
from saehooks.support import rows_of
from saehooks.training.optimiser import TableAdam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")


@pytest.fixture
def path():
    with forced("gpu"):
        yield "gpu"


@pytest.fixture
def device(path):
    return torch.device(DEVICE)


@pytest.mark.parametrize("width", [1, 24, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_agree_with_the_reference(path, device, width, dtype):
    """All three products, for widths that fill no block, with float32 sums whatever the dtype."""
    left, table, indices, offsets = (
        t.to(dtype) if t.is_floating_point() else t for t in case(device, rows=9, width=width)
    )
    values = torch.randn(indices.numel(), device=device).to(dtype)
    kernels_here, support = kernels.backend_for(left), Support(indices, offsets)
    cases = {
        "sddmm": (left, table, support),
        "spmm": (values, support, table),
        "spmm_transposed": (values, support, left, 70),
    }
    for name, arguments in cases.items():
        found = getattr(kernels_here, name)(*arguments)
        wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
        expected = getattr(reference, name)(*wide)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-3)


def test_long_columns_are_cut_and_summed_in_order(path, device, monkeypatch):
    """A latent that fires on every row is summed by several programs, with the same result each time."""
    from saehooks.kernels.gpu import products

    monkeypatch.setattr(products, "SEGMENT", 16)
    scores = torch.tensor([[1.0, -1.0, 1.0]]).expand(70, 3).to(device)
    support = reference.select_rows(scores, kernels.Threshold(0.0))
    values, left = torch.randn(140, device=device), torch.randn(70, 20, device=device)
    found = kernels.backend_for(left).spmm_transposed(values, support, left, 3)
    expected = reference.spmm_transposed(values.double(), support, left.double(), 3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    again = kernels.backend_for(left).spmm_transposed(
        values, Support(support.indices.clone(), support.offsets), left, 3
    )
    assert torch.equal(found, again)


def test_a_sum_beyond_float16_becomes_infinite_in_its_row_only(path, device):
    """Overflow stays visible and stays where it is."""
    table = torch.full((4, 8), 30_000.0, dtype=torch.float16, device=device)
    values = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float16, device=device)
    indices, offsets = torch.tensor([0, 1, 2, 3], device=device), torch.tensor([0, 1, 4], device=device)
    sums = kernels.spmm(values, Support(indices, offsets), table)
    assert sums[0].isfinite().all()
    assert sums[1].isinf().all()


def test_sparsemax_weights_and_their_gradient(path, device):
    """The kernel that centres rows gives what the plain formula gives, and its Jacobian."""
    _, _, indices, offsets = case(device, rows=8)
    scores = torch.randn(indices.numel(), device=device) + 100
    scores.requires_grad_()
    rows = rows_of(offsets, indices.numel())
    weights = simplex_weights(scores, offsets)
    sums = torch.zeros(8, device=device).index_add(0, rows, weights.detach())
    torch.testing.assert_close(sums[offsets.diff() > 0], torch.ones(8, device=device)[offsets.diff() > 0])
    grad = torch.randn_like(weights)
    (found,) = torch.autograd.grad(weights, scores, grad)
    mean = torch.zeros(8, device=device).index_add(0, rows, grad) / offsets.diff().clamp(min=1)
    torch.testing.assert_close(found, grad - mean[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparsemax_weights_in_half_precision(path, device, dtype):
    """Half-precision scores are centred in float64, and rounded once."""
    offsets = torch.tensor([0, 1, 4, 204], device=device)
    scores = torch.randn(204, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    expected = simplex_weights(scores.double(), offsets)
    torch.testing.assert_close(simplex_weights(scores, offsets), expected.to(dtype))


@pytest.mark.parametrize("activation", ["sparsemax", "topk"])
@pytest.mark.parametrize("dictionary", ["concepts", "linear"])
def test_a_training_step_agrees_with_the_reference_in_float64(path, device, dictionary, activation):
    """Encode, decode and every gradient, with the same support."""
    torch.manual_seed(0)
    settings = {"k": 4} if activation == "topk" else {"values": "weight"}
    sae = SAE(16, 40, dictionary, activation, device=device, **settings)
    x = torch.randn(6, 16, device=device)
    exact = SAE(16, 40, dictionary, activation, dtype=torch.float64, device=device, **settings)
    exact.load_state_dict(sae.state_dict())
    for one, given in ((sae, x), (exact, x.double())):
        (one(given).recons - given).square().sum().backward()
    assert torch.equal(sae.encode(x).indices, exact.encode(x.double()).indices)
    for (name, p), q in zip(sae.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_of_fixed_size_gives_the_same_gradients(path, device):
    """Padding under a capacity changes neither the reconstruction nor any gradient."""
    for dictionary, settings in (("concepts", {"values": "weight"}), ("linear", {})):
        torch.manual_seed(1)
        sae = SAE(16, 40, dictionary, **settings, device=device)
        x = torch.randn(5, 16, device=device)
        found = []
        for entries in (None, 5 * 40 + 3):
            sae.zero_grad()
            step = None if entries is None else Step(capacity=Capacity(entries))
            recons = sae(x, step=step).recons
            (recons - x).square().sum().backward()
            found.append([recons.detach(), *(p.grad for p in sae.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dictionary", ["concepts", "linear"])
def test_the_fused_update_is_adam(path, device, dictionary):
    """Gradients that are never written lead where torch's Adam leads; skipped steps change nothing; state is shared."""
    made = []
    for fused in (False, True):
        torch.manual_seed(2)
        sae = SAE(8, 20, dictionary, device=device)
        plain = torch.optim.Adam(sae.parameters(), lr=0.01, betas=(0.8, 0.95))
        optimizer = TableAdam(sae, lr=0.01, betas=(0.8, 0.95)) if fused else plain
        for step in range(3):
            x = torch.randn(6, 8, device=device)
            optimizer.zero_grad()
            kernel_step = optimizer.kernel_step() if fused else None
            (sae(x, step=kernel_step).recons - x).square().sum().backward()
            assert not fused or all(p.grad is None for p in optimizer.tables)
            if fused and step == 2:
                before = [p.detach().clone() for p in sae.parameters()]
                optimizer.found_inf = torch.ones((), device=device)
            if not (step == 2 and not fused):
                optimizer.step()
        made.append(list(sae.parameters()))
        if fused:
            assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), before, strict=True)), "the step was skipped"
            plain.load_state_dict(optimizer.state_dict())
            assert all(float(state["step"]) == 2 for state in plain.state.values())
    for p, q in zip(*made, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_trainer_takes_the_fused_update(path, device):
    """Two steps of the trainer end where they end on the reference path."""
    made = []
    for name in ("reference", "gpu"):
        torch.manual_seed(4)
        sae = SAE(8, 20, "concepts", device=device)
        with forced(name):
            trainer = Trainer(sae, TrainConfig(lr=0.01, warmup_steps=0, decay=0.0))
            for _ in range(2):
                trainer.step(torch.randn(6, 8, device=device))
        made.append(list(sae.parameters()))
    for p, q in zip(*made, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_deferred_gradients_can_be_written_after_all(path, device):
    """`write_gradients` leaves what a plain backward pass leaves; a table with two kinds of gradient gets their sum."""
    torch.manual_seed(3)
    sae = SAE(8, 20, "linear", device=device)
    x = torch.randn(6, 8, device=device)
    (sae(x).recons - x).square().sum().backward()
    plain = [p.grad for p in sae.parameters()]
    optimizer = TableAdam(sae, lr=0.01)
    optimizer.zero_grad()
    (sae(x, step=optimizer.kernel_step()).recons - x).square().sum().backward()
    assert all(p.grad is None for p in optimizer.tables)
    optimizer.write_gradients()
    for p, q in zip(sae.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, q)
    with pytest.raises(ConfigError, match="amsgrad"):
        TableAdam(sae, amsgrad=True)
