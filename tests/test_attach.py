"""What the verbs do, by hand on a model whose every step is known."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from saehooks import edits
from saehooks.attachments import ablate, attach, clamp, read, scale, splice, steer
from saehooks.codes import Codes
from saehooks.errors import ConfigError, NeverFiredError, SiteError, WidthError
from saehooks.sae import SAE
from saehooks.where import last

TOKENS = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 3]])
SITE = "blocks.1.hook_resid_post"


class Tiny(nn.Module):
    """Two linear layers with nothing between: what leaves ``site`` is seen by ``after``."""

    def __init__(self, width: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.site = nn.Linear(width, width)
        self.after = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.site(x))


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(params=["concepts", "linear"])
def sae(request) -> SAE:
    torch.manual_seed(1)
    settings = {"concepts": ("concepts", "sparsemax", {}), "linear": ("linear", "topk", {"k": 4})}[request.param]
    sae = SAE(8, 24, settings[0], settings[1], hook_name="site", **settings[2])
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # no bias is 0, no matrix is the identity
    return sae


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------- what verbs do


def selected(sae: SAE, acts: torch.Tensor) -> int:
    return int(sae.encode(acts).indices.mode().values)


VERBS = {
    "ablate": (lambda m, s, j, **o: ablate(m, s, j, **o), lambda a: a * 0),
    "clamp": (lambda m, s, j, **o: clamp(m, s, {j: 3.0}, **o), lambda a: a * 0 + 3),
    "scale": (lambda m, s, j, **o: scale(m, s, {j: -2.0}, **o), lambda a: a * -2),
    "steer": (lambda m, s, j, **o: steer(m, s, {j: 3.0}, **o), lambda a: a + 3),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_verbs_by_the_formula(tiny, sae, verb, error):
    """Kept error: ``x + scale * (a' - a) @ W``; dropped: the reconstruction by a'."""
    block, new_value = VERBS[verb]
    acts = tiny.site(X)
    latent = selected(sae, acts)
    a = sae.encode(acts)
    edited = a.dense().clone()
    edited[..., latent] = new_value(edited[..., latent])
    weights = a.scale if a.scale is not None else torch.ones(a.sizes.numel())
    directions = sae.directions(list(range(24)))
    change = weights.reshape(2, 5, 1) * ((edited - a.dense()) @ directions)
    expected = change + (acts if error == "keep" else sae.decode(a))
    with block(tiny, sae, latent, error=error) as trace:
        assert torch.allclose(tiny(X), expected, atol=1e-5)
    assert torch.allclose(trace.edited.dense(), edited, atol=1e-6)
    assert torch.equal(trace.codes.dense(), a.dense())


def test_splice_carries_the_reconstruction(tiny, sae):
    """``splice`` drops the error; ``error="keep"`` makes it the identity, to the last bit."""
    clean = tiny(X)
    with splice(tiny, sae):
        spliced = tiny(X)
    assert torch.equal(spliced, sae(clean).recons)
    with splice(tiny, sae, error="keep"):
        assert torch.equal(tiny(X), clean)


def test_splice_with_edits_and_where(tiny, sae):
    """An edited splice changes the chosen positions only."""
    clean = tiny(X)
    with splice(tiny, sae, edits.zero(range(24)), where=[0, 1]):
        out = tiny(X)
    assert torch.equal(out[:, 2:], clean[:, 2:])
    bare = sae.decode(Codes.from_dense(torch.zeros(2, 5, 24), scale=sae.encode(clean).scale))
    assert torch.allclose(out[:, :2], bare[:, :2], atol=1e-6)


def test_where_leaves_other_positions_alone(tiny, sae):
    """Positions where the mask is false are bit-identical in the output and unedited in the trace."""
    clean = tiny(X)
    for error in ("keep", "drop"):
        with clamp(tiny, sae, {3: 9.0}, where=last, error=error) as trace:
            out = tiny(X)
        assert torch.equal(out[:, :-1], clean[:, :-1])
        assert not torch.equal(out[:, -1], clean[:, -1])
        assert torch.equal(trace.edited.dense()[:, :-1], trace.codes.dense()[:, :-1])
        assert trace.edited.of(3)[:, -1].tolist() == [9.0, 9.0]
        assert trace.mask.tolist() == [[False] * 4 + [True]] * 2


def test_clamp_with_a_value_for_each_position(tiny, sae):
    """Activations of one run can be put into another."""
    with read(tiny, sae) as trace:
        tiny(X)
    taken = trace.codes.of(3).flip(0)
    with clamp(tiny, sae, {3: taken}) as trace:
        tiny(X)
    assert torch.equal(trace.edited.of(3), taken)


def test_edits_compose_in_order_and_may_be_the_users_own(tiny, sae):
    """A list of edits runs in order; a custom one may take the context."""
    seen = []

    def mine(codes, context):
        seen.append((context.site, context.positions.tolist(), context.tokens))
        return codes.with_values(codes.values * 2)

    with attach(tiny, sae, edits=[edits.clamp({3: 2.0}), mine, edits.add({3: 0.5})]) as trace:
        tiny(X)
    assert torch.equal(trace.edited.of(3), torch.full((2, 5), 4.5))
    assert seen == [("site", [0, 1, 2, 3, 4], None)]


@pytest.mark.parametrize("sae", ["concepts"], indirect=True)
def test_an_edit_may_change_the_scale(tiny, sae):
    """A custom edit that changes the rows' scale moves the activation by the difference of reconstructions."""
    acts, codes = tiny.site(X), sae.encode(tiny.site(X))

    def double(codes):
        return Codes(codes.indices, codes.values, codes.offsets, codes.shape, codes.d_sae, codes.scale * 2)

    with attach(tiny, sae, edits=double, where=[1]):
        out = tiny(X)
    expected = acts[:, 1] + sae.decode_delta(codes)[:, 1]
    assert torch.allclose(out[:, 1], expected, atol=1e-5)
    assert torch.equal(out[:, 2:], acts[:, 2:])


# ------------------------------------------------------------------ several at once


def test_nested_blocks_see_each_other(tiny, sae):
    """An inner block at the same site sees what the outer one wrote."""
    with steer(tiny, sae, {3: 5.0}), read(tiny, sae) as inner:
        out = tiny(X)
    assert torch.equal(inner.acts, out)
    assert not torch.equal(inner.acts, tiny.site(X))
    with read(tiny, sae) as outer, steer(tiny, sae, {3: 5.0}):
        tiny(X)
    assert torch.equal(outer.acts, tiny.site(X))


def test_several_sites_with_their_own_edits_and_positions(tiny_bridge):
    """A mapping of SAEs gives a mapping of traces; edits and where may be mappings too."""
    saes = {f"blocks.{i}.hook_resid_post": SAE(d_in=32, d_sae=64) for i in (0, 2)}
    first, second = saes
    clean = tiny_bridge(TOKENS)
    with attach(tiny_bridge, saes, edits={second: edits.add({3: 5.0})}, where={second: last}) as traces:
        out = tiny_bridge(TOKENS)
    assert list(traces) == [first, second]
    assert traces[first].edited is not None
    assert torch.equal(traces[first].edited.values, traces[first].codes.values)
    assert (traces[second].edited.of(3) - traces[second].codes.of(3))[:, -1].tolist() == pytest.approx([5.0, 5.0])
    assert torch.equal(out[:, :-1], clean[:, :-1])
    assert not torch.equal(out[:, -1], clean[:, -1])


def test_an_upstream_edit_reaches_a_downstream_trace(tiny_bridge):
    """With two SAEs, the later one reads what the earlier one changed."""
    saes = {f"blocks.{i}.hook_resid_post": SAE(d_in=32, d_sae=64) for i in (0, 2)}
    first, second = saes
    with attach(tiny_bridge, saes) as clean:
        tiny_bridge(TOKENS)
    with attach(tiny_bridge, saes, edits={first: edits.add({3: 50.0})}) as edited:
        tiny_bridge(TOKENS)
    assert torch.equal(clean[first].acts, edited[first].acts)
    assert not torch.equal(clean[second].acts, edited[second].acts)


def test_a_list_of_saes_that_know_their_sites(tiny_bridge):
    """Their own hook_names place them, and traces are found by alias or by the site's name."""
    saes = [SAE(d_in=32, d_sae=64, hook_name=name) for name in ("blocks.0.hook_out", "blocks.2.hook_resid_post")]
    with attach(tiny_bridge, saes) as traces:
        tiny_bridge(TOKENS)
    assert len(traces) == 2
    assert traces["blocks.0.hook_out"] is traces["blocks.0.hook_resid_post"]
    with pytest.raises(KeyError, match=r"this block has 'blocks\.0\.hook_out'"):
        traces["blocks.1.hook_out"]


def test_two_heads_of_one_hook_point(tiny_bridge):
    """``(site, head)`` places one SAE on each head; the other heads are untouched."""
    z = "blocks.1.attn.hook_z"
    saes = {(z, head): SAE(d_in=8, d_sae=24) for head in (0, 2)}
    joined = SAE(d_in=32, d_sae=64)
    with read(tiny_bridge, joined, at=z) as before:
        tiny_bridge(TOKENS)
    with attach(tiny_bridge, saes, error="drop"), read(tiny_bridge, joined, at=z) as after:
        tiny_bridge(TOKENS)
    same = (before.acts == after.acts).all(0).all(0).reshape(4, 8).all(1)
    assert same.tolist() == [False, True, False, True]


def test_an_sae_of_one_head_remembers_it(tiny_bridge):
    """The head in its metadata is used with its own hook_name."""
    sae = SAE(d_in=8, d_sae=24, hook_name="blocks.1.attn.hook_z")
    sae.cfg.metadata["head"] = 3
    with read(tiny_bridge, sae) as trace:
        tiny_bridge(TOKENS)
    assert trace.acts.shape == (2, 4, 8)


# ------------------------------------------------------------------------- gradients


def test_latent_gradients_by_hand(tiny, sae):
    """For a linear metric the gradient at a latent is ``scale * direction . metric``, and accumulates over calls."""
    metric = torch.randn(8, generator=torch.Generator().manual_seed(2))
    with read(tiny, sae, grads=True) as trace:
        (tiny(X) @ metric).sum().backward()
    weights = 1.0 if trace.codes.scale is None else trace.codes.scale.detach()[trace.codes.rows]
    expected = weights * (sae.directions(list(range(24))) @ metric)[trace.codes.indices]
    assert torch.allclose(trace.grads.values, expected.detach(), atol=1e-5)
    assert torch.equal(trace.grads.indices, trace.codes.indices)


def test_gradients_at_edited_and_dropped_values(tiny, sae):
    """The gradient at an ablated latent is there too, though its value is 0; under ``drop`` as well."""
    metric = torch.randn(8, generator=torch.Generator().manual_seed(2))
    latent = selected(sae, tiny.site(X))
    for error in ("keep", "drop"):
        with ablate(tiny, sae, latent, grads=True, error=error) as trace:
            (tiny(X) @ metric).sum().backward()
        slope = sae.directions(latent).detach() @ metric
        found = trace.grads.of(latent)[trace.edited.dense()[..., latent] == 0]
        assert trace.edited.of(latent).abs().sum() == 0
        assert bool((found.sign() == slope.sign()).any())


def test_codes_of_a_read_with_gradients_reach_the_inputs(tiny, sae):
    """Under ``grads=True`` a latent's activation can itself be differentiated to the model's input."""
    x = X.clone().requires_grad_()
    with read(tiny, sae, grads=True) as trace:
        tiny(x)
    trace.codes.of(selected(sae, tiny.site(X))).sum().backward()
    assert x.grad.abs().sum() > 0


def test_gradients_reach_a_learned_steering_value(tiny, sae):
    """An edit's own value can be trained."""
    value = torch.tensor(1.0, requires_grad=True)
    with steer(tiny, sae, {3: value}):
        tiny(X).sum().backward()
    assert value.grad is not None
    assert value.grad != 0


def test_grads_under_no_grad_change_nothing(tiny, sae):
    """Where no gradient can flow, asking for it costs nothing and says so when it is read."""
    clean = tiny(X)
    with torch.no_grad(), read(tiny, sae, grads=True) as trace:
        assert torch.equal(tiny(X), clean)
    with pytest.raises(ConfigError, match=r"not under torch\.no_grad"):
        _ = trace.grads


def test_inference_mode_works(tiny, sae):
    """Under ``torch.inference_mode`` reading and editing work as under no_grad."""
    with torch.no_grad(), steer(tiny, sae, {3: 2.0}):
        expected = tiny(X)
    with torch.inference_mode(), steer(tiny, sae, {3: 2.0}) as trace:
        assert torch.equal(tiny(X), expected)
    assert trace.nmse > 0


# ------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_an_sae_in_another_dtype(tiny, sae, dtype):
    """The codes are in the SAE's dtype, the outputs in the model's, and untouched rows keep every bit."""
    clean = tiny(X)
    for block in (splice(tiny, sae.to(dtype), where=last), clamp(tiny, sae, {3: 2.0}, where=last, grads=True)):
        with block as trace:
            out = tiny(X)
        assert trace.codes.values.dtype == trace.recons.dtype == dtype
        assert out.dtype == torch.float32
        assert torch.equal(out[:, :-1], clean[:, :-1])
        assert not torch.equal(out[:, -1], clean[:, -1])


def test_autocast_does_not_reach_into_the_sae(tiny, sae):
    """Under autocast the model may compute in bf16; the SAE selects and decodes in its own dtype."""
    tiny.site = nn.Identity()
    with read(tiny, sae) as exact:
        tiny(X)
    with torch.autocast("cpu", torch.bfloat16):
        with read(tiny, sae) as cast:
            tiny(X)
        with splice(tiny, sae):
            spliced = tiny(X)
    assert torch.equal(cast.codes.values, exact.codes.values)
    assert torch.equal(spliced, exact.recons)


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_stay_theirs(tiny, sae, bad):
    """NaN or infinity in one position stays in that position; all others are as without it."""
    x = X.clone()
    x[0, 2] = bad
    tiny.site = nn.Identity()
    others = torch.ones(2, 5, dtype=torch.bool)
    others[0, 2] = False
    for block in (splice(tiny, sae), steer(tiny, sae, {3: 2.0}), ablate(tiny, sae, range(24))):
        with block as trace:
            out = tiny(x)
        assert torch.isfinite(out[others]).all()
        assert not torch.isfinite(out[0, 2]).any()
        assert trace.codes.shape == (2, 5)
    with read(tiny, sae):
        assert torch.equal(tiny(x)[others], x[others])


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)], ids=str)
def test_empty_batches_pass_through(tiny, sae, shape):
    """No rows in, no rows out, for every verb."""
    for block in (read(tiny, sae), splice(tiny, sae), steer(tiny, sae, {3: 2.0}, where=last), ablate(tiny, sae, 3)):
        with block as trace:
            assert tiny(torch.zeros(shape)).shape == shape
        assert trace.support_size.shape == shape[:2]
        assert "batch" in repr(trace)
        assert trace._repr_html_()


def test_zero_activations_pass(tiny, sae):
    """An activation of norm 0 gives finite codes and outputs."""
    tiny.site = nn.Identity()
    for block in (splice(tiny, sae), steer(tiny, sae, {3: 2.0})):
        with block:
            assert torch.isfinite(tiny(torch.zeros(1, 3, 8))).all()


def test_an_sae_without_a_site_asks_for_one(tiny):
    """The error says to pass at=."""
    with pytest.raises(SiteError, match="pass at="):
        read(tiny, SAE(d_in=8, d_sae=16)).__enter__()


def test_a_width_that_only_a_forward_can_tell(sae):
    """Where the site's width is not known beforehand the first forward complains."""
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with pytest.raises(WidthError, match="d_in=8, but '0' is 5 wide"), read(model, sae, at="0"):
        model(torch.zeros(1, 2, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda s: ("folder", {}), "got str: sh.load"),
        (lambda s: ({"site": "folder"}, {}), "got str: sh.load"),
        (lambda s: (s, {"error": "kept"}), "'keep' or 'drop'"),
        (lambda s: (s, {"edits": [3]}), r"edits.zero\(\[3\]\)"),
        (lambda s: (s, {"edits": 3}), r"edits.zero\(\[3\]\)"),
        (lambda s: (s, {"edits": {3: 1.0}}), r"mapping by site.*edits.clamp"),
        (lambda s: ({"site": s}, {"at": "site"}), "place one SAE"),
        (lambda s: ({"site": s}, {"edits": {"other": edits.zero(1)}}), "edits names 'other'"),
        (lambda s: ({"site": s}, {"where": {"other": last}}), "where names 'other'"),
    ],
)
def test_arguments_that_cannot_work(tiny, sae, arguments, message):
    """Wrong kinds of argument are named on entering."""
    saes, options = arguments(sae)
    with pytest.raises(ConfigError, match=message):
        attach(tiny, saes, **options).__enter__()


@pytest.mark.bridge_cache  # what such a pair warns of comes on top
def test_another_model_or_processing_is_warned_about(tiny_bridge):
    """An SAE that remembers another model, or other weight processing, warns at the user's own line."""
    sae = SAE(d_in=32, d_sae=64, hook_name=SITE)
    now = tiny_bridge.cfg.model_name
    sae.cfg.metadata |= {"model_name": "org/other", "processing": {"folded": True, "unknown here": 1}}
    with pytest.warns(UserWarning, match="this SAE was trained on") as caught, read(tiny_bridge, sae):
        tiny_bridge(TOKENS)
    texts = [str(one.message) for one in caught]
    assert any("trained on 'org/other'" in text and repr(now) in text for text in texts)
    assert any("processed differently" in text and "folded=True there, False here" in text for text in texts)
    assert {one.filename for one in caught} == {__file__}


def test_the_same_model_is_not_warned_about(tiny_bridge):
    """Another organisation's copy of the same model is the same model."""
    sae = SAE(d_in=32, d_sae=64, hook_name=SITE)
    sae.cfg.metadata |= {
        "model_name": f"org/{tiny_bridge.cfg.model_name}",
        "processing": {"folded": False, "centered": None},
    }
    with warnings.catch_warnings(), read(tiny_bridge, sae):
        warnings.simplefilter("error")
        tiny_bridge(TOKENS)


def test_trace_before_the_first_forward(tiny, sae):
    """Reading the trace too early says to call the model."""
    with pytest.raises(NeverFiredError, match="call the model inside the block"), read(tiny, sae) as trace:
        _ = trace.codes


# ------------------------------------------------------------------- real use in models


@pytest.mark.bridge_cache
def test_text_is_generated_with_a_clamp(tiny_hf_bridge, tiny_tokenizer):
    """``generate`` on a string, clamped at the last position and after, changes what comes."""
    sae = SAE(d_in=32, d_sae=64, hook_name="blocks.1.hook_resid_post")
    clean = tiny_hf_bridge.generate("w3 w4 w5", max_new_tokens=6, do_sample=False, verbose=False)
    with clamp(tiny_hf_bridge, sae, {9: 8.0}, where=last, keep_all=True) as trace:
        edited = tiny_hf_bridge.generate("w3 w4 w5", max_new_tokens=6, do_sample=False, verbose=False)
    assert clean != edited
    prompt, *steps = trace.forwards
    assert prompt.mask.int().tolist()[0][-1] == 1
    assert prompt.mask.sum() == 1
    assert all(step.mask.all() for step in steps)
    assert [step.start for step in trace.forwards] == [
        0,
        *range(prompt.codes.shape[1], prompt.codes.shape[1] + len(steps)),
    ]


def test_cls_is_position_zero(tiny_clip):
    """In a vision tower, editing the patches of the last block changes nothing that CLIP reads; editing CLS does."""
    images = torch.randn(2, 3, 16, 16)
    sae = SAE(d_in=32, d_sae=64, hook_name="visual.blocks.2.hook_resid_post")
    clean = tiny_clip.encode_image(images)
    with splice(tiny_clip, sae, where=slice(1, None)) as trace:
        assert torch.allclose(tiny_clip.encode_image(images), clean, atol=1e-6)
    assert trace.codes.shape == (2, 17)
    with splice(tiny_clip, sae, where=0):
        assert not torch.allclose(tiny_clip.encode_image(images), clean, atol=1e-3)


def test_both_towers_in_one_call(tiny_clip):
    """SAEs in both towers act in one call of the model."""
    saes = [
        SAE(d_in=32, d_sae=64, hook_name="visual.blocks.1.hook_resid_post"),
        SAE(d_in=24, d_sae=64, hook_name="text.blocks.1.hook_resid_post"),
    ]
    text = torch.randint(1, 60, (2, 8))
    with attach(tiny_clip, saes, where=slice(1, None), error="drop") as traces:
        tiny_clip(torch.randn(2, 3, 16, 16), text)
    assert traces["visual.blocks.1.hook_resid_post"].tokens is None
    assert torch.equal(traces["text.blocks.1.hook_resid_post"].tokens, text)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("hook_name", "at"), ("layer", "at"), ("positions", "where"), ("wher", "where"), ("keep_al", "keep_all")],
)
def test_a_misspelt_keyword_is_answered_with_the_right_one(tiny, sae, wrong, right):
    """Names of other tools, and slips, raise an error that says what to write."""
    with (
        pytest.raises(TypeError, match=f"no keyword {wrong}=; did you mean {right}=") as caught,
        read(tiny, sae, **{wrong: 1}),
    ):
        tiny(X)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.bridge_cache
def test_a_write_that_misses_the_stream_of_a_bridge_is_said(tiny_hf_bridge):
    """A splice at hook_resid_mid warns when it is entered; reading there does not."""
    sae, tokens = SAE(32, 64), torch.tensor([[0, 5, 6]])
    block, said = splice(tiny_hf_bridge, sae, at="blocks.1.hook_resid_mid"), "reaches the MLP.*'blocks.1.hook_attn_out'"
    with pytest.warns(UserWarning, match=said), block:
        tiny_hf_bridge(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with read(tiny_hf_bridge, sae, at="blocks.1.hook_resid_mid") as trace:
            tiny_hf_bridge(tokens)
    assert "where=sh.everywhere)" in repr(trace)


def test_a_trace_shows_where_it_acted(tiny, sae):
    """The repr names the rule, written or left out, and L0 is of the positions where it holds."""
    with read(tiny, sae, where=last) as trace:
        tiny(X)
    assert "where=sh.last)" in repr(trace)
    assert f"l0={trace.support_size[:, -1].double().mean():.1f}," in repr(trace)
    sae.cfg.metadata["training"] = {"positions": "all but the first"}
    with ablate(tiny, sae, [3]) as trace:
        tiny(X)
    assert "where=all but the first)" in repr(trace)
    assert trace.mask.tolist() == [[False, True, True, True, True]] * 2
