"""Does it work here? Promises of the library, tried on tiny models made on the spot."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saehooks import kernels
from saehooks.attachments import read, steer
from saehooks.doctor.environment import Finding, Status, first_line
from saehooks.sae import SAE

PROMPT = torch.tensor([[0, 5, 6, 7, 8, 9]])
WIDTH, LATENTS, NEW_TOKENS = 32, 128, 8
DEVICES = ("cpu", "cuda")


def self_check_findings() -> list[Finding]:
    """Read bit-identical, the same tokens with and without a KV cache, kernels equal to the reference.

    Random numbers drawn by the caller afterwards are what they would have been.
    """
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        findings = [_tried("kernels agree", partial(kernels_agree, one)) for one in _devices()]
        for name, make in (("torch", plain), ("transformers", hugging_face), ("transformer-lens", bridge)):
            findings += _model_checks(name, make)
    return findings


def _devices() -> list[str]:
    return [one for one in DEVICES if one == "cpu" or torch.cuda.is_available()]


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of other libraries on the screen: their warnings have lines of their own in the table."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _tried(name: str, check: Callable[[], str | None]) -> Finding:
    """A check as a line: it returns what went wrong, or None."""
    try:
        fault = check()
    except Exception as error:  # whatever a library raises here is a finding, not the end of the others
        fault = first_line(error)
    status: Status = "ok" if fault is None else "wrong"
    return Finding("self-check", name, status, fault or "yes")


# ------------------------------------------------------------------- kernels


def kernels_agree(device: str) -> str | None:
    """Where the kernels that serve float32 on a device differ from plain torch; None if nowhere."""
    scores, table = torch.randn(16, 512, device=device), torch.randn(512, WIDTH, device=device)
    plain_torch = kernels.Step(backend="reference")
    for rule in (kernels.Sparsemax(), kernels.Entmax(1.5), kernels.TopK(7), kernels.Threshold(1.0)):
        mine, theirs = kernels.select_rows(scores, rule), kernels.select_rows(scores, rule, step=plain_torch)
        if not (torch.equal(mine.indices, theirs.indices) and torch.equal(mine.offsets, theirs.offsets)):
            return f"{type(rule).__name__} selects other latents than plain torch on {device}"
        values = torch.randn(mine.indices.shape, device=device)
        decoded = kernels.spmm(values, mine, table)
        if not torch.allclose(decoded, kernels.spmm(values, theirs, table, step=plain_torch), rtol=1e-4, atol=1e-4):
            return f"spmm differs from plain torch on {device}"
        products = kernels.sddmm(decoded, table, mine)
        expected = kernels.sddmm(decoded, table, theirs, step=plain_torch)
        if not torch.allclose(products, expected, rtol=1e-4, atol=1e-2):
            return f"sddmm differs from plain torch on {device}"
    return None


# -------------------------------------------------------------------- models


class Tiny:
    """A model with a site, and how it is called and generates."""

    def __init__(self, model: nn.Module, site: str, cache: str | None = None):
        self.model, self.site, self.cache = model.eval(), site, cache
        self.sae = SAE(WIDTH, LATENTS)

    def logits(self) -> Tensor:
        """Logits (batch, pos, vocabulary) of one call."""
        with torch.no_grad():
            out = self.model(PROMPT)
        return getattr(out, "logits", out)

    def generated(self, cached: bool) -> Tensor:
        """Greedy tokens (batch, pos), steered at a position of the prompt."""
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, self.cache or "": cached}
        with steer(self.model, self.sae, {7: 1.5, 30: -1.5}, at=self.site, where=[2, 4]):
            return self.model.generate(PROMPT, **options)  # type: ignore[operator]


def plain() -> Tiny:
    """A module of torch alone."""
    return Tiny(nn.Sequential(nn.Embedding(64, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64)), "1")


def hugging_face() -> Tiny:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=63, pad_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    return Tiny(LlamaForCausalLM(config), "model.layers.0", "use_cache")


def bridge() -> Tiny:
    """The same under TransformerLens: a bridge, or before 3.0 a HookedTransformer."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return hooked()
    with tempfile.TemporaryDirectory() as folder:  # which the bridge reads again
        model = TransformerBridge.boot_transformers("tiny", hf_model=hugging_face().model, tokenizer=_tokenizer(folder))
    return Tiny(model, "blocks.0.hook_resid_post", "use_past_kv_cache")


def hooked() -> Tiny:
    """A HookedTransformer of two layers."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        d_model=WIDTH, d_head=8, n_heads=4, n_layers=2, n_ctx=64, d_vocab=64, d_mlp=48, act_fn="gelu", seed=0
    )
    return Tiny(HookedTransformer(config), "blocks.0.hook_resid_post", "use_past_kv_cache")


def _tokenizer(folder: str) -> Any:
    """Words w0 .. w63, kept in a folder: a bridge asks for a tokenizer with a name."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w60"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w63", pad_token="w2")
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _model_checks(name: str, make: Callable[[], Tiny]) -> list[Finding]:
    try:
        tiny = make()
    except ModuleNotFoundError:  # its extra is missing, which the releases say
        return []
    except Exception as error:  # as above
        return [Finding("self-check", f"{name}: a tiny model", "wrong", first_line(error))]
    findings = [_tried(f"{name}: read changes nothing", lambda: read_is_identical(tiny))]
    if tiny.cache is not None:
        findings.append(_tried(f"{name}: the same tokens with a KV cache", lambda: cache_is_right(tiny)))
    return findings


def read_is_identical(tiny: Tiny) -> str | None:
    """None if logits are the same to the last bit while an SAE reads."""
    clean = tiny.logits()
    with read(tiny.model, tiny.sae, at=tiny.site):
        same = torch.equal(tiny.logits(), clean)
    return None if same else "logits differ while an SAE is attached that only reads"


def cache_is_right(tiny: Tiny) -> str | None:
    """None if steering at positions generates the same tokens with and without a KV cache."""
    with_cache, without = tiny.generated(True), tiny.generated(False)
    return None if torch.equal(with_cache, without) else "steered generation gives other tokens with the KV cache"
