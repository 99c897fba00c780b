"""The plain-torch writings of other trainers' steps that benchmarks measure are those trainers' own steps.

Runs where their packages are: ``recipes/benchmark/peers_env && .venv-peers/bin/python -m pytest tests/test_peers.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = str(Path(__file__).parents[1] / "recipes" / "benchmark")
SIZES = 16, 64, 4, torch.device("cpu")


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.setattr(sys, "path", [BENCHMARK, *sys.path])
    return pytest.importorskip("peers")


def gradients(peer, x, encoder, tables):
    """Loss and gradients, the encoder's table one row a latent."""
    loss = peer.loss(x)
    loss.backward()
    found = [parameter.grad for parameter in tables(peer.model)]
    found[0] = found[0] if encoder else found[0].T
    return [loss.detach(), *found]


def agree(package, plain, encoder, tables):
    """Give both the same tables; loss and gradients must be equal."""
    with torch.no_grad():
        first, *rest = tables(package.model)
        own = (plain.model.W_enc, plain.model.b_enc, plain.model.W_dec, plain.model.b_dec)
        for mine, theirs in zip(own, (first if encoder else first.T, *rest), strict=True):
            mine.copy_(theirs)
    x = torch.randn(6, 16)
    mine = gradients(plain, x, True, lambda m: (m.W_enc, m.b_enc, m.W_dec, m.b_dec))
    for found, expected in zip(mine, gradients(package, x, encoder, tables), strict=True):
        torch.testing.assert_close(found, expected)


def test_sae_lens_topk(peers):
    """Dense codes, without rescaling by decoder norms."""
    pytest.importorskip("sae_lens")
    package, plain = peers.sae_lens_topk(*SIZES), peers.plain_sae_lens_topk(*SIZES)
    agree(package, plain, False, lambda m: (m.W_enc, m.b_enc, m.W_dec, m.b_dec))


def test_sparsify_topk(peers):
    """Its fused encoder and sparse decoder."""
    pytest.importorskip("sparsify")
    package, plain = peers.sparsify_topk(*SIZES), peers.plain_sparsify_topk(*SIZES)
    agree(package, plain, True, lambda m: (m.encoder.weight, m.encoder.bias, m.W_dec, m.b_dec))


def test_the_published_sparsemax_step_selects_and_weighs_as_ours(peers):
    """With our table, keys and values the published formulation gives our reconstruction."""
    from saehooks import SAE

    sae, x = SAE(16, 64, key_scale=5.0, center=False, eps=0.0), torch.randn(6, 16)
    model = peers.PublishedSparsemax(sae.dictionary.C.detach(), 5.0)
    torch.testing.assert_close(model(x), sae(x).recons, rtol=1e-4, atol=1e-5)
