"""Run by test_ranks.py, alone or under torchrun: trains small SAEs and keeps what became of them."""

import os
import sys
from pathlib import Path

import torch
from torch import nn

import saehooks as sh
from saehooks.training.losses import LossConfig

torch.set_num_threads(1)
AUX = LossConfig(aux_k=1 / 32, dead_after=150)
CELLS = {
    "sparsemax": ("concepts", "sparsemax", {}, {}),
    "linear sparsemax": ("linear", "sparsemax", {"normalize": True}, {}),
    "entmax": ("concepts", "entmax", {"alpha": 1.5}, {}),
    "relu": ("linear", "relu", {}, {}),
    "gated": ("linear", "gated", {}, {}),
    "jumprelu": ("linear", "jumprelu", {}, {}),
    "topk": ("linear", "topk", {"k": 4}, {"loss": LossConfig()}),
    "batchtopk": ("concepts", "batchtopk", {"k": 4}, {"loss": LossConfig()}),
    "topk, dead latents": ("linear", "topk", {"k": 2}, {"loss": AUX}),
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
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16)).eval()
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


def disagree(rank, options):
    """What a rank is told that was asked for another learning rate."""
    try:
        sh.fit(rows(), fresh("topk"), lr=1e-3 * (1 + rank), **training("topk", 5), **options)
    except sh.errors.ConfigError as error:
        return str(error)
    return "nothing"


def main(out: Path, latents: int, steps: int, names: list[str]) -> None:
    options = {} if latents == 1 else {"latent_ranks": latents}
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    made = train_cells(names, steps, rank, options)
    made["model"] = train_on_a_model(out.parent / "sae", rank, options)
    if size > 1:
        made |= {"bytes": count_bytes(rank, options), "disagree": disagree(rank, options)}
    if latents > 1:
        made["from one"] = go_on(out.parent.parent / "checkpoint of one", rank, 24, options)
        go_on(out.parent / "checkpoint of several", rank, 12, options)
    torch.save(made, f"{out}.{rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(";"))
