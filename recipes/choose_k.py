"""What K should a TopK SAE have at this site? Ask the support sizes of a sparsemax SAE, then check.

    python recipes/choose_k.py                                      # SmolLM2, layer 15; about half an hour on two cores
    python recipes/choose_k.py --sae saes/mine                      # an SAE you have: only TopK is trained
    python recipes/choose_k.py --smoke

Sparsemax chooses how many latents each token needs; their distribution suggests one K for all tokens. The suggestion
is the mean (TopK then spends the same number of latents in total); the spread says what one K for all gives away.
The check trains TopK at that K and at 32 on the same activations for the same number of steps. Writes choose_k.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import saehooks as sh
from saehooks import presets
from saehooks.demo.open import open_model
from saehooks.metrics import token_nmse
from saehooks.streams import harvest
from saehooks.training.trainer import TrainConfig, Trainer


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--at", default="blocks.15.hook_resid_post")
    parser.add_argument("--sae", type=Path, help="a trained sparsemax SAE; trained here if not given")
    parser.add_argument("--d-sae", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--compare-k", type=int, default=32, help="the K that is usually taken")
    parser.add_argument("--out", type=Path, default=Path("out/choose_k"))
    parser.add_argument("--smoke", action="store_true")
    chosen = parser.parse_args()
    if chosen.smoke:
        chosen.d_sae, chosen.tokens, chosen.eval_tokens, chosen.steps = 768, 8192, 2048, 30
    return chosen


def rows_of(opened, options: argparse.Namespace, split: str, tokens: int) -> torch.Tensor:
    batches = opened.batches(argparse.Namespace(context=256, sequences=8), split, None, None, tokens)
    return torch.cat(list(harvest(opened.model, batches, options.at))).float()


def trained(sae: sh.SAE, rows: torch.Tensor, options: argparse.Namespace) -> Trainer:
    """The same batches in the same order for every SAE."""
    size = options.batch_size
    trainer = Trainer(sae, TrainConfig(steps=options.steps, batch_size=size, buffer_rows=2 * size))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator)
    sae.initialise(rows[order[:8192]])
    for step in range(options.steps):
        start = step * size % (len(rows) - size + 1)
        trainer.step(rows[order[start : start + size]])
        if (step + 1) % 50 == 0:
            print(trainer, flush=True)
    sae.eval()
    return trainer


@torch.no_grad()
def line(name: str, trainer: Trainer, held_out: torch.Tensor) -> str:
    found = trainer.evaluate(held_out)
    recons = torch.cat([trainer.sae(part).recons for part in held_out.split(4096)])
    spread = f"{found['l0_q05']}/{found['l0_median']}/{found['l0_q95']}"
    errors = f"{token_nmse(held_out, recons):.4f} | {found['nmse']:.4f} | {found['fvu']:.4f}"
    return f"| {name} | {errors} | {found['l0']:.1f} ({spread}) | {found['dead']} |"


def main() -> None:
    options = settings()
    opened = open_model(options.model)
    rows = rows_of(opened, options, "train", options.tokens)
    held_out = rows_of(opened, options, "eval", options.eval_tokens)
    d_in = rows.shape[1]
    if options.sae is None:
        torch.manual_seed(0)
        judge = trained(presets.one_pass_sparsemax_sae(d_in, options.d_sae), rows, options)
    else:
        judge = Trainer(sh.load(options.sae))
    found = judge.evaluate(held_out)
    with torch.no_grad():
        sizes = torch.cat([judge.sae.frozen().encode(part).sizes for part in held_out.split(4096)]).double()
    suggested = max(1, round(found["l0"]))
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    quantiles = "/".join(f"{q:.0f}" for q in sizes.quantile(at).tolist())
    lines = [
        f"{options.model}, {options.at}, d_sae {judge.sae.d_sae}: {len(rows)} tokens, {options.steps} steps "
        f"of {options.batch_size}; held out {len(held_out)} tokens.",
        "",
        f"Support sizes (5/25/50/75/95%): {quantiles}, mean {found['l0']:.1f}. Suggested K: **{suggested}**. "
        f"Share of tokens that would like more: {float((sizes > suggested).double().mean()):.0%}; "
        f"more than {options.compare_k}: {float((sizes > options.compare_k).double().mean()):.0%}.",
        "",
        "| | NMSE by token | NMSE | FVU | L0 (5/50/95%) | dead |",
        "|---|---|---|---|---|---|",
        line("sparsemax", judge, held_out),
    ]
    for k in dict.fromkeys((suggested, options.compare_k)):
        torch.manual_seed(0)
        trainer = trained(presets.topk_sae(d_in, judge.sae.d_sae, k=k), rows, options)
        lines.append(line(f"TopK, k = {k}", trainer, held_out))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "choose_k.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"\nwrote {options.out / 'choose_k.md'}")


if __name__ == "__main__":
    main()
