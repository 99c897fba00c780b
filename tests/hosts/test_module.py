"""Sites of plain modules and plain Hugging Face models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saehooks.errors import SiteError, WidthError
from saehooks.hosts import SiteInfo, SiteTable, host, sites

TOKENS = torch.tensor([[0, 7, 8, 9, 10], [0, 20, 21, 22, 23]])


class Pair(nn.Module):
    """Returns its activations inside whatever ``wrap`` makes of them."""

    def __init__(self, wrap):
        super().__init__()
        self.inner = nn.Identity()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


def test_a_hugging_face_block_is_read_and_written(tiny_hf):
    """The output of ``model.layers.1`` is (batch, pos, hidden), and scaling it changes the logits."""
    site = host(tiny_hf).site("model.layers.1")
    with torch.no_grad():
        before = tiny_hf(TOKENS).logits
        shapes = []
        site.hook(lambda acts: shapes.append(tuple(acts.shape)))
        assert torch.equal(tiny_hf(TOKENS).logits, before)
        site.hook(lambda acts: acts * torch.tensor([2.0, *[0.5] * 31]))
        assert not torch.equal(tiny_hf(TOKENS).logits, before)
    assert (shapes[0], site.width) == ((2, 5, 32), 32)


def test_the_table_knows_the_widths_of_a_hugging_face_model(tiny_hf):
    """Blocks, their attention and MLP have the residual width; linear layers their own; containers are left out."""
    widths = {info.name: info.width for info in sites(tiny_hf)}
    assert {widths[f"model.layers.2{part}"] for part in ("", ".self_attn", ".mlp", ".input_layernorm")} == {32}
    assert widths["model.layers.2.mlp.up_proj"] == 48
    assert widths["model.layers.2.self_attn.k_proj"] == 16
    assert "model.layers" not in widths


def test_generation_counts_positions(tiny_hf, watched):
    """While generating with the KV cache, ``start`` is the absolute position of the new token."""
    with watched(tiny_hf, "model.layers.2.mlp") as seen:
        tiny_hf.generate(TOKENS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(TOKENS))
    found = [(tuple(columns.tokens.shape), columns.start, columns.length) for columns in seen]
    assert found == [((2, 5), 0, 5), ((2, 1), 5, 5), ((2, 1), 6, 5)]


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: x, lambda out: out),
        (lambda x: (x, None), lambda out: out[0]),
        (lambda x: [None, x], lambda out: out[1]),
        (lambda x: {"hidden": x, "mask": None}, lambda out: out["hidden"]),
    ],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_the_first_tensor_of_an_output_is_the_site(wrap, unwrap):
    """Of a tuple, list or dict its first tensor is shown and replaced, and the rest stays."""
    model = nn.Sequential(Pair(wrap))
    x = torch.ones(2, 3, 4)
    host(model).site("0").hook(lambda acts: acts + 1)
    out = model(x)
    assert type(out) is type(wrap(x))
    assert torch.equal(unwrap(out), x + 1)
    assert torch.equal(x, torch.ones(2, 3, 4))
    if not isinstance(out, torch.Tensor):
        held = [*(out.values() if isinstance(out, dict) else out)]
        assert len(held) == 2
        assert sum(one is None for one in held) == 1


def test_a_model_output_keeps_its_type(tiny_hf):
    """The whole body of a Hugging Face model returns a ModelOutput, which stays one."""
    host(tiny_hf).site("model").hook(lambda acts: acts * 0)
    with torch.no_grad():
        out = tiny_hf(TOKENS, use_cache=True)
    assert (out.logits == 0).all()
    assert out.past_key_values.get_seq_length() == 5


def test_rows_without_positions_are_one_position_each():
    """A (batch, width) activation is shown as (batch, 1, width) and goes back as it came."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    shapes = []
    host(model).site("0").hook(lambda acts: (shapes.append(tuple(acts.shape)), acts.abs())[1])
    assert model(torch.randn(7, 3)).shape == (7, 5)
    assert shapes == [(7, 1, 5)]


def test_gradients_flow_through_a_replaced_activation():
    """What a hook returns is part of the graph, in whatever memory layout the site has."""
    model = nn.Sequential(nn.Linear(3, 5))
    host(model).site("0").hook(lambda acts: acts * 3)
    x = torch.randn(2, 4, 3, requires_grad=True)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, (3 * model[0].weight.sum(0)).expand(2, 4, 3))


def test_gradients_flow_through_an_odd_memory_layout():
    """A replaced activation has the strides of the original, and its gradient is that of the plain formula."""
    model = nn.Sequential(Pair(lambda x: x), Pair(lambda x: x.transpose(0, 1)))
    strides = []
    host(model).site("1").hook(lambda acts: (acts * 3).contiguous())
    host(model).site("1").hook(lambda acts: strides.append(acts.stride()))
    x = torch.randn(2, 4, 3, requires_grad=True)
    (model(x) ** 2).sum().backward()
    assert strides == [x.transpose(0, 1).stride()]
    torch.testing.assert_close(x.grad, 18 * x.detach())


def test_what_is_no_activation_is_refused_at_the_forward_pass():
    """Maps of unknown width, integers and empty outputs raise, naming the site and what it carries."""
    maps = nn.Sequential(nn.Identity())
    host(maps).site("0").hook(lambda acts: None)
    with pytest.raises(WidthError, match=r"site '0'.* \(1, 8, 3, 3\) does not tell which axis"):
        maps(torch.randn(1, 8, 3, 3))
    for wrap, message in ((lambda x: x.long(), "torch.int64"), (lambda x: None, "NoneType without a tensor")):
        model = nn.Sequential(Pair(wrap))
        host(model).site("0").hook(lambda acts: None)
        with pytest.raises(SiteError, match=message):
            model(torch.ones(1, 2, 3))


class Narrowed(nn.Linear):
    """Says that it is 5 wide and returns 2."""

    def forward(self, x):
        return super().forward(x)[..., :2]


def test_an_activation_of_another_width_than_promised_is_refused():
    """The width of the module and the width that came are both named."""
    model = nn.Sequential(Narrowed(3, 5))
    host(model).site("0").hook(lambda acts: None)
    with pytest.raises(WidthError, match="d_in=5, but '0' is 2 wide"):
        model(torch.ones(1, 4, 3))


def test_heads_and_unknown_widths():
    """A module without parameters has no width before a forward pass, and no module has heads."""
    found = host(nn.Sequential(nn.ReLU()))
    assert found.site("0").width is None
    with pytest.raises(SiteError, match="no attention heads"):
        found.site("0", head=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layer.1", "did you mean 'model.layers.1'"),
        ("layers.1", "did you mean 'model.layers.1'"),
        ("model.layers.9", r"'model.layers.N' exists for N in 0 .. 3"),
        ("blocks.2.hook_resid_pre", "write 'model.layers.1'"),
        ("blocks.2.hook_resid_post", "write 'model.layers.2'"),
        ("blocks.0.hook_resid_pre", "its blocks are 'model.layers.N'"),
        ("model.layers", "container.*'model.layers.0'"),
        ("", "a site is a name"),
    ],
)
def test_a_wrong_name_says_what_to_write(tiny_hf, name, message):
    """A path that does not exist is answered with the nearest, TransformerLens names with the block they mean."""
    with pytest.raises(SiteError, match=message):
        host(tiny_hf).site(name)


def test_only_modules_have_sites():
    """What is no module is refused; a compiled model has the sites of the model that was compiled."""
    with pytest.raises(SiteError, match=r"torch.nn.Module, got dict"):
        host({})
    model = nn.Sequential(nn.Linear(2, 2))
    assert host(torch.compile(model)).model is model


def test_the_table_reads_as_text_and_html():
    """A table prints one line per site and escapes its HTML."""
    table = SiteTable([SiteInfo("a.<b>", ("c",), 8, "batch pos width"), SiteInfo("d", (), None, "batch pos width")])
    assert repr(table).splitlines()[1].split()[:2] == ["a.<b>", "8"]
    assert "a.&lt;b&gt;" in table._repr_html_()
    assert table.find("c").names == ["a.<b>"]
    assert repr(table.find("nothing")) == "no sites"
    assert table[1:].names == ["d"]
    assert table.__rich__().row_count == 2


def test_a_table_has_one_row_for_the_same_place_in_all_blocks():
    """Numbers are shown together only where every combination exists and nothing else differs; the page ends."""
    names = [f"{stage}.blocks.{i}.{part}" for stage in (0, 1) for i in (0, 1, 2) for part in ("mlp", "norm")]
    names = [name for name in names if name != "1.blocks.2.norm"]
    infos = [
        SiteInfo(name, (name + ".alias", "other.0"), 8 if "mlp" in name else 9, "batch pos width") for name in names
    ]
    table = SiteTable([*infos, SiteInfo("head", (), None, "batch pos width")])
    rows = [line.split()[0] for line in repr(table).splitlines()[1:]]
    assert rows == ["{0-1}.blocks.{0-2}.mlp", "{0-1}.blocks.{0-1}.norm", "0.blocks.2.norm", "head"]
    assert "{0-1}.blocks.{0-2}.mlp.alias, other.0" in repr(table)
    assert table.names == [*names, "head"]
    long = SiteTable([SiteInfo(f"layer_{i}x.mlp", (), 8, "batch pos width") for i in range(1027)])
    assert len(repr(long).splitlines()) == 42
    assert repr(long).splitlines()[-1] == "... and 987 rows more: .find(text) finds sites, .names lists all 1027"
    assert long._repr_html_().count("<tr>") == 41
    assert long.__rich__().row_count == 40


def test_a_row_of_the_table_is_no_name(tiny_hf):
    """Whoever writes what the table shows for several sites is told to take one."""
    with pytest.raises(SiteError, match=r"stands for several sites.* such as 'model\.layers\.0\.mlp'"):
        host(tiny_hf).site("model.layers.{0-3}.mlp")


def hugging_face_clip():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "projection_dim": 16}
    text = {"hidden_size": 24, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, **sizes}
    vision = {"hidden_size": 32, "image_size": 16, "patch_size": 4, **sizes}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def hugging_face_vit():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16}
    return transformers.ViTModel(transformers.ViTConfig(hidden_size=32, patch_size=4, **sizes))


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=16, patch_size=4, embed_dim=32, num_heads=4)


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (hugging_face_clip, {"text_model.encoder.layers.1": 24, "vision_model.encoder.layers.1": 32}),
        (hugging_face_vit, {"layers.1": 32, "layers.1.attention": 32, "layers.1.mlp": 32}),
        (timm_vit, {"blocks.1": 32, "blocks.1.attn": 32, "blocks.1.mlp": 32}),
    ],
)
def test_blocks_of_vision_transformers_are_listed(make, blocks):
    """Each with its width; where sites are listed, what passes has that width."""
    model = make().eval()
    widths = {info.name: info.width for info in sites(model)}
    assert blocks.items() <= widths.items()
    seen = {}
    handles = [
        host(model).site(name).hook(lambda acts, name=name: seen.update({name: acts.shape[-1]})) for name in widths
    ]
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        model(input_ids=TOKENS[:1], pixel_values=images) if make is hugging_face_clip else model(images)
    for handle in handles:
        handle.remove()
    assert seen.items() <= widths.items()
    assert set(blocks) <= set(seen)
