"""Run by test_ranks.py: trains small SAEs, alone and by several ranks, and keeps what became of them."""

import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from forked import run_ranks
from torch import nn

import saehooks as sh
from saehooks import ranks
from saehooks.training.losses import LossConfig

STEPS = 12
AUX = LossConfig(aux_k=1 / 32, dead_after=60)
NONE = LossConfig()
CELLS = {
    "sparsemax": ("concepts", "sparsemax", {}, {}),
    "linear sparsemax": ("linear", "sparsemax", {"normalize": True}, {}),
    "kron sparsemax": ("kron", "sparsemax", {}, {}),
    "sparsemax weights": ("concepts", "sparsemax", {"values": "weight"}, {}),
    "refined sparsemax": ("concepts", "sparsemax", {"refine": 1}, {}),
    "entmax": ("concepts", "entmax", {"alpha": 1.5}, {}),
    "entmax, learned": ("concepts", "entmax", {"alpha": 1.6, "learn_alpha": True, "values": "weight"}, {}),
    "relu": ("linear", "relu", {}, {}),
    "concepts relu": ("concepts", "relu", {}, {}),
    "gated": ("linear", "gated", {}, {}),
    "concepts gated": ("concepts", "gated", {}, {}),
    "jumprelu": ("linear", "jumprelu", {}, {}),
    "jumprelu, started": (
        "linear",
        "jumprelu",
        {"start_l0": 6, "bandwidth": 0.05},
        {"loss": LossConfig(l0=0.01, l0_target=4.0)},
    ),
    "kron jumprelu": ("kron", "jumprelu", {"start_l0": 6, "bandwidth": 0.05}, {}),
    "topk": ("linear", "topk", {"k": 4}, {"loss": NONE}),
    "kron topk": ("kron", "topk", {"k": 4}, {"loss": NONE}),
    "topk of magnitudes": ("linear", "topk", {"k": 4, "negative": "magnitude"}, {"loss": NONE}),
    "topk, dead latents": ("linear", "topk", {"k": 2}, {"loss": AUX}),
    "topk, mse": ("linear", "topk", {"k": 4}, {"loss": LossConfig(reconstruction="mse")}),
    "topk, refined": ("linear", "topk", {"k": 4, "refine": 2}, {"loss": NONE}),
    "topk, conjugate gradients": (
        "linear",
        "topk",
        {"k": 4, "refine": 2, "refine_method": "conjugate"},
        {"loss": NONE},
    ),
    "concepts, conjugate gradients": ("concepts", "sparsemax", {"refine": 2, "refine_method": "conjugate"}, {}),
    "topk, chosen again": (
        "linear",
        "topk",
        {"k": 6, "refine": 1, "reselect": 3},
        {"loss": LossConfig(first_pass=0.5)},
    ),
    "sparsemax, chosen again": ("concepts", "sparsemax", {"refine": 1, "reselect": 1.4, "key_scale": 0.5}, {}),
    "sparsemax, bounded steps": (
        "concepts",
        "sparsemax",
        {"refine": 2, "refine_rate": 2.0, "reselect": 1.4, "key_scale": 0.5, "refine_method": "bounded"},
        {},
    ),
    "topk, bounded steps": (
        "linear",
        "topk",
        {"k": 4, "refine": 2, "refine_rate": 2.0, "refine_method": "bounded"},
        {},
    ),
    "topk, prefixes": ("linear", "topk", {"k": 4}, {"loss": LossConfig(prefix=1.0, prefixes=(8, 40))}),
    "topk, silenced": ("linear", "topk", {"k": 4, "max_density": 0.2}, {"loss": NONE}),
    "batchtopk": ("concepts", "batchtopk", {"k": 4}, {"loss": AUX}),
    "kron batchtopk": ("kron", "batchtopk", {"k": 4}, {"loss": NONE}),
    "mutual choice": ("linear", "mutual_choice", {"k": 4}, {}),
    "feature choice": ("linear", "feature_choice", {"k": 4}, {}),
    "feature choice by zipf": ("concepts", "feature_choice", {"k": 4, "budgets": "zipf"}, {"loss": NONE}),
}


FEW = ["sparsemax", "jumprelu", "batchtopk", "feature choice"]
GRIDS = {
    "four": {"ranks": 4, "latents": 4, "cells": FEW[:1], "from": ["c1"], "checkpoint": "c4"},
    "latents": {
        "ranks": 2,
        "latents": 2,
        "cells": FEW,
        "from": ["c1", "c4"],
        "checkpoint": "c2",
        "wrong": True,
        "use": "sae four",
    },
    "both": {"ranks": 4, "latents": 2, "cells": list(CELLS), "from": ["c2"]},
    "rows": {"ranks": 2, "latents": 1, "cells": FEW, "from": ["c4"], "wrong": True},
}
"""In this order: later ones go on from checkpoints of earlier ones."""


def fresh(name, seed=0):
    dictionary, activation, settings, _ = CELLS[name]
    torch.manual_seed(seed)
    return sh.SAE(16, 64, dictionary, activation, track_density=True, **settings)


def training(name, steps):
    fast = {"batch_size": 32, "buffer_rows": 128, "warmup_steps": 2, "log_every": 2, "progress": False}
    return {**fast, "steps": steps, **CELLS[name][3]}


def model_and_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)).eval()
    return model, [torch.randint(0, 50, (4, 3 + i % 5)) for i in range(21)]


def rows():
    return torch.randn(4000, 16, generator=torch.Generator().manual_seed(1))


def kept(trainer, sae):
    state = {key: value.clone() for key, value in sae.state_dict().items()}
    return {"history": trainer.history, "state": state, "sent": trainer.ranks.sent, "rows": trainer.rows_seen}


def train_cells(names, steps, rank, options):
    """Every rank begins with other weights: those of the first are everybody's."""
    made = {}
    for name in names:
        sae = fresh(name, rank)
        trainer = sh.fit(rows(), sae, eval_batches=rows()[:200], **training(name, steps), **options)
        made[name] = kept(trainer, sae)
    return made


def train_on_a_model(folder, rank, options):
    """Rows come from the ranks' own forwards; the first rank alone writes."""
    model, batches = model_and_batches()
    sae = fresh("sparsemax", rank)
    return kept(sh.fit(model, sae, batches, "0", out=folder, **training("sparsemax", None), **options), sae)


def train_several(folder, rank, options):
    """Two SAEs at two sites from the same forwards, stopped after 4 steps and gone on with."""
    model, batches = model_and_batches()
    settings = {**training("sparsemax", None), "decay": 0.0}
    for steps in (4, None):
        saes = {"a": fresh("sparsemax", rank), "b": fresh("topk", rank)}
        for site, sae in zip("01", saes.values(), strict=True):
            sae.cfg.metadata["hook_name"] = site
        options_now = {**settings, "steps": steps, "out": folder, "resume": steps is None, **options}
        trainers = sh.fit(model, saes, batches, **options_now)
    return {name: kept(trainer, saes[name]) for name, trainer in trainers.items()}


def go_on(folder, rank, steps, options):
    """From the checkpoint in a folder, whichever number of ranks wrote it."""
    sae = fresh("topk", rank)
    settings = {**training("topk", steps), "decay": 0.0}
    return kept(sh.fit(rows(), sae, out=folder, resume=True, **settings, **options), sae)


def count_bytes(rank, options):
    """That one rank gives to collectives in a step without a record."""
    sent = []
    for steps in (5, 10):
        settings = {**training("topk", steps), "log_every": 1000}
        sent.append(sh.fit(rows(), fresh("topk", rank), **settings, **options).ranks.sent)
    return (sent[1] - sent[0]) / 5


def what_goes_wrong(folder, rank, options):
    """What each rank is told, for trainings that cannot be made: by what is wrong with them, often on one rank only."""
    plain = {**training("topk", 5), **options}
    latents = options.get("latent_ranks", 1)
    other = rows() if rank == 0 else rows() + 1
    model = model_and_batches()[0]
    frozen = fresh("topk").requires_grad_(rank == 0)
    wrong = {
        "another rate": lambda: sh.fit(rows(), fresh("topk"), **{**plain, "lr": 1e-3 * (1 + rank)}),
        "another SAE": lambda: sh.fit(rows(), sh.SAE(16, 64, "linear", "topk", k=3 + rank), **plain),
        "other activations": lambda: sh.fit(other, fresh("topk"), **plain),
        "fewer activations": lambda: sh.fit(rows()[: 4000 - 2000 * rank], fresh("topk"), **{**plain, "steps": 500}),
        "altered": lambda: sh.fit(sh.Activations(folder / f"acts {rank}"), fresh("topk"), **{**plain, "steps": 500}),
        "no column": lambda: sh.fit(model, fresh("topk"), texts("words" if rank else "text"), "0", **plain),
        "tokenizer": lambda: sh.fit(model, fresh("topk"), texts("text", 50 * rank), "0", **plain),
        "too few": lambda: sh.fit(rows()[:20], fresh("topk"), **plain),
        "another split": lambda: sh.fit(rows(), fresh("topk"), **{**plain, "latent_ranks": latents if rank else 1}),
        "no such setting": lambda: sh.fit(rows(), fresh("topk"), **plain, **({"learning_rate": 1.0} if rank else {})),
        "frozen": lambda: sh.fit(rows(), frozen, **plain),
        "several": lambda: sh.fit(rows(), {"a": fresh("topk"), **({"b": fresh("topk")} if rank else {})}, **plain),
        "on_record": lambda: sh.fit(rows(), fresh("topk"), on_record=fails, **plain),
    }
    return {name: what_was_told(make) for name, make in wrong.items()}


def what_was_told(make):
    try:
        make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fails(record):
    raise OSError(28, "No space left on device")


class Letters:
    """A tokenizer of single letters."""

    bos_token_id, pad_token_id, name_or_path = 0, 0, "letters"

    def __init__(self, first):
        self.first = first

    def __call__(self, texts, **options):
        return {"input_ids": [[self.first + ord(letter) % 50 for letter in text] for text in texts]}


def texts(column, first=0):
    rows = [{column: f"some words of text number {i}"} for i in range(200)]
    return sh.TokenBatches(Letters(first), rows, column="text", context=9, batch_size=4)


def activations(folder):
    """The same activations for two ranks, those of the second altered in the last block after they were written."""
    model, batches = model_and_batches()
    sh.harvest(model, batches * 8, "0", to=folder / "acts 0", shard_bytes=64_000)
    shutil.copytree(folder / "acts 0", folder / "acts 1")
    last = sorted((folder / "acts 1").glob("shard-*"))[-1]
    data = bytearray(last.read_bytes())
    data[-3] ^= 1
    last.write_bytes(data)


@contextmanager
def files_end_at(size):
    """No file of this process becomes longer: what a full disk is to a rank that has a disk of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(folder, rank, options):
    """What each rank is told when one cannot write its part of the fifth checkpoint, and the SAE of going on later."""

    class Parts:
        holds_activations = True

        def __init__(self, at_last):
            self.at_last = at_last

        def __iter__(self):
            for number, part in enumerate(rows()[:960].split(40)):
                if number == 16:
                    self.at_last()
                yield part

    def fit(sae, then, **more):
        settings = {**training("topk", 24), "checkpoint_every": 4, **options}
        return sh.fit(Parts(then), sae, **settings, **more)

    victim = 1 if options else 0  # of ranks that split the rows, the first one writes alone
    with files_end_at(4096) as limit:
        told = what_was_told(lambda: fit(fresh("topk", rank), limit if rank == victim else int, out=folder))
    torch.distributed.barrier()  # the first rank has cleared up
    left = sorted(file.name for file in folder.iterdir())
    again, whole = fresh("topk", rank), fresh("topk", rank)
    begun = fit(again, int, out=folder, resume=True).history
    wanted = fit(whole, int).history
    return {
        "told": told,
        "left": left,
        "same": all(torch.equal(t, whole.state_dict()[name]) for name, t in again.state_dict().items()),
        "steps": [[record["step"] for record in history] for history in (begun, wanted)],
    }


def use(sae):
    """What the verbs, `measure` and gradients make of an SAE."""
    model, batches = model_and_batches()
    tokens, made = batches[4], {}
    for name, block in {
        "splice": lambda: sh.splice(model, sae),
        "ablate": lambda: sh.ablate(model, sae, [5, 40, 41]),
        "clamp": lambda: sh.clamp(model, sae, {3: 2.0, 60: -1.0}),
        "function": lambda: sh.attach(model, sae, edits=[sh.edits.keep_top(2)]),
    }.items():
        with torch.no_grad(), block() as trace:
            made[name] = model(tokens)
        made[f"{name}, codes"] = trace.codes.dense()
    made["measure"] = sh.measure(model, sae, batches)
    x = rows()[:40].clone().requires_grad_()
    recons, codes = sae(x)
    codes.values.retain_grad()
    (recons * torch.linspace(-1, 1, 16)).sum().backward()
    made["gradient"], made["gradient of codes"] = x.grad, codes.with_values(codes.values.grad).dense()
    made["directions"] = sae.directions([1, 33, 62])
    return made


def run(name, folder, rank):
    """What one rank of a grid keeps of what it was asked for."""
    task = GRIDS[name]
    options = {} if task["latents"] == 1 else {"latent_ranks": task["latents"]}
    made = train_cells(task["cells"], STEPS, rank, options)
    made["model"] = train_on_a_model(folder / f"sae {name}", rank, options)
    made["bytes"] = count_bytes(rank, options)
    if task.get("wrong"):
        made["several"] = train_several(folder / f"several {name}", rank, options)
    if task.get("wrong"):
        made["wrong"] = what_goes_wrong(folder, rank, options)
        made["full disk"] = full_disk(folder / f"full {name}", rank, options)
    if "use" in task:
        made["use"] = use(ranks.load(folder / task["use"], task["latents"]))
        made["use split"] = use(ranks.split(sh.load(folder / task["use"])))
    for before in task["from"]:
        made[f"from {before}"] = go_on(folder / before / name, rank, 24, options)
    if "checkpoint" in task:
        go_on(folder / task["checkpoint"] / "made", rank, 12, options)
    torch.save(made, folder / f"{name}.{rank}")


def run_alone(folder):
    """All cells by one process, and a checkpoint to go on from."""
    made = train_cells(list(CELLS), STEPS, 0, {})
    made["model"] = train_on_a_model(folder / "alone", 0, {})
    made["several"] = train_several(folder / "several", 0, {})
    go_on(folder / "c1" / "made", 0, 12, {})
    shutil.copytree(folder / "c1" / "made", folder / "kept")
    made["24 steps"] = go_on(folder / "kept", 0, 24, {})
    torch.save(made, folder / "alone.0")


def main(folder):
    run_alone(folder)
    activations(folder)
    for name, grid in GRIDS.items():
        for before in grid["from"]:
            shutil.copytree(folder / before / "made", folder / before / name)
        statuses, said = run_ranks(grid["ranks"], lambda rank, name=name: run(name, folder, rank), folder, name)
        if any(statuses):
            sys.exit("\n".join(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
