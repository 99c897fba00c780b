"""Tiny models of every family, random and on the CPU, shared by the tests."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

from saehooks.known_bad import known_bad

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which any library may do first

SHARED = Path(__file__).parents[2] / "shared"
ASSETS = Path(__file__).parents[1] / "saehooks" / "demo" / "assets"


def pytest_make_parametrize_id(config, val, argname):
    """Functions as parameters are named by their name: an address would differ between parallel workers."""
    return getattr(val, "__name__", None) if callable(val) else None


def pytest_collection_modifyitems(items):
    """Under releases known not to work together, the tests of what they break are expected to fail, with the reason."""
    found = known_bad()
    for item in items:
        if found and item.get_closest_marker("bridge_cache"):
            item.add_marker(pytest.mark.xfail(reason=found[0].sentence(), strict=False))


WORDS = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(61))]


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


imported: list[int] = [0]
"""How many modules there were when garbage was last looked for among all objects."""


@pytest.fixture(autouse=True)
def frozen():
    """Collecting garbage passes over what imports made: going through all of transformers takes half a second."""
    if len(sys.modules) > imported[0] + 100:
        gc.collect()
        gc.freeze()
        imported[0] = len(sys.modules)


@pytest.fixture
def tiny_bridge():
    """A TransformerBridge over a native model: 3 layers, d_model 32, 4 heads of 8, vocabulary 64. No KV cache."""
    pytest.importorskip("transformer_lens.model_bridge")
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources import native  # noqa: F401  (it adds boot_native)

    config = TransformerBridgeConfig(
        d_model=32, d_head=8, n_heads=4, n_layers=3, n_ctx=64, d_vocab=64, d_mlp=48, act_fn="gelu", seed=0
    )
    bridge = TransformerBridge.boot_native(config)
    return bridge.eval()


@pytest.fixture
def tiny_decoder():
    """The configuration of a tiny decoder, for any family of Hugging Face that is built like Llama."""
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.3,
    }


@pytest.fixture
def tiny_hf(tiny_decoder):
    """A Hugging Face Llama: 4 layers, d_model 32, 4 heads of 8 over 2 key-value heads, vocabulary 64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)  # greedy continuations of this one go on without ending the text
    config = transformers.LlamaConfig(**{**tiny_decoder, "num_hidden_layers": 4, "max_position_embeddings": 128})
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A word tokenizer over ``w0`` .. ``w60`` with ``<s>`` = 0, ``</s>`` = 1, ``<pad>`` = 2."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w60")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w60"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)  # TransformerLens reloads it by name, so it must have one
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tiny_hf_bridge(tiny_hf, tiny_tokenizer):
    """A TransformerBridge over ``tiny_hf``, with KV cache and a tokenizer, for ``generate`` and text."""
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    return bridges.TransformerBridge.boot_transformers("tiny", hf_model=tiny_hf, tokenizer=tiny_tokenizer).eval()


@pytest.fixture
def tiny_clip():
    """An open_clip.CLIP: images 3x16x16 in 16 patches; visual width 32 and 3 blocks, text width 24 and 2 blocks."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg=open_clip.CLIPVisionCfg(layers=3, width=32, head_width=8, patch_size=4, image_size=16),
        text_cfg=open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=24, heads=3, layers=2),
    )
    return model.eval()


@pytest.fixture(scope="session")
def tinyclip():
    """The small CLIP trained on real photographs."""
    open_clip = pytest.importorskip("open_clip")
    folders = [ASSETS / "tinyclip", SHARED / "models" / "tinyclip"]
    folder = next((one for one in folders if (one / "open_clip_config.json").exists()), None)
    if folder is None:
        pytest.skip("the small CLIP is not here")
    return open_clip.create_model(f"local-dir:{folder}").eval()


@pytest.fixture
def watched():
    """``with watched(model, *sites) as seen:`` lists what is known of the positions of each forward at each site."""
    from contextlib import contextmanager

    from saehooks.hosts import host
    from saehooks.hosts.sequences import SequenceWatch

    @contextmanager
    def watching(model, *names):
        source, seen = host(model), []
        watch = SequenceWatch(source)
        sites = [source.site(name) for name in names]
        with watch.watching((site, lambda acts, site=site: seen.append(watch.look(site, acts))) for site in sites):
            yield seen

    return watching


@pytest.fixture
def hooks_of():
    """A function that lists every hook of every module of a model, in order: equal lists are the same hooks."""

    def snapshot(model):
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        kinds += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
        found = []
        for name, module in model.named_modules():
            hooks = tuple(tuple((key, id(hook)) for key, hook in getattr(module, kind).items()) for kind in kinds)
            found.append((name, hooks, {key for key in module.__dict__ if callable(module.__dict__[key])}))
        return found

    return snapshot
