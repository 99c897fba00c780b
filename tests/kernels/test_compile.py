"""torch.compile of a model with an attachment inside: graph breaks, same results."""

from __future__ import annotations

import pytest
import torch

import saehooks as sh
from saehooks import SAE


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_takes_an_attachment():
    """Inside a block a compiled model runs eagerly, so hooks fire; outside it runs compiled, without any of them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 4)).eval()
    sae, x = SAE(8, 32), torch.randn(2, 3, 6)
    with torch.no_grad():
        plain = model(x)
        with sh.splice(model, sae, at="1") as trace:
            expected = model(x)
        codes, compiled = trace.codes, torch.compile(model, backend="aot_eager")
        for given in (model, compiled):  # the first call of the compiled model is inside a block
            with sh.splice(given, sae, at="1") as trace:
                torch.testing.assert_close(compiled(x), expected)
            assert torch.equal(trace.codes.indices, codes.indices)
            torch.testing.assert_close(compiled(x), plain)
        assert [len(rows) for rows in sh.harvest(compiled, [x], "1")] == [4]


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_sae_equals_the_plain_one():
    """torch.compile of the SAE itself breaks the graph at the kernels; reconstruction and gradients are the same."""
    torch.manual_seed(0)
    sae, x = SAE(8, 32), torch.randn(5, 8)
    expected = sae(x)
    compiled = torch.compile(sae, backend="aot_eager")
    found = compiled(x)
    torch.testing.assert_close(found.recons, expected.recons)
    assert torch.equal(found.codes.indices, expected.codes.indices)
    grads = [torch.autograd.grad(out.recons.square().sum(), list(sae.parameters())) for out in (found, expected)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)
