"""TransformerLens models that are not like the others: Granite, and HookedRootModules of the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saehooks.attachments import ablate, attach, read, splice, steer
from saehooks.edits import keep
from saehooks.hosts import host, sites
from saehooks.sae import SAE

TOKENS = torch.tensor([[0, 5, 6, 7, 8, 9]])


@pytest.fixture
def granite(tiny_tokenizer, tiny_decoder):
    """A bridge over a Granite, whose blocks multiply what they add to the residual stream by 0.25."""
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.GraniteConfig(**tiny_decoder, residual_multiplier=0.25)
    hf = transformers.GraniteForCausalLM(config).eval()
    hf.config.architectures = ["GraniteForCausalLM"]
    return bridges.TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=tiny_tokenizer).eval()


@pytest.mark.parametrize(("site", "part"), [("hook_attn_out", "self_attn"), ("hook_mlp_out", "mlp")])
def test_the_scaled_contributions_of_granite(granite, site, part):
    """They fire, carry what is added to the stream, and what is written there is added in its place."""
    name, hf = f"blocks.1.{site}", granite.original_model
    sae = SAE(32, 64, "linear", "relu", hook_name=name).eval()
    added = []
    module = hf.model.layers[1].get_submodule(part)
    handle = module.register_forward_hook(lambda m, a, out: added.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        clean = granite(TOKENS)
        with read(granite, sae) as trace:
            assert torch.equal(granite(TOKENS), clean)
        torch.testing.assert_close(trace.acts, 0.25 * added[-1])
        handle.remove()
        latent = int(trace.codes.dense().sum((0, 1)).argmax())
        step = (trace.codes.of(latent)[..., None] * sae.directions(latent)).detach()

        def by_hand(m, a, out):
            first = out[0] if isinstance(out, tuple) else out
            new = first - step / 0.25
            return (new, *out[1:]) if isinstance(out, tuple) else new

        with ablate(granite, sae, latent):
            edited = granite(TOKENS)
            granite.reset_hooks()
            assert torch.equal(granite(TOKENS), edited)
        handle = module.register_forward_hook(by_hand)
        torch.testing.assert_close(edited, granite(TOKENS), rtol=1e-4, atol=1e-4)
        handle.remove()
        assert not torch.equal(edited, clean)
        assert torch.equal(granite(TOKENS), clean)
    point = granite.hook_dict[name]
    assert "has_hooks" not in vars(point)
    assert not point.has_hooks()


def test_every_listed_site_of_granite_fires(granite):
    """A site that is listed and not switched off by a flag is passed in a forward."""
    on = [info.name for info in sites(granite) if not info.note.startswith("off")]
    saes = {info.name: SAE(info.width, 8) for info in sites(granite) if info.name in on}
    with torch.no_grad(), attach(granite, saes) as traces:
        granite(TOKENS)
    assert all(trace.calls == 1 for trace in traces.values())


@pytest.fixture
def custom():
    """A HookedRootModule without a cfg, which reads vectors, not tokens."""
    lens = pytest.importorskip("transformer_lens")
    points = pytest.importorskip("transformer_lens.hook_points")
    base = lens.HookedRootModule if hasattr(lens, "HookedRootModule") else points.HookedRootModule

    class Custom(base):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
            self.hook_hidden, self.hook_mlp_in = points.HookPoint(), points.HookPoint()
            self.setup()

        def forward(self, x):
            return self.last(self.hook_mlp_in(torch.tanh(self.hook_hidden(self.first(x)))))

    torch.manual_seed(0)
    return Custom()


def test_a_hooked_root_module_without_cfg(custom):
    """Its hook points are sites of any width that fits, whatever they are called."""
    sae, x = SAE(8, 16, "linear", "relu").eval(), torch.randn(2, 5, 4)
    assert {"hook_hidden", "hook_mlp_in"} <= set(sites(custom).names)
    assert host(custom).describe()["model_name"] == "Custom"
    with torch.no_grad():
        clean = custom(x)
        with read(custom, sae, at="hook_hidden") as trace:
            assert torch.equal(custom(x), clean)
        assert torch.equal(trace.acts, custom.first(x))
        with steer(custom, sae, {3: 2.0}, at="hook_mlp_in", where=torch.tensor([True, False, True, False, False])):
            edited = custom(x)
        right = torch.tanh(custom.first(x))
        right[:, [0, 2]] += 2.0 * sae.directions(3)
        torch.testing.assert_close(edited, custom.last(right))
        with splice(custom, sae, keep([]), at="hook_hidden"):
            assert not torch.equal(custom(x), clean)
        assert torch.equal(custom(x), clean)
