"""What the paper leaves open: are latents found again, does training converge, what do strange inputs do?

    python recipes/stability.py                                   # SmolLM2, d_sae 1536, 200 steps a run
    python recipes/stability.py --stream out/compare/stream       # activations kept by compare_architectures.py

Each cell is trained with two seeds, and with three learning rates. Writes stability.md with three tables:

- stability: the share of live latents whose best match in the other seed's SAE has a cosine above 0.7, by direction and
  by where they fire (cosine of their codes over held-out tokens);
- convergence: NMSE by token, L0 and dead latents along each run;
- extreme inputs: how many latents noise, constants, one token repeated and norms 100 times the median use, and how well
  they are reconstructed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from compare_table import markdown_table
from torch import Tensor

import saehooks as sh
from saehooks import presets
from saehooks.demo.open import open_model
from saehooks.metrics import token_nmse
from saehooks.training.trainer import TrainConfig, Trainer

CELLS = {
    "topk": {"k": 32},
    "batchtopk": {"k": 32},
    "one_pass_sparsemax": {},
    "sparsemax": {},
}
MATCH = 0.7
"""Cosine from which two latents are the same."""
POINTS = 4
"""Records along a run."""


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or a Hugging Face name")
    parser.add_argument("--at", default="blocks.15.hook_resid_post", help="the site")
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--stream", type=Path, help="folder of train-*.npy and eval-*.npy, instead of the model's own")
    parser.add_argument("--out", type=Path, default=Path("out/stability"))
    return parser.parse_args()


def activations(options: argparse.Namespace, opened, split: str, tokens: int) -> Tensor:
    """(n, d_in) float32 of one split."""
    if options.stream is not None:
        files = sorted(options.stream.glob(f"{split}-*.npy"))
        return torch.cat([torch.from_numpy(np.load(file)) for file in files])[:tokens].float()
    batches = opened.batches(argparse.Namespace(context=256, sequences=8), split, None, None, tokens)
    return torch.cat(list(sh.harvest(opened.model, batches, options.at)))


def trained(cell: str, rows: Tensor, held_out: Tensor, lr: float, seed: int, options: argparse.Namespace):
    """An SAE, and its records along the way."""
    torch.manual_seed(seed)
    sae = presets.PRESETS[cell](rows.shape[1], options.d_sae, **CELLS[cell])
    config = TrainConfig(lr=lr, batch_size=options.batch_size, steps=options.steps, warmup_steps=30, seed=seed)
    trainer, order = Trainer(sae, config), np.random.default_rng(seed)
    sae.initialise(rows[order.permutation(len(rows))[:8192]])
    records = []
    for step in range(options.steps):
        trainer.step(rows[order.choice(len(rows), options.batch_size, replace=False)])
        if (step + 1) % (options.steps // POINTS) == 0:
            records.append({"step": step + 1, **score(sae, held_out)})
    return sae.frozen(), records


@torch.no_grad()
def score(sae: sh.SAE, rows: Tensor) -> dict[str, float]:
    recons, codes = sae.frozen()(rows)
    dead = int((codes.counts() == 0).sum())
    return {"token_nmse": token_nmse(rows, recons), "l0": float(codes.sizes.double().mean()), "dead": dead}


@torch.no_grad()
def found_again(one: sh.SAE, other: sh.SAE, rows: Tensor) -> dict[str, float]:
    """Shares of the live latents of one SAE with a match in another, by direction and by where they fire."""
    codes = [sae.encode(rows) for sae in (one, other)]
    live = [codes_of.counts() > 0 for codes_of in codes]
    directions = [unit(sae.directions(alive.nonzero()[:, 0])) for sae, alive in zip((one, other), live, strict=True)]
    firing = [unit(codes_of.dense()[:, alive].T) for codes_of, alive in zip(codes, live, strict=True)]
    by_direction = (directions[0] @ directions[1].T).amax(1) > MATCH
    by_firing = (firing[0] @ firing[1].T).amax(1) > MATCH
    return {"live": int(live[0].sum()), "by direction": float(by_direction.float().mean()),
            "by firing": float(by_firing.float().mean())}  # fmt: skip


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def extremes(rows: Tensor, repeated: Tensor) -> dict[str, Tensor]:
    """Inputs nobody trains on, (256, d_in) each."""
    draw = torch.Generator().manual_seed(0)
    noise, norm = torch.randn(256, rows.shape[1], generator=draw), rows.norm(dim=1).median()
    return {
        "held-out tokens": rows[:256],
        "noise of the median norm": norm * unit(noise),
        "noise of the data's covariance": rows.mean(0) + noise @ torch.linalg.cholesky(jittered(rows)).T,
        "one constant": torch.full_like(noise, float(norm) / rows.shape[1] ** 0.5),
        "norms 100 times": 100 * rows[:256],
        "one token repeated": repeated[:256],
    }


def jittered(rows: Tensor) -> Tensor:
    covariance = torch.cov(rows.T)
    return covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))


@torch.no_grad()
def repeated_token(opened, options: argparse.Namespace) -> Tensor:
    tokens = torch.full((2, 256), 260)
    return torch.cat(list(sh.harvest(opened.model, [tokens], options.at)))


def table(rows: list[dict]) -> str:
    cells = ([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)
    return markdown_table(rows[0], cells)


def main() -> None:
    options = settings()
    options.out.mkdir(parents=True, exist_ok=True)
    opened = open_model(options.model)
    rows = activations(options, opened, "train", options.tokens)
    held_out = activations(options, opened, "eval", options.eval_tokens)
    strange = extremes(held_out, repeated_token(opened, options))
    stability, convergence, inputs = [], [], []
    for cell in options.cells:
        middle = options.rates[len(options.rates) // 2]
        saes = []
        for lr, seed in [*((lr, 0) for lr in options.rates), (middle, 1)]:
            sae, records = trained(cell, rows, held_out, lr, seed, options)
            convergence += [{"cell": cell, "lr": lr, "seed": seed, **record} for record in records]
            if lr == middle:
                saes.append(sae)
            print(cell, lr, seed, records[-1], flush=True)
        last = [r for r in convergence if r["cell"] == cell and r["lr"] == middle and r["step"] == options.steps]
        own = {"L0": last[0]["l0"], "L0 of seed 1": last[1]["l0"]}
        stability.append({"cell": cell, **found_again(*saes, held_out), **own})
        for name, x in strange.items():
            with torch.no_grad():
                recons, codes = saes[0](x)
            sizes = codes.sizes.double()
            inputs.append({"cell": cell, "input": name, "L0": float(sizes.mean()), "most": int(sizes.max()),
                           "NMSE by token": token_nmse(x, recons)})  # fmt: skip
        report = "\n".join(
            [
                "## Does another seed find the same latents?\n",
                table(stability),
                "## Does training converge?\n",
                table(convergence),
                "## What do strange inputs do?\n",
                table(inputs),
            ]
        )
        (options.out / "stability.md").write_text(report)
    print(f"wrote {options.out / 'stability.md'}")


if __name__ == "__main__":
    main()
