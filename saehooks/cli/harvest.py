"""`saehooks harvest`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from saehooks.cli.arguments import MODELS, add_data, command, open_as_asked

HARVEST = (
    """\
examples:
  saehooks harvest --model smollm2 --at blocks.15.hook_resid_post --to acts/15 --text corpus.jsonl --dtype bfloat16
  saehooks fit --activations acts/15 --d-sae 4608 --out saes/mine

Writes shards of activations with checksums. The same command goes on where an interrupted one stopped; what is there
already is not run again. Any number of SAEs can be trained from the folder, without the model.

"""
    + MODELS
)


def register(commands: Any) -> None:
    parser = command(commands, "harvest", "write the activations of one site of a model to disk", HARVEST, run)
    add = parser.add_argument
    add("--model", required=True, help="the model, see below")
    add("--at", required=True, help="the site, as 'saehooks sites MODEL' lists it")
    add("--head", type=int, help="one head of a per-head site")
    add("--to", type=Path, required=True, help="folder for the activations")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="to store in; that of the model by default")
    add("--max-norm", type=float, metavar="X", help="leave out rows above X times the median norm of the first batch")
    add_data(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch

    import saehooks as sh

    opened = open_as_asked(arguments)
    batches = opened.batches(arguments, "train", arguments.text, arguments.images, arguments.tokens)
    acts = sh.harvest(
        opened.model,
        batches,
        arguments.at,
        head=arguments.head,
        to=arguments.to,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        max_norm=arguments.max_norm,
        data=opened.source(arguments.text, arguments.images, "train", batches),
    )
    print(f"{acts!r}\nnext: saehooks fit --activations {arguments.to} --d-sae N --out FOLDER")
