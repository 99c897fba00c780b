"""`saehooks fit`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from saehooks.cli.arguments import MODELS, add_data, command, open_as_asked
from saehooks.cli.settings import add_settings, given_settings
from saehooks.errors import ConfigError
from saehooks.training.losses import LossConfig, default_loss
from saehooks.training.trainer import TrainConfig

FIT = (
    """\
examples:
  saehooks fit --model smollm2 --at blocks.15.hook_resid_post --d-sae 4608 --out saes/sparsemax
  saehooks fit --model smollm2 --at blocks.15.hook_resid_post --d-sae 4608 --out saes/topk \\
      --dictionary linear --activation topk --k 32 --text mine.txt --eval-text held_out.txt
  saehooks fit --model tinyclip --at visual.blocks.4.hook_resid_post --d-sae 1024 --out saes/clip --images photos/
  saehooks fit ... --precision medium --model-dtype bfloat16 --batch-size 4096     fastest on a GPU
  saehooks fit ... --loss-aux-k 0.1 --betas 0.9 0.99 --buffer-rows 100000     every setting has an option
  saehooks fit ... --resume           goes on after an interruption, bit for bit (on the CPU)

The first position of each text (an attention sink) is not trained on; of a picture every token is. Ctrl-C stops
after the current step and writes a checkpoint first; pressed twice, it stops at once.

"""
    + MODELS
)


def register(commands: Any) -> None:
    parser = command(commands, "fit", "train an SAE on the activations of one site of a model", FIT, run)
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
    add_data(parser)
    add("--eval-text", type=Path, nargs="+", metavar="FILE", help="held-out text; the packaged passages by default")
    add("--eval-tokens", type=int, default=8192, help="at most so many held-out tokens (%(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add_settings(
        parser.add_argument_group("training", "Left out: the library's defaults, which stand behind."),
        TrainConfig,
        skip=("loss",),
    )
    add_settings(
        parser.add_argument_group("loss", "Left out: the terms that go with the SAE's activation."), LossConfig, "loss-"
    )


def run(arguments: argparse.Namespace) -> None:
    import torch

    import saehooks as sh
    from saehooks.hosts import host

    opened = open_as_asked(arguments)
    source = host(opened.model)
    site = source.site(arguments.at, arguments.head)
    if site.width is None:
        raise ConfigError(
            f"the width of '{site.name}' is not known before a forward pass; choose a site that lists one"
        )
    settings = dict(_setting(one) for one in arguments.set) | ({} if arguments.k is None else {"k": arguments.k})
    config = TrainConfig(**given_settings(arguments, TrainConfig))
    torch.manual_seed(config.seed)
    sae = sh.SAE(site.width, arguments.d_sae, arguments.dictionary, arguments.activation, **settings).to(source.device)
    if loss := given_settings(arguments, LossConfig, "loss-"):
        config = replace(config, loss=replace(default_loss(sae), **loss))
    batches = opened.batches(arguments, "train", arguments.text, arguments.images, arguments.tokens)
    sae.cfg.metadata["data"] = opened.source(arguments.text, arguments.images, "train") | {"batches": repr(batches)}
    held_out = None
    if not opened.is_clip:
        held_out = opened.batches(arguments, "eval", arguments.eval_text, None, arguments.eval_tokens)
    trainer = sh.fit(
        opened.model,
        sae,
        batches,
        arguments.at,
        head=arguments.head,
        out=arguments.out,
        resume=arguments.resume,
        eval_batches=held_out,
        config=config,
        progress=True,
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
