"""One text, one answer: the models, the rules, and the oracle that the matrix of tests/test_one_text.py compares with.

The oracle knows nothing of saehooks: each text by itself, without a cache and without padding, a plain PyTorch hook
adding one vector where the rule says so, the next word chosen from the last logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import saehooks as sh
from saehooks.where import past_first

BOS, EOS, PAD, VOCABULARY, WIDTH = 0, 1, 2, 64, 32
LATENT, STEP = 7, 6.0
ROWS = [[0, 5, 6, 7, 8, 9, 20], [0, 10, 11, 30], [0, 12, 33, 3, 4]]
REPEATING = [0, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]
OTHER = [0, 40, 41, 42, 43, 44, 45]

At = Callable[[int, int, int], bool]
"""Whether a rule holds at a position, of a prompt of that many, at a token."""

RULES: dict[str, tuple[Any, At]] = {
    "0": (0, lambda p, n, t: p == 0),
    "[2, -1]": ([2, -1], lambda p, n, t: p in (2, n - 1)),
    "slice(1, 4)": (slice(1, 4), lambda p, n, t: 1 <= p < 4),
    "slice(-2, None)": (slice(-2, None), lambda p, n, t: p >= n - 2),
    "sh.last": (sh.last, lambda p, n, t: p >= n - 1),
    "~positions(-2)": (~sh.positions(-2), lambda p, n, t: p != n - 2),
    "function": (lambda tokens, codes: tokens % 3 == 0, lambda p, n, t: t % 3 == 0),
    "not_special": (sh.not_special([0, 1, 2, 5]), lambda p, n, t: t not in (0, 1, 2, 5)),
    "left out": (past_first, lambda p, n, t: p >= 1),
    "everywhere": (sh.everywhere, lambda p, n, t: True),
}
OF_TOKENS = ("function", "not_special")
"""Rules that need tokens."""


def new_sae(width: int = WIDTH) -> sh.SAE:
    """A ReLU SAE, which adds exactly one row of W_dec for each unit of a latent."""
    torch.manual_seed(1)
    return sh.SAE(width, 96, "linear", "relu").eval()


def arrow(sae: sh.SAE) -> Tensor:
    """What one unit of the latent adds."""
    return next(value for name, value in sae.state_dict().items() if name.endswith("W_dec"))[LATENT]


@contextmanager
def edited(module: nn.Module, step: Tensor, at: Callable[[int, int], bool]) -> Iterator[None]:
    """Inside the block the module's output has ``step`` added at (row, column) where ``at`` holds."""

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = first.clone()
        for row in range(new.shape[0]):
            for column in range(new.shape[1]):
                if at(row, column):
                    new[row, column] += step
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """ids and attention mask, (batch, pos)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def same(found: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree up to rounding."""
    return found.shape == right.shape and float((found - right).abs().max()) <= 2e-3 * max(1, float(right.abs().max()))


@dataclass
class Decoder:
    """A causal language model of Hugging Face, and the oracle's answers about it."""

    name: str
    model: Any
    site: str
    sae: sh.SAE = field(default_factory=new_sae)

    def __post_init__(self) -> None:
        self.module = self.model.get_submodule(self.site)
        self.arrow = STEP * arrow(self.sae)
        self._known: dict[Any, Any] = {}

    def steer(self, rule: str, model: Any = None, site: str | None = None) -> Any:
        """The block of saehooks that does what the oracle does."""
        return sh.steer(model or self.model, self.sae, {LATENT: STEP}, at=site or self.site, where=RULES[rule][0])

    def takes(self, name: str) -> bool:
        """Whether the model's forward has an argument."""
        import inspect

        return name in inspect.signature(self.model.forward).parameters

    def logits(self, row: list[int], rule: str, prompt: int | None = None, call: Any = None) -> Tensor:
        """(pos, vocabulary) of a text, edited as the rule says of a prompt of its first ``prompt`` words."""
        key = (tuple(row), rule, prompt, call)
        if key not in self._known:
            at, length = RULES[rule][1], prompt or len(row)
            with torch.no_grad(), edited(self.module, self.arrow, lambda _, p: at(p, length, row[p])):
                output = (call or self.model)(torch.tensor([row]), use_cache=False)
            self._known[key] = output[0][0]
        return self._known[key]

    def written(self, row: list[int], rule: str, new: int) -> tuple[list[int], Tensor]:
        """The words that follow a prompt, and the logits that each was chosen from."""
        text, logits = list(row), []
        for _ in range(new):
            logits.append(self.logits(text, rule, len(row))[-1])
            text.append(int(logits[-1].argmax()))
        return text[len(row) :], torch.stack(logits)

    def beams(self, row: list[int], rule: str, **how: Any) -> list[list[int]]:
        """What beam search writes without a cache."""
        at, ids = RULES[rule][1], [torch.tensor([row])]

        def look(_: nn.Module, args: Any, kwargs: Any) -> None:
            ids[0] = kwargs.get("input_ids", args[0] if args else None)

        handle = self.model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with edited(self.module, self.arrow, lambda r, p: at(p, len(row), int(ids[0][r, p]))):
                found = self.model.generate(torch.tensor([row]), do_sample=False, use_cache=False, **how)
        finally:
            handle.remove()
        return found[:, len(row) :].tolist()


# ------------------------------------------------------------------ models


def ready(model: Any) -> Any:
    """In eval mode, and generating on whatever token comes."""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    return model.eval()


def _made(kind: str, config: str, seed: int = 4, **settings: Any) -> Any:
    import transformers

    torch.manual_seed(seed)
    return ready(getattr(transformers, kind)(getattr(transformers, config)(**settings)))


TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
SMALL = {
    **TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


def llama(seed: int = 4) -> Any:
    return _made("LlamaForCausalLM", "LlamaConfig", seed, **SMALL)


def gemma() -> Any:
    layers = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    settings = {**SMALL, **layers, "head_dim": 8, "sliding_window": 4}
    return _made("Gemma3ForCausalLM", "Gemma3TextConfig", **settings)


def gpt2() -> Any:
    settings = {**TOKENS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
    return _made("GPT2LMHeadModel", "GPT2Config", **settings)


def opt() -> Any:
    size = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 48, "num_hidden_layers": 2, "init_std": 0.3}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 128}
    return _made("OPTForCausalLM", "OPTConfig", **TOKENS, **size, **heads)


def mamba() -> Any:
    size = {"hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}
    return _made("MambaForCausalLM", "MambaConfig", **TOKENS, **size)


DECODERS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (llama, "model.layers.0"),
    "gpt2": (gpt2, "transformer.h.0"),
    "gemma": (gemma, "model.layers.0.mlp"),
    "opt": (opt, "model.decoder.layers.0"),
    "mamba": (mamba, "backbone.layers.0"),
}


def t5() -> Any:
    size = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    more = {"decoder_start_token_id": 0, "initializer_factor": 3.0}
    settings = {name: value for name, value in TOKENS.items() if name != "bos_token_id"}
    return _made("T5ForConditionalGeneration", "T5Config", 0, **settings, **size, **more)


def bert() -> Any:
    settings = {name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    more = {"vocab_size": VOCABULARY, "intermediate_size": 48, "initializer_range": 0.3}
    return _made("BertForMaskedLM", "BertConfig", 0, **settings, **more)


IMAGE = 63
"""The token of a picture's place in the text of a multimodal model."""


def llava() -> Any:
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**size, image_size=8, patch_size=4, projection_dim=16)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**SMALL),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return ready(transformers.LlavaForConditionalGeneration(config))


def hugging_face_clip() -> Any:
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    config = transformers.CLIPConfig(
        text_config={**size, **tokens, "max_position_embeddings": 16},
        vision_config={**size, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    return transformers.CLIPModel(config).eval()
