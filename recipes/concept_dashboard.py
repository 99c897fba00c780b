"""Concept dashboard: what some latents of a language model's SAE stand for, as one HTML page without a script.

    python recipes/concept_dashboard.py                           # 12 latents spread over the range of densities
    python recipes/concept_dashboard.py --latents 1204 77 --tokens 100000
    python recipes/concept_dashboard.py --text mine.txt --out mine.html

For each latent: its density, the spread of its values, the contexts in which it is strongest (each from another
sequence, shaded by its value) and some drawn at random, the next tokens its decoder direction raises and lowers, and
the latents like it. All of it is what ``index[latent]`` shows in a notebook; `latents.py` writes the page of every
latent, to search and click. Position 0, an attention sink, is left out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import saehooks as sh
from saehooks.demo import text as packaged_text
from saehooks.demo.data import ASSETS
from saehooks.demo.models import smollm2
from saehooks.show import html
from saehooks.streams import read_text

CONTEXTS, WINDOW = 8, (14, 6)
"""Contexts shown of a latent, and tokens before and after the place where it is strong."""


def surveyed(model, sae: sh.SAE, batches) -> sh.LatentIndex:
    """What every latent stands for, over a text; position 0 is left out."""
    return sh.survey(model, sae, batches, where=slice(1, None), contexts=CONTEXTS, sampled=CONTEXTS, window=WINDOW)


def spread(counts: torch.Tensor, n: int, at_least: int = 20) -> list[int]:
    """n latents evenly spaced in order of density, among those that fired at least so often."""
    order = counts.argsort(stable=True)
    order = order[counts[order] >= at_least]
    places = torch.linspace(0, len(order) - 1, min(n, len(order))).long()
    return order[places].tolist()


def page(index: sh.LatentIndex, sae: sh.SAE, latents: list[int], lead: str, footer: str) -> str:
    """One HTML page, a section for each latent."""
    fired = int((index.counts > 0).sum())
    about = html.Section("The SAE on this text").add(
        html.paragraph(
            f"{fired:,} of {sae.d_sae:,} latents fired on {index.positions:,} tokens; "
            f"{int(index.counts.sum()) / index.positions:.1f} latents on a token."
        )
    )
    sections = [html.Section(f"Latent {i}").add(index[i]._repr_html_()) for i in latents]
    return html.page("Concept dashboard", [about, *sections], lead=lead, footer=footer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, default=ASSETS / "sae-smollm2-l15")
    parser.add_argument("--latents", type=int, nargs="*", help="by default 12 spread over the range of densities")
    parser.add_argument("--text", type=Path, nargs="*", help="files; by default the packaged WikiText-2 passages")
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "concept_dashboard.html")
    args = parser.parse_args()
    start = time.perf_counter()
    (model, tokenizer), sae = smollm2(), sh.load(args.sae)
    text = read_text(args.text) if args.text else packaged_text("eval")
    index = surveyed(model, sae, sh.TokenBatches(tokenizer, text, context=128, batch_size=16, limit=args.tokens))
    latents = args.latents or spread(index.counts, 12)
    chosen = "as asked" if args.latents else "evenly spaced in order of density among those that fired 20 times or more"
    lead = f"{len(latents)} latents of an SAE at {sae.hook_name} of SmolLM2-135M-Instruct, {chosen}, not by result."
    made = f"Made by `recipes/concept_dashboard.py --tokens {args.tokens}` with {sae!r}"
    footer = f"{made}, in {time.perf_counter() - start:.0f} s."
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(index, sae, latents, lead, footer), encoding="utf-8")
    print(f"wrote {args.out}: latents {', '.join(map(str, latents))}")


if __name__ == "__main__":
    main()
