"""What a few more tokens buy when they train on the divergence of logits, and when they train on as before.

    python recipes/kl_finetuning.py out/compare/arms/*                  # every trained arm of compare_architectures.py
    python recipes/kl_finetuning.py SAE_FOLDER --tokens 16000 --mix 0 0.5

Each SAE is measured on held-out text, copied, and each copy is trained on the same tokens in the same order: by
``objective="kl"`` with each share of the reconstruction in --mix, and by reconstruction alone, the control. Writes
table.md and table.csv.
"""

from __future__ import annotations

import argparse
import copy
import csv
from itertools import islice
from pathlib import Path

import torch
from compare_table import markdown_table

import saehooks as sh
from saehooks.demo.open import Opened, open_model
from saehooks.metrics import token_nmse
from saehooks.where import past_first

COLUMNS = ("sae", "objective", "mix", "l0", "token_nmse", "nmse", "ce_degradation", "kl", "ce_cut")


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", type=Path, nargs="+", help="folders of trained SAEs of one site")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a Hugging Face name")
    parser.add_argument("--at", default="blocks.15.hook_resid_post", help="the site")
    parser.add_argument("--tokens", type=int, default=80_000, help="tokens to train on")
    parser.add_argument("--skip-tokens", type=int, default=0, help="of the training text, before those")
    parser.add_argument("--mix", type=float, nargs="+", default=[0.5], help="shares of the SAE's own loss")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--sequences", type=int, default=4, help="in a step, of 256 tokens")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("out/kl"))
    return parser.parse_args()


def texts(opened: Opened, options: argparse.Namespace, split: str, tokens: int, skip: int = 0) -> list:
    shape = argparse.Namespace(context=256, sequences=options.sequences)
    batches = opened.batches(shape, split, None, None, skip + tokens)
    return list(islice(batches, skip // (256 * options.sequences), None))


def measured(opened: Opened, sae: sh.SAE, held_out: list, at: str) -> dict[str, float]:
    found = sh.measure(opened.model, sae, held_out, at, where=past_first)
    rows = torch.cat(list(sh.harvest(opened.model, held_out, at, where=past_first)))
    with torch.no_grad():
        by_token = token_nmse(rows, sae.frozen()(rows).recons)
    return {**found, "token_nmse": by_token}


def trained(opened: Opened, sae: sh.SAE, batches: list, options: argparse.Namespace, mix: float | None) -> sh.SAE:
    """A copy that was trained on: by the divergence with a share of the reconstruction, or by that alone (None)."""
    sae = copy.deepcopy(sae)
    settings = {"lr": options.lr, "warmup_steps": 5, "steps": len(batches), "decay": 0.5}
    how = {"objective": "reconstruction"} if mix is None else {"objective": "kl", "mix": mix}
    size = batches[0].shape[0] * (batches[0].shape[1] - 1)
    with sh.train(opened.model, sae, options.at, batch_size=size, buffer_rows=2 * size, **how, **settings):
        for batch in batches:
            with torch.no_grad():
                opened.model(batch)
    return sae


def main() -> None:
    options = settings()
    options.out.mkdir(parents=True, exist_ok=True)
    opened = open_model(options.model)
    held_out = texts(opened, options, "eval", options.eval_tokens)
    batches = texts(opened, options, "train", options.tokens, options.skip_tokens)
    rows = []
    for folder in options.saes:
        sae = sh.load(folder)
        before = measured(opened, sae, held_out, options.at)
        runs = [("before", None, before)]
        for mix in (None, *options.mix):
            name = "reconstruction" if mix is None else "kl"
            after = measured(opened, trained(opened, sae, batches, options, mix), held_out, options.at)
            runs.append((name, mix, after))
        for name, mix, found in runs:
            cut = 1 - found["ce_degradation"] / before["ce_degradation"]
            own = {"sae": folder.name, "objective": name, "mix": "" if mix is None else mix, "ce_cut": cut}
            rows.append({**{key: found[key] for key in COLUMNS if key in found}, **own})
            figures = " ".join(f"{key} {rows[-1][key]:.4f}" for key in ("l0", "token_nmse", "nmse", "ce_degradation"))
            print(f"{folder.name:32s} {name:15s} {own['mix']!s:4s} {figures}  CE cut {cut:.0%}", flush=True)
        write(rows, options.out)


def write(rows: list[dict], folder: Path, columns: tuple[str, ...] = COLUMNS) -> None:
    """Rows of figures as table.csv and table.md."""
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    values = ([row[name] for name in columns] for row in rows)
    cells = ([f"{value:.4f}" if isinstance(value, float) else str(value) for value in row] for row in values)
    (folder / "table.md").write_text(markdown_table(columns, cells))


if __name__ == "__main__":
    main()
