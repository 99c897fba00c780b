"""Attached SAEs on the GPU: what a read and a splice cost a real-size model, forward and while generating."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from gpu_clock import Clock, half_products
from gpu_measure import Found, Row, product_ms
from gpu_model import Decoder
from gpu_report import ratio
from torch import Tensor

from saehooks import SAE, kernels, read, splice

KINDS = (
    ("float32, scored in bfloat16", torch.float32, False),
    ("bfloat16", torch.bfloat16, False),
    ("float32, scored in float32", torch.float32, True),
)
"""Name, dtype of the SAE, and whether float32 products stay float32 (torch's default)."""

VERBS: dict[str, Callable[..., AbstractContextManager[Any]]] = {"read": read, "splice": splice}


def attached(args: argparse.Namespace, clock: Clock, *_: int) -> Found:
    """A spliced and a read forward, and generation, of a decoder with half-precision weights."""
    toy = clock.interpreted
    width, layers, d_sae = (16, 2, 32) if toy else (2_048, 16, 24_576)
    made = {"device": clock.device, "dtype": torch.bfloat16}
    model = Decoder(width, layers, max(2, width // 128), vocabulary=50 if toy else 32_000, **made).eval()
    tokens = torch.randint(0, 50, (2, 3) if toy else (16, 256), device=clock.device)
    site, found = f"blocks.{layers // 2}", {"attach": [], "generate": []}
    acts = activations(model, tokens, site)
    with torch.no_grad():
        plain = clock.ms(lambda: model(tokens))
        product = product_ms(clock, acts, torch.randn(d_sae, width, device=clock.device))
        for name, dtype, precise in KINDS:
            with nullcontext() if precise else half_products():
                sae = fitting(acts, d_sae, 4 if toy else 64, dtype, clock)
                for verb in VERBS:
                    for sized in (False, True):
                        row = {"SAE": name, **_forward(clock, model, tokens, site, sae, verb, sized)}
                        found["attach"].append(_against(row, plain, product))
                for batch in () if precise else (1, 2) if toy else (1, 16):
                    prompt = tokens[:batch, : 2 if toy else 32]
                    found["generate"] += [{"SAE": name, **row} for row in _generating(clock, model, prompt, site, sae)]
    return found


def _against(row: Row, plain: float | None, product: float | None) -> Row:
    """The row beside the bare forward, and what an SAE may add: 1.3 encoder products and 3% of the forward."""
    added = None if plain is None or row["forward ms"] is None else row["forward ms"] - plain
    allowed = None if plain is None or product is None else 1.3 * product + 0.03 * plain
    row |= {"bare ms": plain, "/ bare": ratio(row["forward ms"], plain), "added ms": added}
    return {**row, "encoder product ms": product, "added / allowed": ratio(added, allowed)}


@torch.no_grad()
def activations(model: Decoder, tokens: Tensor, site: str) -> Tensor:
    """(tokens, width) float32, what flows through a block."""
    caught: list[Tensor] = []
    handle = model.get_submodule(site).register_forward_hook(lambda _module, _args, out: caught.append(out))
    try:
        model(tokens)
    finally:
        handle.remove()
    return caught[0].float().flatten(0, 1)


@torch.no_grad()
def fitting(acts: Tensor, d_sae: int, support: int, dtype: torch.dtype, clock: Clock) -> SAE:
    """An SAE of random concepts whose keys are scaled so that it selects about ``support`` latents a token."""
    sae = SAE(acts.shape[1], d_sae, device=clock.device, dtype=dtype).eval()
    sae.initialise(acts.to(dtype))
    eye, sample = torch.eye(acts.shape[1], device=clock.device), acts[: 4 if clock.interpreted else 128]
    low, high = 1e-2, 1e3
    for _ in range(3 if clock.interpreted else 14):
        scale = (low * high) ** 0.5
        sae.dictionary.W_k.copy_(eye * scale)
        size = float(sae.encode(sample).support_size.double().mean())
        low, high = (scale, high) if size > support else (low, scale)
    return sae


@contextmanager
def _sized(sized: bool, sae: SAE, model: Decoder, tokens: Tensor, site: str) -> Iterator[None]:
    """A capacity with half more room than the tokens take, or none."""
    if not sized:
        yield
        return
    entries = int(sae.encode(activations(model, tokens, site)).offsets[-1])
    with kernels.capacity(max(1, int(1.5 * entries))):
        yield


def _forward(clock: Clock, model: Decoder, tokens: Tensor, site: str, sae: SAE, verb: str, sized: bool) -> Row:
    """One verb at one site: device time, when the call returns to the host, and how often it waits."""
    row: Row = {"verb": verb, "capacity": "yes" if sized else "no"}
    row |= {"d_sae": sae.d_sae, "d_model": sae.d_in, "layers": len(model.blocks), "tokens": tokens.numel()}
    with _sized(sized, sae, model, tokens, site), VERBS[verb](model, sae, at=site) as trace:
        row["forward ms"] = clock.ms(lambda: model(tokens))
        row["call returns after ms"] = clock.host_ms(lambda: model(tokens)).returned
        row["waits"], row["where it waits"] = clock.waits(lambda: model(tokens))
        row["l0"] = float(trace.support_size.double().mean())
    return row


def _generating(clock: Clock, model: Decoder, prompt: Tensor, site: str, sae: SAE) -> list[Row]:
    """Tokens one by one through the KV cache: milliseconds a token on the host's clock, bare and with each verb."""
    new = 2 if clock.interpreted else 32
    bare = ratio(clock.host_ms(lambda: model.generate(prompt, new)).done, new)
    found = []
    for verb in VERBS:
        for sized in (False, True):
            attach = VERBS[verb](model, sae, at=site)
            with _sized(sized, sae, model, prompt, site), attach:
                ms = ratio(clock.host_ms(lambda: model.generate(prompt, new)).done, new)
                waits, where = clock.waits(lambda: model.generate(prompt, new))
            row: Row = {"verb": verb, "capacity": "yes" if sized else "no"}
            row |= {"batch": len(prompt), "bare ms": bare, "token ms": ms, "/ bare": ratio(ms, bare)}
            row |= {"added ms": None if ms is None or bare is None else ms - bare}
            found.append({**row, "waits a token": ratio(waits, new), "where it waits": where})
    return found
