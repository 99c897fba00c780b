"""What refinement gives an SAE that was trained without it: the same latents, better values, nothing trained.

    python recipes/refine_afterwards.py SAE_FOLDER [SAE_FOLDER ...]          # of SmolLM2, at layer 15
    python recipes/refine_afterwards.py SAE_FOLDER --model gpt2 --at blocks.8.hook_resid_pre

`sae.refined(steps)` makes so many steps of conjugate gradients on the latents that a token has selected. Measured on
held-out text. Writes table.md and table.csv to ``--out``. (For CLIP: ``clip_topn_classification.py --afterwards 3``.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kl_finetuning import measured, texts, write

import saehooks as sh
from saehooks.demo.open import open_model

COLUMNS = ("sae", "steps", "l0", "token_nmse", "nmse", "ce_degradation")


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", type=Path, nargs="+", help="folders of trained SAEs of one site")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a Hugging Face name")
    parser.add_argument("--at", default="blocks.15.hook_resid_post", help="the site")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sequences", type=int, default=4, help="in a batch, of 256 tokens")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("out/refine_afterwards"))
    return parser.parse_args()


def main() -> None:
    options = settings()
    opened = open_model(options.model)
    held_out = texts(opened, options, "eval", options.eval_tokens)
    options.out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, object]] = []
    for folder in options.saes:
        plain = sh.load(folder)
        for steps in (0, *options.steps):
            figures = measured(opened, plain.refined(steps) if steps else plain, held_out, options.at)
            found.append({"sae": folder.name, "steps": steps, **{name: figures[name] for name in COLUMNS[2:]}})
            print(found[-1], flush=True)
            write(found, options.out, COLUMNS)


if __name__ == "__main__":
    main()
