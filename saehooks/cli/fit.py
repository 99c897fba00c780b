"""`saehooks fit`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from saehooks.cli.arguments import MODELS, add_data, command, open_as_asked
from saehooks.cli.plan import Plan, plans
from saehooks.cli.settings import add_settings
from saehooks.errors import ConfigError
from saehooks.ranks import Ranks
from saehooks.training.losses import LossConfig
from saehooks.training.trainer import TrainConfig

FIT = (
    """\
examples:
  saehooks fit --model smollm2 --at blocks.15.hook_resid_post --d-sae 4608 --out saes/sparsemax
  saehooks fit --model smollm2 --at blocks.15.hook_resid_post --d-sae 4608 --out saes/topk \\
      --preset topk --k 32 --text mine.txt --eval-text held_out.txt
  saehooks fit --model tinyclip --at visual.blocks.4.hook_resid_post --d-sae 1024 --out saes/clip --images photos/
  saehooks fit ... --precision medium --model-dtype bfloat16 --batch-size 4096     fastest on a GPU
  saehooks fit ... --loss-aux-k 0.1 --betas 0.9 0.99 --buffer-rows 100000     every setting has an option
  saehooks fit --activations acts/15 --d-sae 4608 --out saes/mine             on what 'saehooks harvest' wrote
  saehooks fit --model smollm2 --saes grid.toml --out saes/grid               several SAEs, from the same forwards
  torchrun --nproc-per-node 8 --no-python saehooks fit ... --latent-ranks 8   a dictionary split over eight processes
  saehooks fit ... --resume           goes on after an interruption, bit for bit (on the CPU)

The first position of each text (an attention sink) is not trained on; of a picture every token is. Ctrl-C stops
after the current step and writes a checkpoint first; pressed twice, it stops at once.

grid.toml, a table for each SAE; what it leaves out is as the other options say:
  [small]
  at = "blocks.15.hook_resid_post"
  d_sae = 1024
  [topk]
  at = "blocks.9.hook_resid_post"
  d_sae = 4608
  preset = "topk"
  k = 32
  training = { lr = 0.001, seed = 1 }

"""
    + MODELS
)


def register(commands: Any) -> None:
    parser = command(commands, "fit", "train SAEs on the activations of a model", FIT, run)
    add = parser.add_argument
    add("--model", help="the model, see below")
    add("--activations", type=Path, metavar="FOLDER", help="in its place: what 'saehooks harvest' wrote")
    add("--at", help="the site, as 'saehooks sites MODEL' lists it")
    add("--head", type=int, help="one head of a per-head site")
    add("--out", type=Path, required=True, help="folder for the SAE and its checkpoints; for several, of folders")
    add("--d-sae", type=int, help="number of latents")
    add("--preset", metavar="NAME", help="an SAE of sh.presets by name: sparsemax, topk, jumprelu, ...")
    add("--dictionary", help="in place of a preset: concepts, linear or kron (concepts)")
    add("--activation", help="in place of a preset: sparsemax, topk, ... (sparsemax)")
    add("--k", type=int, help="latents per token, for topk and its kin")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the SAE, may be repeated")
    add("--saes", type=Path, metavar="FILE.toml", help="several SAEs from the same forwards, a table each, see above")
    add(
        "--latent-ranks", type=int, default=1, metavar="N", help="under torchrun: split the dictionary over N processes"
    )
    add_data(parser)
    add("--eval-text", type=Path, nargs="+", metavar="FILE", help="held-out text; the packaged passages by default")
    add("--eval-tokens", type=int, default=8192, help="at most so many held-out tokens (%(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add_settings(
        parser.add_argument_group("training", "Left out: the library's defaults."), TrainConfig, skip=("loss",)
    )
    add_settings(
        parser.add_argument_group("loss", "Left out: the terms that go with the SAE's activation."), LossConfig, "loss-"
    )


def run(arguments: argparse.Namespace) -> None:
    import saehooks as sh

    if (arguments.model is None) == (arguments.activations is None):
        raise ConfigError("give --model NAME, or --activations FOLDER that 'saehooks harvest' wrote")
    # What only one process meets, such as a file that it cannot read, every process is told.
    ranks = Ranks.joined(arguments.latent_ranks)
    model, made, data = ranks.agree(lambda: _opened(arguments))
    saes = {name: sae for name, (sae, _) in made.items()}
    options = {"out": arguments.out, "resume": arguments.resume, "progress": True, **data}
    options["latent_ranks"] = arguments.latent_ranks
    if arguments.saes is None:
        trainers = {"": sh.fit(model, saes[""], config=made[""][1], **options)}
    else:
        trainers = sh.fit(model, saes, config={name: config for name, (_, config) in made.items()}, **options)
    if not all(trainer.ranks.leads for trainer in trainers.values()):
        return
    for name, trainer in trainers.items():
        print(f"{name}{': ' if name else ''}{trainer!r}")
    first = next(iter(trainers))
    print(f"wrote {arguments.out}; next: saehooks measure {arguments.out / first} --model {arguments.model or 'NAME'}")


Opened = tuple[Any, dict[str, tuple[Any, TrainConfig]], dict[str, Any]]


def _opened(arguments: argparse.Namespace) -> Opened:
    """The model or its activations, the SAEs with how they are trained, and the batches."""
    import saehooks as sh

    wanted = plans(arguments)
    if arguments.activations is None:
        return _for_model(arguments, wanted)
    model = sh.Activations(arguments.activations)
    return model, {name: plan.make(model.d_in, arguments.device) for name, plan in wanted.items()}, {}


def _for_model(arguments: argparse.Namespace, wanted: dict[str, Plan]) -> Opened:
    """The model, the SAEs at its sites with how they are trained, and the batches."""
    from saehooks.hosts import host

    opened = open_as_asked(arguments)
    source = host(opened.model)
    made = {}
    for name, plan in wanted.items():
        if plan.at is None:
            raise ConfigError("where? Write --at SITE, one of those that 'saehooks sites MODEL' lists")
        site = source.site(plan.at, plan.head)
        if site.width is None:
            raise ConfigError(
                f"the width of '{site.name}' is not known before a forward pass; choose a site that lists one"
            )
        made[name] = plan.make(site.width, source.device)
    batches = opened.batches(arguments, "train", arguments.text, arguments.images, arguments.tokens)
    for sae, _ in made.values():
        sae.cfg.metadata["data"] = opened.source(arguments.text, arguments.images, "train", batches)
    data = {"batches": batches}
    if not opened.is_clip:
        data["eval_batches"] = opened.batches(arguments, "eval", arguments.eval_text, None, arguments.eval_tokens)
    return opened.model, made, data
