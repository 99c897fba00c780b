"""`saehooks measure`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext, redirect_stdout
from typing import Any

from saehooks.cli.arguments import MODELS, add_data, command, open_as_asked

MEASURE = (
    """\
examples:
  saehooks measure saes/sparsemax --model smollm2 --tokens 8192
  saehooks measure saes/sparsemax --model smollm2 --text held_out.txt --json

Each batch runs clean, with the reconstruction at the site, and with zeros there, at the positions where the SAE was
trained. Texts default to the packaged WikiText-2 passages, images to the packaged photos.

"""
    + MODELS
)


def register(commands: Any) -> None:
    parser = command(commands, "measure", "measure what splicing an SAE into a model costs it", MEASURE, run)
    parser.add_argument("sae", help="folder or hub id of the SAE")
    parser.add_argument("--model", required=True, help="the model, see below")
    parser.add_argument("--at", help="the site; the SAE's own by default")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_data(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch

    import saehooks as sh
    from saehooks.evaluation import measure
    from saehooks.hosts import host

    # With --json standard output carries nothing else, whatever a library prints while it loads a model.
    with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
        opened = open_as_asked(arguments)
        source = host(opened.model)
        sae = sh.load(arguments.sae, device=source.device)
        packaged = opened.is_clip and arguments.images is None
        options = opened.zero_shot() if packaged else {}
        batches = opened.batches(arguments, "eval", arguments.text, arguments.images, arguments.tokens or 8192)
        run = opened.model.encode_image if opened.is_clip else opened.model
        live = False if arguments.json else None
        with torch.no_grad(), measure(opened.model, sae, arguments.at, live=live, **options) as figures:
            for batch in batches:
                run(source.to_device(batch))
    print(json.dumps(figures.summary(), indent=1) if arguments.json else figures)
