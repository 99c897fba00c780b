"""Random programs of nested blocks: whatever they do, the model, the SAEs and the process are as before."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import saehooks as sh
from saehooks import hosts
from saehooks.errors import SaehooksError

hypothesis = pytest.importorskip("hypothesis")
transformers = pytest.importorskip("transformers")
st = hypothesis.strategies

PROGRAMS = int(os.environ.get("SAEHOOKS_PROGRAMS", "60"))
"""How many programs are run; each draws its host."""

TOKENS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 11, 12, 13, 14, 15]])
PAST = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3}


class Host(NamedTuple):
    """A tiny model, the SAEs of some of its sites, a call of it, and a generation if it can generate."""

    model: nn.Module
    saes: tuple[sh.SAE, ...]
    call: Callable[[nn.Module], torch.Tensor]
    generate: Callable[[], Any] | None


class Stop(BaseException):
    """What a program raises in its middle; no Exception, as KeyboardInterrupt is none."""


# ------------------------------------------------------------------------- hosts


def by_tokens(model):
    output = model(TOKENS)
    return getattr(output, "logits", output)


def generates(model):
    model.generation_config.eos_token_id = None
    return lambda: model.generate(TOKENS, max_new_tokens=2, do_sample=False)


def llama():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**PAST, **HEADS, num_key_value_heads=2)).eval()
    return model, ("model.layers.0", "model.layers.1.mlp"), by_tokens, generates(model)


def gpt2():
    sizes = {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    return model, ("transformer.h.0", "transformer.h.1"), by_tokens, generates(model)


def mamba():
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**PAST, state_size=4)).eval()
    return model, ("backbone.layers.0", "backbone.layers.1"), by_tokens, generates(model)


def t5():
    sizes = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    call = lambda m: m(input_ids=TOKENS, decoder_input_ids=TOKENS[:, :3]).logits  # noqa: E731
    return model, ("encoder.block.0", "decoder.block.1"), call, generates(model)


def bert():
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, **HEADS)
    )
    return model.eval(), ("bert.encoder.layer.0", "bert.encoder.layer.1"), by_tokens, None


def clip():
    open_clip = pytest.importorskip("open_clip")
    vision = open_clip.CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=4, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=6, vocab_size=64, width=32, heads=4, layers=2)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    images = torch.randn(2, 3, 16, 16)

    def call(m):
        both = [m.encode_image(images), m.encode_text(TOKENS)]
        return torch.cat([one for one in both if one is not None])  # a stopped forward gives None

    return model, ("visual.blocks.0.hook_resid_post", "text.blocks.1.hook_mlp_out"), call, None


def bridge():
    pytest.importorskip("transformer_lens.model_bridge")
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources import native  # noqa: F401  (it adds boot_native)

    sizes = {
        "d_model": 32,
        "d_head": 8,
        "n_heads": 4,
        "n_layers": 2,
        "n_ctx": 16,
        "d_vocab": 64,
        "d_mlp": 48,
        "act_fn": "gelu",
        "seed": 0,
    }
    model = TransformerBridge.boot_native(TransformerBridgeConfig(**sizes)).eval()
    return model, ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z"), by_tokens, None


class Maps(nn.Module):
    """Convolutions with batch norm in train mode, and weights that others determine."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
        self.middle = nn.utils.parametrizations.weight_norm(nn.Conv2d(32, 32, 3))
        self.last = nn.utils.parametrizations.spectral_norm(nn.Linear(32, 5))

    def forward(self, x):
        return self.last(self.middle(torch.relu_(self.norm(self.first(x)))).mean((2, 3)))


def maps():
    images = torch.randn(2, 3, 8, 8)
    return Maps().eval(), ("first", "middle"), lambda m: m(images), None


MAKERS = {one.__name__: one for one in (llama, gpt2, mamba, t5, bert, clip, bridge, maps)}


@functools.cache
def host_of(name: str) -> Host:
    torch.manual_seed(4)
    model, names, call, generate = MAKERS[name]()
    saes = []
    for i, site in enumerate(names):
        torch.manual_seed(i)
        sae = sh.SAE(32, 64, *(("linear", "relu") if i else ()), hook_name=site)
        saes.append(sae.train() if i else sae.eval())
    call(model)  # a bridge registers hooks of its own at its first forward
    torch.compile(model, backend="eager")  # transformers notes that it was compiled
    gc.collect()
    gc.freeze()  # later collections need not go through what this one imported
    return Host(model, tuple(saes), call, generate)


# --------------------------------------------------------------- what must not change


def state(module: nn.Module) -> list:
    """Hooks in order, what stands in the modules' own dicts, flags, parameters, buffers, gradients."""
    found: list = []
    for name, one in module.named_modules():
        tables = [value for key, value in vars(one).items() if "_hooks" in key and isinstance(value, dict)]
        found += [name, one.training, sorted(vars(one)), [list(table.items()) for table in tables]]
        found += [list(getattr(one, "fwd_hooks", []))]
    for tensor in [*module.parameters(), *module.buffers()]:
        found += [id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.grad is None]
    return found


def process() -> list:
    """Settings of the process."""
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch._dynamo.eval_frame._stance.stance,
        dict(torch.nn.modules.module._global_forward_hooks),
        dict(torch.nn.modules.module._global_forward_pre_hooks),
        torch.get_rng_state().tolist(),
        list(warnings.filters),
        threading.active_count(),
    ]


# ------------------------------------------------------------------------- programs

WHERES = (None, 0, [1, 2], -1, slice(1, None), sh.last, sh.everywhere, lambda tokens, codes: codes.support_size > 3)
LATENTS = st.integers(0, 63)
LEAVES = st.one_of(
    st.just(("call",)),
    st.just(("call",)),
    st.just(("backward",)),
    st.just(("generate",)),
    st.just(("copy",)),
    st.just(("reset",)),
    st.just(("trace",)),
    st.just(("raise",)),
    st.just(("compile",)),
)
VERBS = ("read", "splice", "ablate", "clamp", "scale", "steer", "mine", "fails", "both", "measure", "train", "stop")


def branches(children):
    body = st.lists(children, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.just("block"), st.sampled_from(VERBS), st.integers(0, 1), LATENTS, st.integers(0, 7), body),
        st.tuples(st.just("block"), st.sampled_from(VERBS), st.integers(0, 1), LATENTS, st.integers(0, 7), body),
        st.tuples(st.just("try"), body),
        st.tuples(st.just("generator"), st.sampled_from(["close", "forget", "exhaust", "throw"]), body),
        st.tuples(st.just("threads"), body, body),
        st.tuples(st.just("crossed"), st.sampled_from(VERBS), st.sampled_from(VERBS), LATENTS, body),
        st.tuples(st.just("hook"), st.sampled_from(["before", "inside", "first"]), body),
        st.tuples(st.just("inference"), body),
    )


PROGRAM = st.lists(st.recursive(LEAVES, branches, max_leaves=8), min_size=1, max_size=3)


class Run:
    """One program on one host; a block that complains is a block that was left."""

    def __init__(self, host: Host, clean: torch.Tensor):
        self.host, self.clean = host, clean
        self.threaded = False
        self.open = 0

    def all(self, actions) -> None:
        for action in actions:
            self.one(action)

    def one(self, action) -> None:
        getattr(self, f"do_{action[0]}")(*action[1:])

    # leaves

    def do_call(self) -> None:
        with torch.no_grad(), contextlib.suppress(SaehooksError, AttributeError):  # a stopped forward gives None
            self.host.call(self.host.model)

    def do_backward(self) -> None:
        with contextlib.suppress(SaehooksError, AttributeError):  # AttributeError: a stopped forward gives None
            if torch.is_inference_mode_enabled():
                return
            with torch.enable_grad():
                self.host.call(self.host.model).square().sum().backward()
        for p in self.host.model.parameters():
            p.grad = None

    def do_generate(self) -> None:
        if self.host.generate is not None:
            with contextlib.suppress(SaehooksError, AttributeError, TypeError):  # a stopped forward gives None
                self.host.generate()

    def do_copy(self) -> None:
        if self.threaded or torch.is_inference_mode_enabled():  # whoever copies sees what another thread registers
            return
        twin = copy.deepcopy(self.host.model)
        with torch.no_grad():
            assert torch.equal(self.host.call(twin), self.clean)

    def do_reset(self) -> None:
        getattr(self.host.model, "reset_hooks", lambda: None)()

    def do_trace(self) -> None:
        for trace in getattr(self, "traces", [])[-2:]:
            with contextlib.suppress(SaehooksError, RuntimeError):  # of inference tensors outside of their mode
                repr(trace), trace.nmse, trace.top(2)

    def do_raise(self) -> None:
        raise Stop

    def do_compile(self) -> None:
        if not self.open:  # outside of blocks it would really compile, which is slow
            return
        with torch.no_grad(), contextlib.suppress(SaehooksError, AttributeError):
            self.host.call(torch.compile(self.host.model, backend="eager"))

    # branches

    def block(self, verb: str, which: int, latent: int, where: int) -> Any:
        model, sae = self.host.model, self.host.saes[which]
        options = {"where": WHERES[where], "grads": latent % 5 == 0, "keep_all": latent % 3 == 0}
        options = {name: value for name, value in options.items() if value is not None}

        def mine(codes):
            codes.values.mul_(0.5)
            return codes

        def fails(codes):
            raise Stop

        if verb in ("measure", "train"):
            kept = {"where": WHERES[where]} if WHERES[where] is not None else {}
            if verb == "measure":
                return sh.measure(model, sae, live=False, **kept)
            return sh.train(model, copy.deepcopy(sae), batch_size=4, warmup_steps=0, **kept)
        if verb == "stop":
            host = hosts.host(model)
            return host.stop_at(host.site(sae.hook_name))
        return {
            "read": lambda: sh.read(model, sae, **options),
            "splice": lambda: sh.splice(model, sae, **options),
            "ablate": lambda: sh.ablate(model, sae, latent, **options),
            "clamp": lambda: sh.clamp(model, sae, {latent: 3.0}, **options),
            "scale": lambda: sh.scale(model, sae, {latent: 0.0}, **options),
            "steer": lambda: sh.steer(model, sae, {latent: 2.0}, **options),
            "mine": lambda: sh.attach(model, sae, edits=mine, **options),
            "fails": lambda: sh.attach(model, sae, edits=fails, **options),
            "both": lambda: sh.attach(model, list(self.host.saes), edits=sh.edits.zero([latent]), error="drop"),
        }[verb]()

    def do_block(self, verb, which, latent, where, body) -> None:
        with contextlib.suppress(SaehooksError), self.block(verb, which, latent, where) as block:
            self.traces = [*getattr(self, "traces", []), block] if isinstance(block, sh.Trace) else []
            self.open += 1
            try:
                self.all(body)
            finally:
                self.open -= 1

    def do_try(self, body) -> None:
        with contextlib.suppress(Stop):
            self.all(body)

    def do_generator(self, how, body) -> None:
        def steps() -> Iterator[None]:
            with contextlib.suppress(SaehooksError), self.block("splice", 0, 3, 0):
                for action in body:
                    self.one(action)
                    yield

        generator = steps()
        with contextlib.suppress(StopIteration):
            next(generator)
            if how == "close":
                generator.close()
            elif how == "throw":
                with contextlib.suppress(Stop):
                    generator.throw(Stop())
            elif how == "exhaust":
                for _ in generator:
                    pass
        del generator
        gc.collect()

    def do_threads(self, one, two) -> None:
        failed: list[BaseException] = []

        def work(body) -> None:
            run = Run(self.host, self.clean)
            run.threaded = True
            try:
                run.all(body)
            except Stop:
                pass
            except BaseException as error:
                failed.append(error)

        workers = [threading.Thread(target=work, args=(body,)) for body in (one, two)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failed and not isinstance(failed[0], SaehooksError):
            raise failed[0]

    def do_crossed(self, first, second, latent, body) -> None:
        """Two blocks, of which the one that was entered first is left first."""
        one, two = self.block(first, 0, latent, 0), self.block(second, 1, latent, 4)
        one.__enter__()
        try:
            two.__enter__()
        except BaseException:
            one.__exit__(None, None, None)
            raise
        error: tuple = (None, None, None)
        try:
            self.all(body)
        except BaseException as raised:
            error = type(raised), raised, raised.__traceback__
        for block in (one, two):
            with contextlib.suppress(SaehooksError, Stop):
                block.__exit__(*error)
        if error[1] is not None:
            raise error[1]

    def do_hook(self, when, body) -> None:
        """A hook of the user's own on the site's module, which stays until the body is over."""
        model = self.host.model
        module = hosts.host(model).site(self.host.saes[0].hook_name).module
        handle = module.register_forward_hook(lambda *_: None, prepend=when == "first")
        try:
            self.all(body)
        finally:
            handle.remove()

    def do_inference(self, body) -> None:
        with torch.inference_mode():
            self.all(body)


@hypothesis.settings(
    max_examples=PROGRAMS,
    deadline=None,
    derandomize=PROGRAMS <= 100,
    database=None,
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.sampled_from(sorted(MAKERS)), PROGRAM)
def test_whatever_a_program_does_nothing_is_left_behind(name, program):
    """Blocks nested, crossed, in generators and in threads, that end, raise or are forgotten, change nothing."""
    host = host_of(name)
    with torch.no_grad():
        clean = host.call(host.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = [state(one) for one in (host.model, *host.saes)], process()
        torch.manual_seed(0)
        before[1][10] = torch.get_rng_state().tolist()
        with contextlib.suppress(Stop, SaehooksError):
            Run(host, clean).all(program)
        gc.collect()
        after = [state(one) for one in (host.model, *host.saes)], process()
    assert after[0] == before[0]
    assert after[1][:10] == before[1][:10]
    assert after[1][11:] == before[1][11:]
    with torch.no_grad():
        assert torch.equal(host.call(host.model), clean)
