"""A device without float64, as Apple's are: its tensors are held by the CPU, and refuse what such a device refuses.

Registering a device changes a process for good, so this is run in one of its own: ``python narrow_device.py PART``. It
prints what saehooks gives there and on the CPU; `test_narrow_device.py` compares.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import saehooks as sh

NAME = "mpslike"
WIDE = (torch.float64, torch.complex128)
aten = torch.ops.aten
ACROSS = (aten._to_copy, aten.copy_, aten._copy_from, aten.index, aten.index_put, aten.index_put_)
"""The operations that may name two devices: copies, and indexing, whose indices may lie on the CPU."""


class There(torch.Tensor):
    """A tensor on the device; ``held`` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        if held.dtype in WIDE:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=f"{NAME}:0", **layout)
        made.held = held
        return made

    def __repr__(self):
        return f"There({self.held})"

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Do an operation on the numbers that are held; refuse two devices at once."""
    leaves = tree_leaves((args, kwargs))
    mine = [one for one in leaves if isinstance(one, There)]
    others = [one for one in leaves if isinstance(one, torch.Tensor) and not isinstance(one, There) and one.dim()]
    if mine and others and func.overloadpacket not in ACROSS:
        raise RuntimeError(f"Expected all tensors to be on the same device, {func} got {NAME}:0 and cpu")
    given = kwargs.get("device")
    lands = bool(mine) if given is None else torch.device(given).type == NAME
    if func.overloadpacket is torch.ops.aten.copy_:
        lands = isinstance(args[0], There)
    kwargs = {**kwargs, "device": torch.device("cpu")} if given is not None and lands else kwargs
    held = tree_map(lambda one: one.held if isinstance(one, There) else one, (args, kwargs))
    found = func(*held[0], **held[1])
    same = {id(one.held): one for one in mine}  # of an operation in place
    return tree_map(
        lambda one: (
            one if not (lands and isinstance(one, torch.Tensor)) else same[id(one)] if id(one) in same else There(one)
        ),
        found,
    )


class Narrow(TorchDispatchMode):
    """Inside, the device exists."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Module(_DummyBackendModule):
    """What torch asks a kind of device."""

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


def register() -> torch.device:
    """The device, which torch knows from now on."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    unseen = torch.library.Library("aten", "IMPL")  # what torch calls inside itself, where no mode is asked
    for name, call in {
        "empty_strided": lambda size, stride, **given: There(torch.empty_strided(size, stride, dtype=given["dtype"])),
        "empty.memory_format": lambda size, **given: There(torch.empty(size, dtype=given["dtype"])),
        "_copy_from": lambda source, to, _=False: run(torch.ops.aten.copy_.default, (to, source), {}),
    }.items():
        unseen.impl(name, call, "PrivateUse1")
    register.kept = unseen
    return torch.device(NAME, 0)


# ------------------------------------------------------------------------------------------- what is tried on it

ACTIVATIONS = {
    "relu": {}, "gated": {}, "jumprelu": {}, "topk": {"k": 4}, "batchtopk": {"k": 4}, "mutual_choice": {"k": 4},
    "feature_choice": {"k": 4}, "sparsemax": {}, "entmax": {},
}  # fmt: skip


def cells():
    """One step of training of each cell of the grid, its reconstructions, and their gradient."""
    torch.manual_seed(0)
    x = torch.randn(12, 32)

    def cell(dictionary, activation, settings, device):
        torch.manual_seed(1)
        sae = sh.SAE(32, 64, dictionary, activation, **settings).to(device)
        trainer = sh.Trainer(sae, sh.TrainConfig(batch_size=12))
        trainer.step(x.to(device))
        sae.eval()
        out = sae(x.to(device))
        sae.zero_grad()
        out.recons.square().sum().backward()
        slope = sum(float(p.grad.abs().sum()) for p in sae.parameters() if p.grad is not None)
        return [trainer.history[-1]["loss"], float(out.recons.detach().sum()), float(out.codes.sizes.sum()), slope]

    for dictionary in ("linear", "concepts", "kron"):
        for activation, settings in ACTIVATIONS.items():
            yield f"{dictionary} {activation}", partial(cell, dictionary, activation, settings)


def verbs():
    """Every verb on a language model."""
    tokens = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(3))

    def parts(device):
        torch.manual_seed(4)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval().to(device)
        torch.manual_seed(1)
        sae = sh.SAE(32, 64, "linear", "topk", k=8, hook_name="model.layers.1").to(device).eval()
        return model, sae, tokens.to(device)

    def reading(device):
        model, sae, given = parts(device)
        with torch.no_grad(), sh.read(model, sae) as trace:
            model(given)
        return [trace.l0, float(trace.codes.values.sum()), len(repr(trace)), len(trace._repr_html_()) > 0]

    def editing(verb, device):
        model, sae, given = parts(device)
        more = {"splice": [], "ablate": [[1, 2, 3]], "clamp": [{3: 2.0}], "steer": [{3: 2.0}]}[verb]
        with torch.no_grad(), getattr(sh, verb)(model, sae, *more):
            return [float(model(given).logits.square().sum())]

    def measuring(device):
        model, sae, given = parts(device)
        return list(sh.measure(model, sae, [given]).values())

    def ranking(device):
        model, sae, given = parts(device)
        found = sh.rank_latents(model, sae, [given], exact=5)
        return [found.latents.tolist(), found.exact[:5].tolist()]

    def surveying(device):
        model, sae, given = parts(device)
        index = sh.survey(model, sae, [given])
        return [index.density.nan_to_num().tolist(), index.quantiles.nan_to_num().tolist()]

    def fitting(device):
        model, sae, given = parts(device)
        settings = {"batch_size": 16, "buffer_rows": 32, "progress": False, "eval_batches": [given]}
        trainer = sh.fit(model, sae, [given] * 8, "model.layers.1", **settings)
        return [trainer.steps, trainer.history[-1]["eval_nmse"], trainer.history[-1]["eval_l0"]]

    edits = {verb: partial(editing, verb) for verb in ("splice", "ablate", "clamp", "steer")}
    rest = {"read": reading, "measure": measuring, "rank": ranking, "survey": surveying, "fit": fitting}
    yield from {**edits, **rest}.items()


def main() -> None:
    device = register()
    with Narrow():
        for name, attempt in {"cells": cells, "verbs": verbs}[sys.argv[1]]():
            print(json.dumps([name, attempt(torch.device("cpu")), attempt(device)]), flush=True)


if __name__ == "__main__":
    main()
