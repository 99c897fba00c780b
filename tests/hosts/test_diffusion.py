"""Diffusion models: every denoising step is a forward, the places of a latent picture are positions."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import saehooks as sh
from saehooks.errors import WhereError, WidthError

diffusers = pytest.importorskip("diffusers")

STEPS = 5


def unet():
    """A UNet that reads a text too, and its latent pictures."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    text = torch.randn(2, 3, 16)
    return model, lambda x, t: model(x, t, text).sample


def transformer():
    """A diffusion transformer over classes."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    model = diffusers.DiTTransformer2DModel(
        in_channels=4, out_channels=4, num_embeds_ada_norm=10, norm_num_groups=8, **sizes
    ).eval()
    classes = torch.tensor([1, 2])
    return model, lambda x, t: model(x, t.expand(2), classes).sample


def rows(output):
    """(batch, places, width) of a map or of a sequence."""
    return output.flatten(2).transpose(1, 2) if output.dim() == 4 else output


CASES = {
    "block of a transformer": (transformer, "transformer_blocks.0", 32),
    "attention of a transformer": (transformer, "transformer_blocks.1.attn1", 32),
    "transformer block of a UNet": (unet, "down_blocks.1.attentions.0.transformer_blocks.0", 64),
    "attention stage of a UNet": (unet, "down_blocks.1.attentions.0", 64),
    "residual block of a UNet": (unet, "down_blocks.0.resnets.0", 32),
    "middle of a UNet": (unet, "mid_block", 64),
    "convolution of a UNet": (unet, "conv_in", 32),
}


@torch.no_grad()
def sampled(call):
    """A picture after a few steps of Euler's method."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in torch.linspace(9, 1, STEPS).long():
        x = x - 0.3 * call(x, t)
    return x


@contextmanager
def changed(module, step, places, steps):
    """A plain hook that adds ``step`` at some places in some of the module's calls."""
    calls = []

    def hook(m, args, output):
        calls.append(None)
        first = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if len(calls) - 1 not in steps:
            return None
        flat = rows(first).clone()
        flat[:, places] += step
        new = flat.transpose(1, 2).reshape(first.shape) if first.dim() == 4 else flat
        return (new, *output[1:]) if isinstance(output, tuple) else type(output)(new) if output is not first else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", CASES)
def test_a_diffusion_model_is_edited_by_step_and_place(kind):
    """At chosen places in chosen steps a latent is added, as a plain hook adds its direction; elsewhere nothing is."""
    make, name, width = CASES[kind]
    model, call = make()
    sae = sh.SAE(width, 2 * width, "linear", "relu").eval()
    step = 6.0 * sae.directions(3)[0].detach()
    clean = sampled(call)
    with sh.read(model, sae, at=name, keep_all=True) as trace:
        assert torch.equal(sampled(call), clean)
    assert len(trace.forwards) == STEPS
    places = trace.forwards[0].codes.shape[1]
    assert places in (4, 16, 64)
    mask = torch.zeros(places, dtype=torch.bool)
    mask[[0, places - 2]] = True
    for where, at, steps in (
        (mask, mask, range(STEPS)),
        (sh.steps(range(2)), slice(None), (0, 1)),
        (sh.steps(slice(3, None)) & mask, mask, (3, 4)),
        (~sh.steps([0, 4]), slice(None), (1, 2, 3)),
        (sh.steps(2) | sh.positions([1]), None, None),
    ):
        with sh.steer(model, sae, {3: 6.0}, at=name, where=where):
            edited = sampled(call)
        if at is None:
            module = model.get_submodule(name)
            with changed(module, step, slice(None), (2,)), changed(module, step, [1], (0, 1, 3, 4)):
                right = sampled(call)
        else:
            with changed(model.get_submodule(name), step, at, steps):
                right = sampled(call)
        torch.testing.assert_close(edited, right, rtol=1e-4, atol=1e-4)
        assert not torch.equal(edited, clean)
    assert torch.equal(sampled(call), clean)


def test_the_width_of_a_block_is_that_of_its_forward():
    """Blocks of a UNet that do not say how wide they are are listed with a question mark, and checked when they run."""
    model, call = unet()
    assert {info.name: info.width for info in sh.sites(model)}["down_blocks.1"] is None
    refused = pytest.raises(WidthError, match=r"'down_blocks\.1'.* 48 are expected")
    with refused, sh.read(model, sh.SAE(48, 96), at="down_blocks.1"):
        sampled(call)


def test_a_pipeline_is_a_host_by_its_model():
    """Each step of a pipeline is one forward of its UNet; an edit in the last steps leaves the first ones alone."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()
    pipeline = diffusers.DDIMPipeline(unet=model, scheduler=diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def pictures():
        found = pipeline(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np")
        return torch.as_tensor(found.images)

    sae, clean = sh.SAE(32, 64, "linear", "relu").eval(), pictures()
    with sh.steer(model, sae, {3: 20.0}, at="mid_block", where=sh.steps(slice(2, None)), keep_all=True) as trace:
        edited = pictures()
    changed = [not torch.equal(one.codes.dense(), one.edited.dense()) for one in trace.forwards]
    assert changed == [False, False, True, True]
    assert not torch.equal(edited, clean)
    assert torch.equal(pictures(), clean)


def test_steps_that_never_came_are_an_error():
    """Asking for step 7 of 5 is no silent nothing; steps are counted from the first alone."""
    model, call = transformer()
    sae = sh.SAE(32, 64).eval()
    refused = pytest.raises(WhereError, match=r"step 7 at 'transformer_blocks\.0' never came: .* steps 0 to 4")
    with refused, sh.steer(model, sae, {3: 1.0}, at="transformer_blocks.0", where=sh.steps([0, 7])):
        sampled(call)
    for listed in (-1, [2, -1], slice(-2, None)):
        with pytest.raises(WhereError, match="steps are counted from 0"):
            sh.steps(listed)
