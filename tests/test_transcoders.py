"""Transcoders: read at one site, written at another, with all that an SAE's attachment promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import saehooks as sh
from saehooks.errors import ConfigError, NeverFiredError, SiteError, WidthError
from saehooks.sae import Transcoder


class Block(nn.Module):
    """A residual block whose MLP has another width inside."""

    def __init__(self):
        super().__init__()
        self.mlp_in, self.mlp = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))

    def forward(self, x):
        return x + self.mlp(self.mlp_in(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.out = nn.Embedding(11, 6), nn.ModuleList([Block(), Block()]), nn.Linear(6, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


READ, WRITTEN = "blocks.1.mlp_in", "blocks.1.mlp"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(params=["relu", "topk", "skip"])
def transcoder(request):
    torch.manual_seed(1)
    settings = {"k": 3} if request.param == "topk" else {"skip": True} if request.param == "skip" else {}
    kind = "relu" if request.param == "skip" else request.param
    made = Transcoder(6, 20, "linear", kind, d_out=6, hook_name=READ, hook_name_out=WRITTEN, **settings)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return made.eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(2))


def by_hand(transcoder, x, change=lambda a: a):
    """Codes and prediction from the formula."""
    d = transcoder.dictionary
    pre = (x @ d.W_enc + d.b_enc).relu()
    if transcoder.cfg.activation == "topk":
        top = pre.topk(3, -1)
        pre = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    codes = change(pre)
    skip = 0 if d.W_skip is None else x @ d.W_skip.T
    return pre, codes, codes @ d.W_dec + d.b_dec + skip


def hooked(model, write):
    """The model's output with a plain hook that knows what the MLP reads and changes what it puts out."""
    seen = {}
    handles = [
        model.blocks[1].mlp_in.register_forward_hook(lambda m, a, out: seen.update(x=out)),
        model.blocks[1].mlp.register_forward_hook(lambda m, a, out: write(seen["x"], out)),
    ]
    return handles


def test_read_changes_nothing_and_records_both_sides(model, transcoder, tokens):
    """Bit-identical outputs; codes of what is read; the reconstruction is compared with what is written."""
    plain, count = model(tokens), sum(len(m._forward_hooks) for m in model.modules())
    with sh.read(model, transcoder) as trace:
        assert torch.equal(model(tokens), plain)
    seen = {}
    for handle in hooked(model, lambda x, out: seen.update(x=x, out=out)):
        seen.setdefault("handles", []).append(handle)
    model(tokens)
    for handle in seen["handles"]:
        handle.remove()
    codes, _, recons = by_hand(transcoder, seen["x"])
    torch.testing.assert_close(trace.codes.dense(), codes)
    torch.testing.assert_close(trace.recons, recons)
    torch.testing.assert_close(trace.error, seen["out"] - recons)
    assert sum(len(m._forward_hooks) for m in model.modules()) == count


def test_splice_writes_the_prediction(model, transcoder, tokens):
    """As a plain hook does, everywhere or at some positions."""
    for where, mask in ((sh.positions(slice(0, None)), slice(0, None)), ([2, 3], [2, 3])):

        def write(x, out, mask=mask):
            new = out.clone()
            new[:, mask] = by_hand(transcoder, x)[2][:, mask]
            return new

        handles = hooked(model, write)
        right = model(tokens)
        for handle in handles:
            handle.remove()
        with sh.splice(model, transcoder, where=where):
            got = model(tokens)
        torch.testing.assert_close(got, right)


def test_an_edit_is_added_to_what_the_model_put_there(model, transcoder, tokens):
    """The error is kept as a delta: edits composed in order, exact where nothing changed."""
    latent = 4

    def change(codes):
        new = codes.clone()
        new[..., latent] = 1.5
        return new * 2

    def write(x, out):
        before, after, _ = by_hand(transcoder, x, change)
        return out + (after - before) @ transcoder.dictionary.W_dec

    handles = hooked(model, write)
    right = model(tokens)
    for handle in handles:
        handle.remove()
    edits = [sh.edits.clamp({latent: 1.5}), lambda codes: codes.with_values(codes.values * 2)]
    with sh.attach(model, transcoder, edits=edits, where=sh.positions(slice(0, None))) as trace:
        got = model(tokens)
    torch.testing.assert_close(got, right)
    with sh.ablate(model, transcoder, [19], where=[0]):
        untouched = model(tokens)
    with sh.attach(model, transcoder, edits=lambda codes: codes):
        assert torch.equal(model(tokens), model(tokens))
    assert trace.edited.of(latent).min() == 3.0
    assert untouched.shape == got.shape


def test_gradients_reach_latents_and_inputs(model, transcoder, tokens):
    """grads=True keeps the gradient at each latent, as autograd has it by hand."""
    with sh.read(model, transcoder, grads=True, where=sh.positions(slice(0, None))) as trace:
        model(tokens)[:, -1, 3].sum().backward()
    got = trace.grads.dense()
    kept = {}

    def write(x, out):
        pre, codes, _ = by_hand(transcoder, x.detach())
        kept["codes"] = codes.detach().requires_grad_()
        return out + (kept["codes"] - pre.detach()) @ transcoder.dictionary.W_dec.detach()

    handles = hooked(model, write)
    model(tokens)[:, -1, 3].sum().backward()
    for handle in handles:
        handle.remove()
    selected = trace.codes.dense() != 0
    torch.testing.assert_close(got[selected], kept["codes"].grad[selected])


def test_sites_are_checked_on_entering(model, transcoder, tokens):
    """No second site, a wrong order, a width that does not fit, a site that never fires: each says so."""
    nameless = Transcoder(6, 20, d_out=6, hook_name=READ)
    with pytest.raises(SiteError, match=r"at=\(read, written\)"), sh.read(model, nameless):
        pass
    wide = Transcoder(6, 20, d_out=7, hook_name=READ, hook_name_out=WRITTEN)
    with pytest.raises(WidthError, match="d_out=7"), sh.read(model, wide):
        model(tokens)
    with pytest.raises(ConfigError, match="before"), sh.read(model, transcoder, at=(WRITTEN, "blocks.0.mlp")):
        model(tokens)
    with pytest.raises(NeverFiredError), sh.read(model, transcoder):
        pass
    with pytest.raises(ConfigError, match="a transcoder two"), sh.read(model, sh.SAE(6, 20), at=(READ, WRITTEN)):
        pass
    with sh.read(model, nameless, at=(READ, WRITTEN)) as trace:
        model(tokens)
    assert trace.codes.shape == (2, 7)


def test_several_between_their_own_sites(model, transcoder, tokens):
    """Transcoders and SAEs side by side in one block."""
    other = sh.SAE(6, 20, "linear", "relu", hook_name="blocks.0").eval()
    with sh.attach(model, [transcoder, other]) as traces:
        model(tokens)
    assert set(traces) == {READ, "blocks.0"}
    with pytest.raises(SiteError, match="same place"), sh.attach(model, {READ: transcoder, WRITTEN: sh.SAE(6, 20)}):
        pass


def test_an_sae_takes_no_settings_of_a_transcoder():
    """d_out= and skip= belong to a Transcoder."""
    with pytest.raises(ConfigError, match="Transcoder"):
        sh.SAE(6, 20, "linear", "relu", d_out=6)
    with pytest.raises(ConfigError, match="d_out"):
        Transcoder(6, 20, d_out=0)


def test_measure_compares_with_the_prediction_in_its_place(model, transcoder, tokens):
    """Cross-entropy clean, with the prediction and with zeros where it writes; NMSE of what it predicts."""

    def ce(write):
        handles = hooked(model, write)
        logits = model(tokens)
        for handle in handles:
            handle.remove()
        return float(nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1)))

    kept = {}

    def spliced(x, out):
        kept["out"], kept["recons"] = out, by_hand(transcoder, x)[2]
        return kept["recons"]

    with torch.no_grad():
        right = {
            "ce_clean": ce(lambda x, out: None),
            "ce_spliced": ce(spliced),
            "ce_zero": ce(lambda x, out: torch.zeros_like(out)),
        }
        with sh.measure(model, transcoder, where=sh.positions(slice(0, None)), live=False) as live:
            model(tokens)
    found = live.summary()
    for name, value in right.items():
        assert found[name] == pytest.approx(value, rel=1e-5)
    error = (kept["out"] - kept["recons"]).square().sum()
    assert found["nmse"] == pytest.approx(float(error / kept["out"].square().sum()), rel=1e-4)


def test_latents_are_ranked_by_exact_ablation(model, transcoder, tokens):
    """The effect of a latent is what a plain hook that takes it away does."""

    def metric(logits):
        return logits[:, -1, 3]

    ranking = sh.rank_latents(model, transcoder, tokens, metric, where=sh.positions(slice(0, None)), exact=3)
    latent = int(ranking.latents[0])

    def without(codes):
        codes = codes.clone()
        codes[..., latent] = 0
        return codes

    def write(x, out):
        before, after, _ = by_hand(transcoder, x, without)
        return out + (after - before) @ transcoder.dictionary.W_dec

    with torch.no_grad():
        clean = metric(model(tokens)).mean()
        handles = hooked(model, write)
        ablated = metric(model(tokens)).mean()
        for handle in handles:
            handle.remove()
    assert float(ranking.exact[0]) == pytest.approx(float(ablated - clean), abs=1e-5)
