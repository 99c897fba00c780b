"""SAEs of ours inside SAELens: the same numbers, through its files, and its own evals equal to our figures.

Runs where SAELens is: ``recipes/benchmark/peers_env && .venv-peers/bin/python -m pytest tests/test_saelens_plugin.py``.
"""

from __future__ import annotations

import pytest
import torch

import saehooks as sh
from saehooks.formats import saelens

sae_lens = pytest.importorskip("sae_lens")

from saehooks.formats import saelens_plugin  # noqa: E402 - it needs SAELens

CELLS = [
    ("concepts", "sparsemax", {}),
    ("concepts", "entmax", {}),
    ("linear", "sparsemax", {"normalize": True}),
    ("linear", "topk", {"k": 4}),
    ("linear", "relu", {"row_norm": "layer_norm"}),
    ("kron", "sparsemax", {}),
]


def made(dictionary, activation, settings, d_in=32, d_sae=64):
    torch.manual_seed(0)
    sae = sh.SAE(d_in, d_sae, dictionary, activation, hook_name="blocks.1.hook_resid_post", **settings)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return sae.eval()


@pytest.mark.parametrize(("dictionary", "activation", "settings"), CELLS)
def test_saelens_computes_what_we_do(dictionary, activation, settings, tmp_path):
    """Wrapped, through our folder, and through SAELens' own: dense values times scale, and the reconstruction."""
    sae, x = made(dictionary, activation, settings), torch.randn(5, 7, 32)
    sae.save(tmp_path / "ours")
    saelens_plugin.wrap(sae).save_model(tmp_path / "theirs")
    peers = [
        saelens_plugin.wrap(sae),
        sae_lens.SAE.load_from_disk(str(tmp_path / "ours"), converter=saelens_plugin.disk_loader),
        sae_lens.SAE.load_from_disk(str(tmp_path / "theirs")),
    ]
    with torch.no_grad():
        out = sae(x)
        acts = out.codes.dense()
        acts = acts if out.codes.scale is None else acts * out.codes.scale.reshape(5, 7, 1)
        for peer in peers:
            torch.testing.assert_close(peer.encode(x), acts)
            torch.testing.assert_close(peer(x), out.recons, rtol=1e-4, atol=1e-5)
            assert peer.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
            assert peer.W_dec.shape == (64, 32)


@pytest.mark.parametrize(
    ("activation", "settings"),
    [
        ("relu", {}),
        ("gated", {}),
        ("jumprelu", {}),
        ("topk", {"k": 4}),
        ("topk", {"k": 4, "negative": "magnitude"}),
        ("batchtopk", {"k": 4}),
        ("mutual_choice", {"k": 4}),
        ("relu", {"normalize": True}),
        ("relu", {"row_norm": "layer_norm"}),
        ("relu", {"row_norm": "constant_norm"}),
    ],
)
def test_saelens_reads_what_we_write_for_it(activation, settings, tmp_path):
    """Every cell that has an equivalent there, without the plug-in."""
    sae, x = made("linear", activation, settings), torch.randn(40, 32)
    sae.train()(x)
    sae.eval()
    saelens.save(sae, tmp_path)
    peer = sae_lens.SAE.load_from_disk(str(tmp_path))
    assert type(peer) is not saelens_plugin.SaehooksSAE
    with torch.no_grad():
        out = sae(x)
        torch.testing.assert_close(peer(x), out.recons, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((peer.encode(x) != 0).sum(-1), (out.codes.dense() != 0).sum(-1))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_saelens_reads_transcoders_that_we_write(activation, skip, tmp_path):
    """With another width out than in."""
    torch.manual_seed(0)
    made_here = sh.sae.Transcoder(32, 64, activation=activation, d_out=24, skip=skip, hook_name="a", hook_name_out="b")
    with torch.no_grad():
        for p in made_here.parameters():
            p.add_(0.1 * torch.randn_like(p))
    saelens.save(made_here.eval(), tmp_path)
    peer, x = sae_lens.SAE.load_from_disk(str(tmp_path)), torch.randn(40, 32)
    with torch.no_grad():
        torch.testing.assert_close(peer(x), made_here(x).recons, rtol=1e-4, atol=1e-5)
    assert peer.cfg.metadata.hook_name_out == "b"


@pytest.mark.parametrize("dictionary", ["concepts", "kron"])
def test_saelens_evals_equal_our_measure(dictionary):
    """`run_evals` on a tiny model: cross-entropies, KL and L0 are those of `measure`, to 1e-4."""
    from datasets import Dataset
    from sae_lens import ActivationsStore
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sae = made(dictionary, "sparsemax", {})
    torch.manual_seed(1)
    config = HookedTransformerConfig(
        n_layers=3, d_model=32, n_ctx=32, d_head=8, n_heads=4, d_vocab=50, act_fn="gelu", init_weights=True, seed=0
    )
    model = HookedTransformer(config).eval()
    texts = [{"tokens": torch.randint(0, 50, (16,)).tolist()} for _ in range(64)]
    store = ActivationsStore(
        model,
        Dataset.from_list(texts),
        streaming=False,
        hook_name="blocks.1.hook_resid_post",
        hook_head_index=None,
        context_size=16,
        d_in=32,
        n_batches_in_buffer=2,
        total_training_tokens=10_000,
        store_batch_size_prompts=4,
        train_batch_size_tokens=64,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        disable_concat_sequences=True,
    )
    seen = []
    tokens_of = store.get_batch_tokens

    def kept(*args, **kwargs):
        seen.append(tokens_of(*args, **kwargs))
        return seen[-1]

    store.get_batch_tokens = kept
    asked = EvalConfig(
        batch_size_prompts=4,
        n_eval_reconstruction_batches=3,
        n_eval_sparsity_variance_batches=3,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    metrics, _ = run_evals(
        saelens_plugin.wrap(sae), store, model, ActivationScaler(), asked, exclude_special_tokens=False
    )
    everywhere = sh.positions(slice(0, None))

    def ours(batches):
        with torch.no_grad(), sh.measure(model, sae, where=everywhere, live=False) as live:
            for tokens in batches:
                model(tokens)
        return live.summary()

    first, second = ours(seen[:3]), ours(seen[3:6])
    kept_ce = metrics["model_performance_preservation"]
    assert first["ce_clean"] == pytest.approx(kept_ce["ce_loss_without_sae"], abs=1e-4)
    assert first["ce_spliced"] == pytest.approx(kept_ce["ce_loss_with_sae"], abs=1e-4)
    assert first["ce_zero"] == pytest.approx(kept_ce["ce_loss_with_ablation"], abs=1e-4)
    assert first["ce_recovered"] == pytest.approx(kept_ce["ce_loss_score"], abs=1e-3)
    assert second["l0"] == pytest.approx(metrics["sparsity"]["l0"], abs=1e-4)
    fvu = 1 - metrics["reconstruction_quality"]["explained_variance"]
    assert second["fvu"] == pytest.approx(fvu, abs=1e-4)
