"""Run by test_ranks.py, alone or under torchrun: trains small SAEs and keeps what became of them."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import saehooks as sh
from saehooks import ranks
from saehooks.training.losses import LossConfig

torch.set_num_threads(1)
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
    "topk, chosen again": (
        "linear",
        "topk",
        {"k": 6, "refine": 1, "reselect": 3},
        {"loss": LossConfig(first_pass=0.5)},
    ),
    "sparsemax, chosen again": ("concepts", "sparsemax", {"refine": 1, "reselect": 1.4, "key_scale": 0.5}, {}),
    "topk, prefixes": ("linear", "topk", {"k": 4}, {"loss": LossConfig(prefix=1.0, prefixes=(8, 40))}),
    "topk, silenced": ("linear", "topk", {"k": 4, "max_density": 0.2}, {"loss": NONE}),
    "batchtopk": ("concepts", "batchtopk", {"k": 4}, {"loss": AUX}),
    "kron batchtopk": ("kron", "batchtopk", {"k": 4}, {"loss": NONE}),
    "mutual choice": ("linear", "mutual_choice", {"k": 4}, {}),
    "feature choice": ("linear", "feature_choice", {"k": 4}, {}),
    "feature choice by zipf": ("concepts", "feature_choice", {"k": 4, "budgets": "zipf"}, {"loss": NONE}),
}


def fresh(name, seed=0):
    dictionary, activation, settings, _ = CELLS[name]
    torch.manual_seed(seed)
    return sh.SAE(16, 64, dictionary, activation, track_density=True, **settings)


def training(name, steps):
    fast = {"batch_size": 32, "buffer_rows": 128, "warmup_steps": 2, "log_every": 1, "progress": False}
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


def what_goes_wrong(rank, options):
    """What each rank is told, for trainings that cannot be made: by what is wrong with them."""
    plain = {**training("topk", 5), **options}
    latents = options.get("latent_ranks", 1)
    other = rows() if rank == 0 else rows() + 1
    unreadable = Breaks() if rank == 1 else Whole()
    wrong = {
        "another rate": lambda: sh.fit(rows(), fresh("topk"), **{**plain, "lr": 1e-3 * (1 + rank)}),
        "another SAE": lambda: sh.fit(rows(), sh.SAE(16, 64, "linear", "topk", k=3 + rank), **plain),
        "other activations": lambda: sh.fit(other, fresh("topk"), **plain),
        "fewer activations": lambda: sh.fit(rows()[: 4000 - 2000 * rank], fresh("topk"), **{**plain, "steps": 500}),
        "unreadable": lambda: sh.fit(unreadable, fresh("topk"), **plain),
        "too few": lambda: sh.fit(rows()[:20], fresh("topk"), **plain),
        "another split": lambda: sh.fit(rows(), fresh("topk"), **{**plain, "latent_ranks": latents if rank else 1}),
    }
    told = {}
    for name, make in wrong.items():
        try:
            make()
            told[name] = "nothing"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


class Whole:
    """Activations of one's own, in two parts."""

    holds_activations = True

    def __iter__(self):
        yield rows()[:200]
        yield rows()[200:400]


class Breaks(Whole):
    def __iter__(self):
        yield rows()[:200]
        raise sh.errors.FormatError("shard-000001.safetensors was cut short")


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


def run(task, folder, rank, size, options):
    """What one process keeps of what it was asked for."""
    made = train_cells(task["cells"], task["steps"], rank, options)
    if "save" in task:
        made["model"] = train_on_a_model(folder / task["save"], rank, options)
    if size > 1:
        made["bytes"] = count_bytes(rank, options)
    if task.get("wrong"):
        made["wrong"] = what_goes_wrong(rank, options)
    if "use" in task:
        made["use"] = use(ranks.load(folder / task["use"], task["latents"]))
        made["use split"] = use(ranks.split(sh.load(folder / task["use"])))
    for name in task.get("from", ()):
        made[f"from {name}"] = go_on(folder / name / task["name"], rank, 24, options)
    if "checkpoint" in task:
        go_on(folder / task["checkpoint"], rank, 12, options)
    return made


def main(told: str) -> None:
    task = json.loads(told)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    options = {} if task["latents"] == 1 else {"latent_ranks": task["latents"]}
    made = run(task, Path(task["folder"]), rank, size, options)
    torch.save(made, Path(task["folder"], f"{task['name']}.{rank}"))


if __name__ == "__main__":
    main(sys.argv[1])
