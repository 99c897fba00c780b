"""Activations with places instead of words: feature maps of convolutions and of vision transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saehooks.attachments import read, splice, steer
from saehooks.errors import WidthError
from saehooks.hosts import sites
from saehooks.sae import SAE
from saehooks.streams import harvest


def resnet():
    return pytest.importorskip("timm").create_model("resnet10t", num_classes=5), 64


def swin():
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(2, 2), embed_dim=24, num_heads=(3, 3), img_size=64, window_size=4
    ), 64


def convnext():
    timm = pytest.importorskip("timm")
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)), 64


def vit():
    return pytest.importorskip("timm").create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=5), 64


def to_rows(raw):
    """(batch, places, width) of a map (batch, width, height, width of the picture)."""
    return raw.permute(0, 2, 3, 1).flatten(1, 2)


CASES = {
    # model, site, width, and how a plain hook sees the places: (batch, places, width)
    "ResNet block": (resnet, "layer2.0", 128, to_rows),
    "ResNet layer": (resnet, "layer1", 64, to_rows),
    "ResNet convolution": (resnet, "layer1.0.conv1", 64, to_rows),
    "ResNet norm": (resnet, "layer2.0.downsample.2", 128, to_rows),
    "Swin block": (swin, "layers.0.blocks.1", 24, lambda raw: raw.flatten(1, 2)),
    "Swin MLP": (swin, "layers.1.blocks.0.mlp", 48, None),
    "ConvNeXt block": (convnext, "stages.1.blocks.0", 24, to_rows),
    "ViT block": (vit, "blocks.0", 192, lambda raw: raw),
    "ViT attention": (vit, "blocks.0.attn", 192, lambda raw: raw),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_map_is_read_and_written_by_its_places(kind):
    """Places are positions, row by row; an edit at one of them adds the latent's direction there, and nowhere else."""
    make, name, width, rows = CASES[kind]
    torch.manual_seed(0)
    model, size = make()
    for p in model.eval().parameters():
        p.data += 0.1 * torch.randn_like(p)  # some begin at zero, and stop what is written before them
    images, sae = torch.randn(2, 3, size, size), SAE(width, 2 * width, "linear", "relu").eval()
    listed = {info.name: info.width for info in sites(model)}
    assert listed[name] == width
    module, seen = model.get_submodule(name), []
    handle = module.register_forward_hook(lambda m, args, output: seen.append(output.detach().clone()))
    with torch.no_grad():
        clean = model(images)
        with read(model, sae, at=name) as trace:
            assert torch.equal(model(images), clean)
        if rows is not None:
            assert torch.equal(trace.acts, rows(seen[0]))
        places = trace.acts.shape[1]
        mask = torch.zeros(places, dtype=torch.bool)
        mask[[1, places - 1]] = True
        with steer(model, sae, {3: 5.0}, at=name, where=mask) as trace:
            edited = model(images)
        handle.remove()
        flat = trace.acts.clone()
        flat[:, mask] += 5.0 * sae.directions(3)[0]

        def by_hand(m, args, output):
            if rows is to_rows:
                return flat.unflatten(1, output.shape[2:]).permute(0, 3, 1, 2)
            return flat.reshape(output.shape)

        handle = module.register_forward_hook(by_hand)
        torch.testing.assert_close(edited, model(images), rtol=1e-4, atol=1e-4)
        handle.remove()
        assert not torch.equal(edited, clean)
        with splice(model, sae, at=name):
            assert torch.isfinite(model(images)).all()
        assert torch.equal(model(images), clean)


def test_a_map_keeps_its_memory_layout():
    """What goes on has the strides of the map, also in channels-last memory."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Identity())
    strides = []
    model[1].register_forward_hook(lambda m, args, output: strides.append((args[0].stride(), args[0].shape)))
    images = torch.randn(2, 3, 6, 6)
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        model(images.to(memory_format=layout))
        with steer(model, SAE(8, 16, "linear", "relu"), {3: 5.0}, at="0"):
            model(images.to(memory_format=layout))
        assert strides[-1] == strides[-2]


def test_sequences_of_convolutions_and_volumes():
    """(batch, width, pos) and (batch, width, depth, height, width) have their places as positions too."""
    for conv, shape, places in ((nn.Conv1d(3, 8, 1), (2, 3, 5), 5), (nn.Conv3d(3, 8, 1), (2, 3, 2, 3, 4), 24)):
        model, x = nn.Sequential(conv, nn.ReLU()), torch.randn(*shape)
        with torch.no_grad(), read(model, SAE(8, 16), at="0") as trace:
            model(x)
        assert torch.equal(trace.acts, conv(x).flatten(2).transpose(1, 2))
        assert trace.acts.shape == (2, places, 8)


def test_axes_are_never_guessed():
    """Where the layers do not say which axis holds the features, their number must, and only one axis may have it."""
    model = nn.Sequential(nn.Identity())
    for shape, d_in in (((2, 8, 3, 8), 8), ((2, 3, 8, 4), 8), ((2, 8, 8, 3), 8), ((2, 3, 4, 5), 8)):
        refused = pytest.raises(WidthError, match="does not tell which axis holds its features")
        with refused, read(model, SAE(d_in, 16), at="0"):
            model(torch.randn(shape))
    for shape, first in (((2, 8, 3, 4), True), ((2, 3, 4, 8), False)):
        x = torch.randn(shape)
        with torch.no_grad(), read(model, SAE(8, 16), at="0") as trace:
            model(x)
        assert torch.equal(trace.acts, to_rows(x) if first else x.flatten(1, 2))


def test_a_wrong_width_is_refused_when_the_block_is_entered():
    """The blocks of a ViT and of a ResNet say how wide they are."""
    for make, name in ((vit, "blocks.0"), (resnet, "layer2.0")):
        with pytest.raises(WidthError, match=f"the SAE has d_in=16, but '{name}' is"):
            read(make()[0], SAE(16, 32), at=name).__enter__()


def test_heads_are_no_places():
    """Inside of attention an activation of four axes has a vector for each head, and no place of a picture."""
    model = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", depth=1, img_size=32, qk_norm=True).eval()
    refused = pytest.raises(WidthError, match=r"'blocks\.0\.attn\.q_norm' carries activations of shape \(1, 3, 5, 64\)")
    with refused, read(model, SAE(64, 128), at="blocks.0.attn.q_norm"):
        model(torch.randn(1, 3, 32, 32))


def test_the_head_of_a_siglip():
    """The attention pool of a SigLIP tower, and its MLP, carry one position for each picture."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_base_patch16_siglip_224", depth=1, img_size=32, embed_dim=32, num_heads=4).eval()
    images, sae = torch.randn(2, 3, 32, 32), SAE(32, 64, "linear", "relu").eval()
    for name in ("attn_pool", "attn_pool.mlp"):
        assert {info.name: info.width for info in sites(model)}[name] == 32
        with torch.no_grad(), read(model, sae, at=name) as trace:
            clean = model(images)
        assert trace.acts.shape == (2, 1, 32)
        with torch.no_grad(), steer(model, sae, {3: 5.0}, at=name):
            edited = model(images)
        step = 5.0 * sae.directions(3)
        torch.testing.assert_close(edited, clean + step)


@pytest.mark.parametrize(("family", "columns"), [("Siglip", 16), ("CLIP", 17)])
def test_a_picture_tower_of_hugging_face_leaves_no_position_out(family, columns):
    """All patches of a picture are harvested and read, the first too, and the class token where there is one."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}VisionConfig")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    model = getattr(transformers, f"{family}VisionModel")(config).eval()
    images, seen = torch.randn(3, 3, 16, 16), []
    layer = next(module for name, module in model.named_modules() if name.endswith("encoder.layers.0"))
    handle = layer.register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.no_grad():
        model(pixel_values=images)
    handle.remove()
    expected = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    assert expected.shape == (3, columns, 32)
    at = next(site.name for site in sites(model) if site.name.endswith("encoder.layers.0"))
    found = torch.cat(list(harvest(model, [{"pixel_values": images}], at)))
    assert torch.equal(found, expected.flatten(0, 1))
    with torch.no_grad(), read(model, SAE(32, 64, "linear", "topk", k=4), at=at) as trace:
        model(pixel_values=images)
    assert trace.mask is None or bool(trace.mask.all())
