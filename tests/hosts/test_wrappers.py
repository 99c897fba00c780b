"""Sites inside of what is wrapped around a model, or around a part of it."""

from __future__ import annotations

import copy
import os
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from saehooks.attachments import read, steer
from saehooks.errors import SiteError
from saehooks.hosts import host, sites
from saehooks.sae import SAE

TOKENS = torch.tensor([[0, 5, 6, 7, 8, 9]])
LLAMA, VISUAL = "model.layers.1", "visual.blocks.1.hook_resid_post"


class Mine(nn.Module):
    """A class of the user's around a model, with a head of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(3, 2)

    def forward(self, batch):
        return self.inner(batch)


class Only(nn.Module):
    """A class of the user's around a model and nothing else."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


def compiled(module):
    return torch.compile(module, backend="eager")


def lora(module):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()


def averaged(module):
    return torch.optim.swa_utils.AveragedModel(module).eval()


@contextmanager
def one_process():
    """A process group of this process alone."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def codes(model, sae, call, **options):
    with torch.no_grad(), read(model, sae, **options) as trace:
        call()
    return trace.codes.dense()


WRAPPERS = {
    "DataParallel": (nn.DataParallel, "module."),
    "torch.compile": (compiled, "_orig_mod."),
    "LoRA": (lora, "base_model.model."),
    "AveragedModel": (averaged, "module."),
    "two of them": (lambda module: compiled(nn.DataParallel(module)), "_orig_mod.module."),
    "a class of the user's": (Mine, "inner."),
    "a class with nothing else": (Only, "net."),
    "a class around a wrapper": (lambda module: Mine(nn.DataParallel(module)), "inner.module."),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_changes_no_name(tiny_hf, kind):
    """An SAE finds its site by the name without the wrapper, and by the path through it; the codes are the same."""
    wrap, prefix = WRAPPERS[kind]
    sae = SAE(32, 96, "linear", "relu", hook_name=LLAMA).eval()
    right = codes(tiny_hf, sae, lambda: tiny_hf(TOKENS))
    model = wrap(tiny_hf)
    before = model(TOKENS).logits
    assert torch.equal(codes(model, sae, lambda: model(TOKENS)), right)
    assert torch.equal(codes(model, sae, lambda: model(TOKENS), at=prefix + LLAMA), right)
    one, two = host(model).site(LLAMA), host(model).site(prefix + LLAMA)
    assert (one.key, one.name, one.width) == (two.key, two.name, 32)
    assert one.name.endswith(LLAMA)
    with torch.no_grad(), steer(model, sae, {7: 9.0}):
        assert not torch.equal(model(TOKENS).logits, before)
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("kind", ["DataParallel", "torch.compile", "two of them"])
def test_the_table_of_sites_shows_names_without_wrappers(tiny_hf, kind):
    """The names are those of the plain model; the paths through the wrapper stand beside them."""
    wrap, prefix = WRAPPERS[kind]
    plain = sites(tiny_hf).names
    table = sites(wrap(tiny_hf))
    assert table.names == plain
    assert table.find(LLAMA)[0].aliases == (prefix + LLAMA,)


def test_distributed_data_parallel(tiny_hf):
    """In DistributedDataParallel too, and gradients still arrive."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    sae = SAE(32, 96, "linear", "relu", hook_name=LLAMA).eval()
    right = codes(tiny_hf, sae, lambda: tiny_hf(TOKENS))
    with one_process():
        model = nn.parallel.DistributedDataParallel(tiny_hf)
        assert torch.equal(codes(model, sae, lambda: model(TOKENS)), right)
        with steer(model, sae, {7: 3.0}, at="module." + LLAMA):
            model(TOKENS).logits.sum().backward()
    assert tiny_hf.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, Only], ids=["DataParallel", "torch.compile", "Only"])
def test_a_wrapped_tower_of_a_clip(tiny_clip, wrap):
    """A tower may be wrapped by itself, and so may every block of it."""
    sae, images = SAE(32, 64, "linear", "relu", hook_name=VISUAL).eval(), torch.randn(2, 3, 16, 16)
    right = codes(tiny_clip, sae, lambda: tiny_clip.encode_image(images))
    names = sites(tiny_clip).names
    if wrap is not Only:
        tiny_clip.visual = wrap(tiny_clip.visual)
        assert torch.equal(codes(tiny_clip, sae, lambda: tiny_clip.encode_image(images)), right)
        assert sites(tiny_clip).names == names
        assert host(tiny_clip).tower(host(tiny_clip).site(VISUAL)) == "visual"
    model = wrap(tiny_clip)
    assert torch.equal(codes(model, sae, lambda: tiny_clip.encode_image(images)), right)


def test_wrapped_blocks_of_a_clip(tiny_clip):
    """Wrappers around each block, as checkpointing and sharding put them there."""
    sae, images = SAE(32, 64, "linear", "relu", hook_name=VISUAL).eval(), torch.randn(2, 3, 16, 16)
    right = codes(tiny_clip, sae, lambda: tiny_clip.encode_image(images))
    blocks = tiny_clip.visual.transformer.resblocks
    for i, block in enumerate(blocks):
        blocks[i] = nn.DataParallel(block)
    assert torch.equal(codes(tiny_clip, sae, lambda: tiny_clip.encode_image(images)), right)
    path = "visual.transformer.resblocks.1"
    assert host(tiny_clip).site(path + ".module").name == host(tiny_clip).site(path).name == VISUAL


class Two(nn.Module):
    """Two models side by side."""

    def __init__(self, teacher, student):
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(self, batch):
        return self.teacher(batch), self.student(batch)


def test_a_class_of_the_users_around_models_of_other_families(tiny_bridge, tiny_clip):
    """A bridge, or a CLIP, inside a class keeps its hook names and its shapes; two of them need a path each."""
    name, sae = "blocks.1.attn.hook_z", SAE(32, 64, "linear", "relu").eval()
    right = codes(tiny_bridge, sae, lambda: tiny_bridge(TOKENS), at=name)
    model = Mine(tiny_bridge)
    for written in (name, f"inner.{name}"):
        assert torch.equal(codes(model, sae, lambda: model(TOKENS), at=written), right)
        assert host(model).site(written).name == name
    assert {name, "head"} <= set(sites(model).names)
    assert host(model).site("head").width == 2
    images = torch.randn(2, 3, 16, 16)
    model = Mine(nn.DataParallel(tiny_clip))
    assert host(model).site(VISUAL).name == VISUAL
    assert host(model).tower(host(model).site(VISUAL)) == "visual"
    with torch.no_grad(), steer(model, sae, {3: 2.0}, at=VISUAL) as trace:
        tiny_clip.encode_image(images)
    assert trace.calls == 1
    model = Two(tiny_bridge, tiny_clip)
    assert host(model).site(VISUAL).name == f"student.{VISUAL}"
    assert host(model).site(f"teacher.{name}").name == f"teacher.{name}"


def test_a_name_that_two_models_have_needs_a_path(tiny_hf):
    """Where a name means two places the error names both."""
    model = Two(tiny_hf, copy.deepcopy(tiny_hf))
    with pytest.raises(SiteError, match=r"did you mean 'teacher\.model\.layers\.1' or 'student\.model\.layers\.1'"):
        host(model).site(LLAMA)
    assert host(model).site(f"student.{LLAMA}").module is model.student.model.layers[1]


def test_what_was_trained_inside_a_wrapper_fits_the_plain_model(tiny_hf):
    """The site's name, which an SAE remembers, and the model's name are those of the model inside."""
    for wrap in (nn.DataParallel, compiled, lora):
        model = wrap(tiny_hf)
        assert host(model).site("model.layers.1").name == LLAMA
        assert host(model).describe() == host(tiny_hf).describe()


# -------------------------------------------------------------------- TorchScript


def script(model, example):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, example, check_trace=False)


def test_a_script_module_is_refused(tiny_clip):
    """A traced model, and one that is wrapped, cannot carry hooks, and the error says so before the block begins."""
    traced = script(tiny_clip.visual, torch.randn(1, 3, 16, 16))
    for model in (traced, nn.DataParallel(traced)):
        for use in (sites, lambda m: host(m).site("transformer"), lambda m: read(m, SAE(32, 8), at="x").__enter__()):
            with pytest.raises(SiteError, match=r"TorchScript module \(made by torch\.jit"):
                use(model)


def test_a_script_module_inside_a_model_is_hooked_as_a_whole():
    """The output of a traced part is a site; what is inside of it is refused by name, and not listed."""
    part = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    model = nn.Sequential(nn.Linear(4, 4), script(part, torch.randn(2, 3, 4)), nn.Linear(8, 2))
    sae, x = SAE(8, 16, "linear", "relu").eval(), torch.randn(2, 3, 4)
    with torch.no_grad(), steer(model, sae, {3: 4.0}, at="1"):
        edited = model(x)
    with torch.no_grad():
        step = 4.0 * sae.directions(3)
        torch.testing.assert_close(edited, model[2](model[1](model[0](x)) + step))
    with pytest.raises(SiteError, match=r"site '1\.0' never fires: it is inside of a TorchScript module"):
        host(model).site("1.0")
    assert not [name for name in sites(model).names if name.startswith("1.")]


def test_data_parallel_over_several_devices_is_refused():
    """Its copies would run at the same time, each on a part of the batch."""
    model = nn.DataParallel(nn.Linear(2, 3))
    model.device_ids = [0, 1]
    with pytest.raises(SiteError, match=r"DataParallel over 2 devices.*\.module"):
        sites(model)
