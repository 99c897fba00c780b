"""Sites of open_clip: both towers, both memory layouts, timm towers, attention tuples."""

from __future__ import annotations

import copy

import pytest
import torch

from saehooks.errors import SiteError
from saehooks.hosts import host, sites

open_clip = pytest.importorskip("open_clip")

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
VISION = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 16}
WORDS = {"context_length": 8, "vocab_size": 64, "width": 24, "heads": 3, "layers": 2}


def custom(**vision):
    return open_clip.CustomTextCLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**WORDS))


def pos_first(model):
    """The same weights in the (token, batch, width) layout of older releases and of OpenAI's CLIP."""
    model = copy.deepcopy(model)
    for transformer in (model.visual.transformer, model.transformer):
        transformer.batch_first = False
        for block in transformer.resblocks:
            block.attn.batch_first = False
    return model


@pytest.fixture(params=["clip", "pos_first", "custom", "layer_scale", "timm"])
def clip(request, tiny_clip):
    torch.manual_seed(0)
    if request.param == "timm":
        pytest.importorskip("timm")
        tower = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": "linear"}
        return custom(**tower).eval()
    makers = {
        "clip": lambda: tiny_clip,
        "pos_first": lambda: pos_first(tiny_clip),
        "custom": lambda: custom(**VISION),
        "layer_scale": lambda: custom(**VISION, ls_init_value=0.1),
    }
    return makers[request.param]().eval()


def images_for(model):
    size = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    return IMAGES if size == 16 else torch.nn.functional.interpolate(IMAGES, size)


@torch.no_grad()
def embed(model, tower):
    return model.encode_image(images_for(model)) if tower == "visual" else model.encode_text(TEXT)


def test_every_listed_site_fires_once_with_its_width(clip):
    """Each site fires once in its own tower, as (batch, token, width), and reading leaves the embeddings alone."""
    before = {tower: embed(clip, tower) for tower in ("visual", "text")}
    fired = {info.name: [] for info in sites(clip)}
    for name in fired:
        host(clip).site(name).hook(lambda acts, name=name: fired[name].append(tuple(acts.shape)))
    for tower, embedding in before.items():
        assert torch.equal(embed(clip, tower), embedding)
    for info in sites(clip):
        (shape,) = fired[info.name]
        assert (shape[0], shape[2]) == (2, info.width)
    assert len(fired) > 20


def test_every_listed_site_can_be_written(clip):
    """What is written at a site changes the embedding of its tower; writing a copy changes nothing."""
    before = {tower: embed(clip, tower) for tower in ("visual", "text")}
    noise = torch.Generator().manual_seed(1)
    for info in sites(clip):
        site = host(clip).site(info.name)
        tower = host(clip).tower(site)
        handle = site.hook(lambda acts: acts.clone())
        assert torch.equal(embed(clip, tower), before[tower]), info.name
        handle.remove()
        handle = site.hook(lambda acts: acts + torch.randn(acts.shape, generator=noise))
        assert not torch.equal(embed(clip, tower), before[tower]), info.name
        handle.remove()
        assert torch.equal(embed(clip, tower), before[tower])


def test_friendly_name_and_module_path_are_one_site(tiny_clip):
    """A block has one key whichever way it is named, and its input is another place."""
    found = host(tiny_clip)
    friendly, path = found.site("visual.blocks.1.hook_resid_post"), found.site("visual.transformer.resblocks.1")
    assert (friendly.key, friendly.name, path.name) == (path.key, path.name, "visual.blocks.1.hook_resid_post")
    assert path.aliases == ("visual.transformer.resblocks.1",)
    assert found.site("visual.blocks.1.hook_attn_out").key == found.site("visual.transformer.resblocks.1.attn").key
    assert found.site("text.blocks.1.hook_resid_post").key == found.site("transformer.resblocks.1").key
    assert len({found.site(f"visual.blocks.1.hook_resid_{end}").key for end in ("pre", "post")}) == 2


def test_residual_sites_add_up(tiny_clip):
    """resid_pre + attn_out + mlp_out is resid_post, and resid_post is the next resid_pre."""
    seen = {}
    for name in ("1.hook_resid_pre", "1.hook_attn_out", "1.hook_mlp_out", "1.hook_resid_post", "2.hook_resid_pre"):
        host(tiny_clip).site(f"visual.blocks.{name}").hook(lambda acts, name=name: seen.update({name: acts}))
    embed(tiny_clip, "visual")
    total = seen["1.hook_resid_pre"] + seen["1.hook_attn_out"] + seen["1.hook_mlp_out"]
    torch.testing.assert_close(total, seen["1.hook_resid_post"])
    assert torch.equal(seen["1.hook_resid_post"], seen["2.hook_resid_pre"])


@pytest.mark.parametrize("name", ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"])
def test_either_layout_is_shown_batch_first(tiny_clip, name):
    """The same weights in either memory layout show the same activations and take the same edit."""
    seen, embeddings = [], []
    for model in (tiny_clip, pos_first(tiny_clip)):
        site = host(model).site(f"visual.blocks.1.{name}")
        site.hook(lambda acts: seen.append(acts))
        site.hook(lambda acts: torch.cat([acts[:, :3] * 2, acts[:, 3:]], dim=1))
        embeddings.append(embed(model, "visual"))
    assert seen[0].shape == (2, 17, 32)
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(embeddings[0], embeddings[1])


def test_layer_scale_is_part_of_what_a_block_adds():
    """With LayerScale, hook_attn_out is what is added to the residual stream, not what attention returns."""
    model = custom(**VISION, ls_init_value=0.1).eval()
    assert "visual.transformer.resblocks.1.ls_1" in host(model).site("visual.blocks.1.hook_attn_out").aliases


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("visual.blocks.1.resid_post", "did you mean 'visual.blocks.1.hook_resid_post'"),
        ("blocks.1.hook_resid_post", "'visual.blocks.1.hook_resid_post' or 'text.blocks.1.hook_resid_post'"),
        ("visual.blocks.11.hook_resid_post", r"exists for N in 0 .. 2"),
        ("text.blocks.2.hook_resid_post", r"exists for N in 0 .. 1"),
        ("visual.blocks.1.hook_resid_mid", "take 'visual.blocks.1.hook_attn_out' or 'visual.blocks.1.hook_resid_post'"),
        ("visual.transformer.resblocks.1.attn.out_proj", "never fires.*take 'visual.transformer.resblocks.1.attn'"),
        ("visual.transformer.resblocks", "container.*'visual.transformer.resblocks.0'"),
    ],
)
def test_a_wrong_name_says_what_to_write(tiny_clip, name, message):
    """A place that does not exist, or never fires, is refused with the place to take."""
    with pytest.raises(SiteError, match=message):
        host(tiny_clip).site(name)


def test_heads_are_refused(tiny_clip):
    """A CLIP site has no heads to choose from."""
    with pytest.raises(SiteError, match="has no attention heads"):
        host(tiny_clip).site("visual.blocks.1.hook_attn_out", head=1)


def test_each_tower_knows_its_text(clip, watched):
    """encode_image, encode_text and forward show what the towers run on, text with its tokens."""
    names = [next(one for one in sites(clip).names if one.startswith(tower)) for tower in ("visual", "text")]
    with watched(clip, *names) as seen:
        embed(clip, "visual")
        embed(clip, "text")
        with torch.no_grad():
            clip(images_for(clip), TEXT)
    found = [None if columns.tokens is None else columns.tokens.tolist() for columns in seen]
    assert found == [None, TEXT.tolist()] * 2


def test_half_precision_model_takes_a_float32_result(tiny_clip):
    """A float32 result flows on in the bfloat16 of the model."""
    model = tiny_clip.to(torch.bfloat16)
    host(model).site("visual.blocks.1.hook_resid_post").hook(lambda acts: acts.float() + 1)
    with torch.no_grad():
        assert model.encode_image(IMAGES.bfloat16()).dtype == torch.bfloat16


def test_removed_hooks_leave_nothing(tiny_clip, hooks_of):
    """After remove, hooks of every kind are as before, on modules and on their inputs."""
    tiny_clip.visual.register_forward_hook(lambda *_: None)
    before = hooks_of(tiny_clip)
    handles = [host(tiny_clip).site(name).hook(lambda acts: acts * 2) for name in sites(tiny_clip).names]
    embed(tiny_clip, "visual")
    for handle in handles:
        handle.remove()
    assert hooks_of(tiny_clip) == before


def test_one_tower_by_itself(tiny_clip):
    """``clip.visual`` is a model too: same places, names without the tower."""
    alone = host(tiny_clip.visual)
    site = alone.site("blocks.1.hook_resid_post")
    assert site.key == host(tiny_clip).site("visual.blocks.1.hook_resid_post").key
    assert (site.width, alone.tower(site), "transformer.resblocks.1" in site.aliases) == (32, "visual", True)


def test_running_a_batch(tiny_clip):
    """``run`` tells images from tokens and refuses anything else."""
    found = host(tiny_clip)
    assert torch.equal(found.run(IMAGES), tiny_clip.encode_image(IMAGES))
    assert torch.equal(found.run((IMAGES, torch.tensor([1, 2]))), tiny_clip.encode_image(IMAGES))
    assert torch.equal(found.run(TEXT), tiny_clip.encode_text(TEXT))
    with pytest.raises(SiteError, match="got str"):
        found.run("a photo")


@pytest.mark.real
def test_the_real_clip_is_read_bit_for_bit(tinyclip):
    """On trained weights too, reading every site leaves image and text embeddings bit-identical."""
    images = torch.randn(4, 3, *tinyclip.visual.image_size)
    text = torch.randint(1, 100, (4, tinyclip.context_length))
    with torch.no_grad():
        before = tinyclip(images, text)
        handles = [host(tinyclip).site(name).hook(lambda acts: None) for name in sites(tinyclip).names]
        after = tinyclip(images, text)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
