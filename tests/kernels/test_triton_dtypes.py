"""Models and SAEs of different dtypes on the GPU path: reads, splices, edits and gradients as on the reference path."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from forced import forced

from saehooks import SAE, read, scale, splice
from saehooks.attachments import attachment
from saehooks.kernels import gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(BF16, F32), (F32, BF16), (BF16, BF16), (F16, F32), (F16, BF16)]
LOOSE = {F32: {"rtol": 1e-4, "atol": 1e-5}, BF16: {"rtol": 3e-2, "atol": 3e-2}, F16: {"rtol": 3e-3, "atol": 3e-3}}

pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning"),
    pytest.mark.parametrize(("model_dtype", "sae_dtype"), DTYPES, ids=lambda dtype: str(dtype)[6:]),
    pytest.mark.parametrize(("dictionary", "activation"), [("concepts", "sparsemax"), ("linear", "topk")]),
]


@pytest.fixture
def parts(model_dtype, sae_dtype, dictionary, activation):
    """A small model, an SAE at its middle, and an input, of the dtypes of the test."""
    made = {"device": DEVICE, "dtype": model_dtype}
    model = nn.Sequential(nn.Linear(6, 16, **made), nn.GELU(), nn.Linear(16, 5, **made))
    settings = {"key_scale": 6.0} if dictionary == "concepts" else {"k": 4}
    sae = SAE(16, 48, dictionary, activation, hook_name="1", device=DEVICE, dtype=sae_dtype, **settings).eval()
    return model, sae, torch.randn(2, 3, 6, **made)


@pytest.fixture
def launched(monkeypatch):
    """Names of the GPU path's functions in the order they were called."""
    names = []
    for name in ("select_products", "sddmm", "spmm"):
        plain = getattr(gpu, name)

        def counted(*args, _plain=plain, _name=name, **settings):
            names.append(_name)
            return _plain(*args, **settings)

        monkeypatch.setattr(gpu, name, counted)
    return names


def on_both(run):
    """What ``run`` gives on the GPU path and on the reference path."""
    with forced("gpu"):
        mine = run()
    with forced("reference"):
        return mine, run()


def same_codes(mine, expected, sae_dtype):
    """The same support, and values as close as the dtype allows."""
    assert mine.values.dtype == sae_dtype
    torch.testing.assert_close(mine.dense(), expected.dense(), **LOOSE[sae_dtype])
    assert torch.equal(mine.support_size, expected.support_size)


def test_a_read_leaves_the_model_alone_and_finds_the_same_codes(parts, sae_dtype, launched):
    """Outputs are bit-identical to the bare model's, in its dtype; codes and reconstruction are the reference's."""
    model, sae, x = parts

    @torch.no_grad()
    def run():
        with read(model, sae) as trace:
            out = model(x)
        assert torch.equal(out, model(x))
        assert trace.acts.dtype == x.dtype
        return trace.codes, trace.recons

    (codes, recons), (expected_codes, expected_recons) = on_both(run)
    assert launched[0] == "select_products"
    same_codes(codes, expected_codes, sae_dtype)
    assert recons.dtype == sae_dtype
    torch.testing.assert_close(recons, expected_recons, **LOOSE[sae_dtype])


def test_a_splice_and_an_edit_return_to_the_dtype_of_the_model(parts, model_dtype, sae_dtype, launched):
    """The spliced and the edited output have the model's dtype and the reference's values."""
    model, sae, x = parts
    with torch.no_grad(), read(model, sae) as trace:
        model(x)
    latent = int(trace.codes.indices[0])
    loose = max(LOOSE[model_dtype], LOOSE[sae_dtype], key=lambda allowed: allowed["rtol"])
    for verb in (lambda: splice(model, sae), lambda: scale(model, sae, {latent: 3.0})):

        @torch.no_grad()
        def run(verb=verb):
            with verb():
                return model(x)

        mine, expected = on_both(run)
        assert mine.dtype == model_dtype
        assert not torch.equal(mine, model(x))
        torch.testing.assert_close(mine, expected, **loose)
    assert "spmm" in launched


def test_gradients_pass_a_splice_in_both_dtypes(parts, model_dtype, sae_dtype):
    """The gradient at the input and at the latents is the reference's."""
    model, sae, x = parts

    def run():
        given = x.clone().requires_grad_()
        with splice(model, sae, grads=True) as trace:
            model(given).float().square().sum().backward()
        return given.grad, trace.grads.dense()

    (d_x, d_codes), (expected_x, expected_codes) = on_both(run)
    assert (d_x.dtype, d_codes.dtype) == (model_dtype, sae_dtype)
    for found, expected in ((d_x, expected_x), (d_codes, expected_codes)):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < 3e-2


def test_a_capacity_changes_nothing_but_the_room(parts, sae_dtype, monkeypatch):
    """Given room, a splice has the same output and codes as without, whatever the dtypes."""
    model, sae, x = parts
    with torch.no_grad(), forced("gpu"):
        with monkeypatch.context() as patched:
            patched.setattr(attachment, "FEW_SCORES", 0)
            with splice(model, sae) as trace:
                expected, codes = model(x), trace.codes
        assert trace._record.codes.indices.numel() == codes.indices.numel()
        with splice(model, sae) as trace:
            found = model(x)
        assert trace._record.codes.indices.numel() == 6 * 48
        assert trace.codes.indices.numel() == codes.indices.numel(), "users see no padding"
        assert torch.equal(found, expected)
        assert torch.equal(trace.codes.dense(), codes.dense())
