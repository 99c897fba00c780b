"""What an attachment adds to a model's forward, and to a generated token, in encoder products and in forwards.

    python recipes/benchmark/attach.py [--quick] [--device cuda]

One decoder (random weights, a KV cache), one site at half depth: the plain forward, each verb, a PyTorch hook that does
nothing; then token by token. A read costs the encoder's product and the selection; a splice adds the decoding. On CUDA
also how often a forward makes the host wait.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Bench, Case, Job, Row, arguments, concept_sae
from torch import Tensor, nn

import saehooks as sh

CPU = [Case(512, 24576), Case(128, 24576), Case(512, 3072), Case(1, 24576)]
CUDA = [Case(4096, 24576, 2048), Case(16, 24576, 2048), Case(1, 24576, 2048)]


class Cache:
    """Keys and values of the positions so far, in memory set aside beforehand."""

    def __init__(self, model: Decoder, batch: int, length: int) -> None:
        like, heads = model.embed.weight, model.blocks[0].heads
        shape = len(model.blocks), 2, batch, heads, length, like.shape[1] // heads
        self._kept = torch.empty(shape, dtype=like.dtype, device=like.device)
        self._filled = 0

    def get_seq_length(self) -> int:
        """Positions that are filled; the name is Hugging Face's, which hosts know."""
        return self._filled

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, pos, d_head) of all positions, the given ones behind those that are kept."""
        stop = self._filled + keys.shape[2]
        for kept, new in zip(self._kept[layer], (keys, values), strict=True):
            kept[:, :, self._filled : stop] = new
        return self._kept[layer, 0, :, :, :stop], self._kept[layer, 1, :, :, :stop]

    def advance(self, positions: int) -> None:
        """Count positions as filled, once every layer has extended."""
        self._filled += positions


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around the residual stream."""

    def __init__(self, width: int, heads: int, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = heads, layer
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        batch, pos, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, pos, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=pos > 1)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, pos, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Decoder(nn.Module):
    """Tokens (batch, pos) in, logits out. With a cache: a whole prompt first, then one token at a time."""

    def __init__(self, width: int = 576, layers: int = 12, vocabulary: int = 8192, context: int = 600) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 64), layer) for layer in range(layers))
        self.norm, self.unembed = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, past_key_values: Cache | None = None) -> Tensor:
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        x = self.embed(input_ids) + self.places.weight[start : start + input_ids.shape[1]]
        for block in self.blocks:
            x = block(x, past_key_values)
        if past_key_values is not None:
            past_key_values.advance(input_ids.shape[1])
        return self.unembed(self.norm(x))

    @torch.no_grad()
    def generate(self, prompt: Tensor, new: int) -> Tensor:
        """(batch, new) tokens, each the likeliest; the host reads none of them."""
        cache, tokens, given = Cache(self, prompt.shape[0], prompt.shape[1] + new), [], prompt
        for _ in range(new):
            given = self(given, past_key_values=cache)[:, -1:].argmax(-1)
            tokens.append(given)
        return torch.cat(tokens, dim=1)


def waits(bench: Bench, job: Job) -> int | None:
    """How often one run makes the host wait for a GPU."""
    if bench.device.type != "cuda":
        return None
    job()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            job()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


def added(times: Row) -> Row:
    """What each verb adds to the forward, in encoder products."""
    if times["forward"].get("ms") is None:
        return {}
    product, forward = times["product"]["ms"], times["forward"]["ms"]
    verbs = [name for name in times if name not in ("product", "forward") and times[name].get("ms")]
    return {f"{name}, added": {"ratio": (times[name]["ms"] - forward) / product} for name in verbs}


def main() -> None:
    bench = Bench(arguments(__doc__.splitlines()[0]))
    for case in bench.cases(CPU, CUDA):
        layers = 2 if bench.toy else 12
        model = Decoder(case.d_in, layers).to(bench.device).eval()
        site = f"blocks.{layers // 2}"
        batch = 1 if case.rows < 256 else 4
        tokens = torch.randint(0, 8192, (batch, case.rows // batch), device=bench.device)
        caught: list[Tensor] = []
        handle = model.get_submodule(site).register_forward_hook(lambda _m, _a, out, caught=caught: caught.append(out))
        with torch.no_grad():
            model(torch.randint(0, 8192, (4, 64), device=bench.device))
        handle.remove()
        sae, _ = concept_sae(case, caught[0].flatten(0, 1))
        queries, keys = torch.randn(case.rows, case.d_in, device=bench.device), sae.dictionary.C.detach()
        scores = queries.new_empty(case.rows, case.d_sae)

        def within(verb: Callable[..., Any], run: Job, *given: Any, model=model, sae=sae, site=site) -> Job:
            def job() -> None:
                with verb(model, sae, *given, at=site):
                    run()

            return job

        verbs = {"read": (sh.read,), "splice": (sh.splice,), "ablate": (sh.ablate, [0, 1, 2])}
        forward = lambda model=model, tokens=tokens: model(tokens)  # noqa: E731
        jobs: dict[str, Job] = {
            "product": lambda q=queries, k=keys, out=scores: torch.mm(q, k.T, out=out),
            "forward": forward,
        }
        jobs |= {name: within(verb, forward, *given) for name, (verb, *given) in verbs.items()}
        with torch.no_grad():
            times = bench.time(jobs, "forward")
            seen = {name: waits(bench, jobs[name]) for name in ("read", "splice")}
            bench.add("attach", case, times | added(times), waits=seen)
            if case.rows > 16 and not bench.toy:
                continue
            new, prompt = (2, tokens[:, :2]) if bench.toy else (16, tokens[:, :1].expand(-1, 8))
            generate = lambda model=model, prompt=prompt, new=new: model.generate(prompt, new)  # noqa: E731
            jobs = {"product": jobs["product"], "forward": generate}
            jobs |= {name: within(verb, generate, *given) for name, (verb, *given) in verbs.items()}
            bench.add("generate", case, bench.time(jobs, "forward"), tokens=new)
    bench.save("attach")


if __name__ == "__main__":
    main()
