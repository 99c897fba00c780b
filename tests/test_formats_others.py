"""SAEs of other libraries: files built as they write them, outputs compared with their formulas."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import saehooks as sh
from saehooks.errors import FormatError
from saehooks.formats import dictionary_learning, gemma_scope, saelens, sparsify

D_IN, D_SAE, K = 6, 20, 4


@pytest.fixture
def w():
    """Random weights of one linear SAE, and rows to read."""
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    weights = {
        "W_enc": random(D_IN, D_SAE),
        "W_dec": random(D_SAE, D_IN),
        "b_enc": random(D_SAE),
        "b_dec": random(D_IN),
        "threshold": random(D_SAE).abs(),
        "b_gate": random(D_SAE),
        "b_mag": random(D_SAE),
        "r_mag": random(D_SAE),
    }
    return weights, random(30, D_IN)


def topk(scores, k=K):
    """The k largest, rectified."""
    return scores.relu() * (scores >= scores.topk(k, dim=1).values[:, -1:])


def check(sae, x, codes, recons):
    """Codes and reconstruction as their formula gives them."""
    out = sae(x)
    torch.testing.assert_close(out.codes.dense(), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.recons, recons, rtol=1e-4, atol=1e-5)
    assert not sae.training


def lens_folder(folder, w, names, **cfg):
    """A folder as SAELens 6 writes it."""
    folder.mkdir(exist_ok=True)
    save_file({name: w[name].contiguous() for name in names}, folder / "sae_weights.safetensors")
    base = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "normalize_activations": "none"}
    more = {"metadata": {"hook_name": "blocks.3.hook_resid_pre", "model_name": "gpt2", "sae_lens_version": "6.54.0"}}
    (folder / "cfg.json").write_text(json.dumps({**base, "reshape_activations": "none", **cfg, **more}))
    return folder


BASE = ("W_enc", "W_dec", "b_enc", "b_dec")


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "rescaled", "gated"])
def test_saelens(kind, subtract, w, tmp_path):
    """Every architecture, with and without b_dec taken off the input; the site is known."""
    weights, x = w
    linear = (x - weights["b_dec"] * subtract) @ weights["W_enc"]
    pre, norm = linear + weights["b_enc"], weights["W_dec"].norm(dim=1)
    cfg, names = {"architecture": kind, "apply_b_dec_to_input": subtract}, BASE
    decode = weights["W_dec"]
    if kind == "standard":
        codes = pre.relu()
    elif kind == "jumprelu":
        names, codes = (*BASE, "threshold"), pre * (pre > weights["threshold"])
    elif kind == "gated":
        names = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
        codes = (linear + weights["b_gate"] > 0) * (weights["r_mag"].exp() * linear + weights["b_mag"]).relu()
    else:
        cfg |= {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": kind == "rescaled"}
        codes = topk(pre * norm) if kind == "rescaled" else topk(pre)
        decode = decode / norm[:, None] if kind == "rescaled" else decode
    sae = sh.load(lens_folder(tmp_path / "sae", weights, names, **cfg))
    check(sae, x, codes, codes @ decode + weights["b_dec"])
    assert sae.hook_name == "blocks.3.hook_resid_pre"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gated", "jumprelu", "topk", "batchtopk"])
def test_saelens_round_trip(activation, normalize, w, tmp_path):
    """What is written for SAELens comes back with the same outputs."""
    _, x = w
    settings = {"normalize": normalize, **({"k": K} if "topk" in activation else {})}
    sae = sh.SAE(D_IN, D_SAE, "linear", activation, hook_name="site", **settings)
    sae.initialise(3 * x)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    sae.train()(x)
    sae.eval()
    saelens.save(sae, tmp_path)
    again = sh.load(tmp_path)
    torch.testing.assert_close(again(x).recons, sae(x).recons, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "cfg.json").read_text())["metadata"]["sae_lens_version"] >= "6"
    assert again.hook_name == "site"


def test_saelens_refuses_what_it_cannot_carry(w, tmp_path):
    """Unknown architectures, normalisations and our own cells are errors with a way out."""
    weights, _ = w
    for cfg, said in (
        ({"architecture": "temporal"}, "temporal"),
        ({"architecture": "standard", "normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"architecture": "gated"}, "b_gate"),
    ):
        with pytest.raises(FormatError, match=said):
            sh.load(lens_folder(tmp_path / "sae", weights, BASE, **cfg))
    with pytest.raises(FormatError, match=r"sae\.save"):
        saelens.save(sh.SAE(D_IN, D_SAE), tmp_path)
    bad = {**weights, "W_dec": weights["W_dec"][:5]}
    with pytest.raises(FormatError, match="do not fit"):
        sh.load(lens_folder(tmp_path / "sae", bad, BASE, architecture="standard"))


def test_sparsify(w, tmp_path):
    """The encoder subtracts b_dec; top-k of the rectified scores."""
    weights, x = w
    tensors = {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    save_file(tensors, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"k": K, "num_latents": D_SAE, "d_in": D_IN}))
    codes = topk((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    check(sh.load(tmp_path), x, codes, codes @ weights["W_dec"] + weights["b_dec"])
    assert sparsify.load(tmp_path, hook_name="here").hook_name == "here"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "kind", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder", "JumpReluAutoEncoder"]
)
def test_dictionary_learning(kind, named, w, tmp_path):
    """Every class, told by its config, or by tensors that one class alone has. Codes are those of their encode."""
    weights, x = w
    norm = weights["W_dec"].norm(dim=1)
    linear = (x - weights["b_dec"]) @ weights["W_enc"]
    pre = linear + weights["b_enc"]
    state = {"encoder.weight": weights["W_enc"].T, "decoder.weight": weights["W_dec"].T}
    if kind == "GatedAutoEncoder":
        state |= {"decoder_bias": weights["b_dec"], "r_mag": weights["r_mag"]}
        state |= {"gate_bias": weights["b_gate"], "mag_bias": weights["b_mag"]}
        codes = (linear + weights["b_gate"] > 0) * (weights["r_mag"].exp() * linear + weights["b_mag"]).relu()
    elif kind == "JumpReluAutoEncoder":
        state = {name: weights[name] for name in (*BASE, "threshold")}
        pre = x @ weights["W_enc"] + weights["b_enc"]
        codes = pre * (pre > weights["threshold"])
    else:
        state["encoder.bias"] = weights["b_enc"]
        state["bias" if kind == "AutoEncoder" else "b_dec"] = weights["b_dec"]
        codes = pre.relu()
        if kind != "AutoEncoder":
            state["k"] = torch.tensor(K)
            codes = topk(pre)
        if kind == "BatchTopKSAE":
            state["threshold"], codes = torch.tensor(0.7), pre * (pre > 0.7)
    torch.save(state, tmp_path / "ae.pt")
    if named:
        config = {"trainer": {"dict_class": kind, "lm_name": "gpt2", "k": K}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    elif "TopK" in kind:
        with pytest.raises(FormatError, match="dict_class"):
            sh.load(tmp_path)
        return
    seen = codes * norm if kind in ("GatedAutoEncoder", "JumpReluAutoEncoder") else codes
    check(sh.load(tmp_path), x, seen, codes @ weights["W_dec"] + weights["b_dec"])
    assert dictionary_learning.load(tmp_path).cfg.metadata.get("model_name") == ("gpt2" if named else None)


@pytest.mark.parametrize("upper", [True, False])
def test_gemma_scope(upper, w, tmp_path):
    """b_dec is not subtracted from the input; names in either case; pickled arrays stay shut."""
    weights, x = w
    tmp_path = tmp_path / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_9"
    tmp_path.mkdir(parents=True)
    arrays = {name: weights[name].numpy() for name in (*BASE, "threshold")}
    np.savez(tmp_path / "params.npz", **{name if upper else name.lower(): a for name, a in arrays.items()})
    pre = x @ weights["W_enc"] + weights["b_enc"]
    codes = pre * (pre > weights["threshold"])
    sae = sh.load(tmp_path)
    check(sae, x, codes, codes @ weights["W_dec"] + weights["b_dec"])
    assert sae.hook_name == "blocks.3.hook_resid_post"
    assert sae.cfg.metadata["model_name"] == "gemma-2-2b"
    assert gemma_scope.load(tmp_path / "params.npz", hook_name="here").hook_name == "here"
    np.savez(tmp_path / "params.npz", W_enc=np.array([object()], dtype=object))
    with pytest.raises(FormatError, match="readable"):
        sh.load(tmp_path)


def test_other_folders_save_as_ours(w, tmp_path):
    """Once read, an SAE of another library is one of ours."""
    weights, x = w
    sae = sh.load(lens_folder(tmp_path / "theirs", weights, (*BASE, "threshold"), architecture="jumprelu"))
    sae.save(tmp_path / "ours")
    assert torch.equal(sh.load(tmp_path / "ours")(x).recons, sae(x).recons)
