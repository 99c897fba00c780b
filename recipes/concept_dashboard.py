"""Concept dashboard: what a latent of a language model's SAE stands for, as one HTML page without a server.

    python recipes/concept_dashboard.py                           # 12 latents spread over the range of densities
    python recipes/concept_dashboard.py --latents 1204 77 --tokens 100000
    python recipes/concept_dashboard.py --text mine.txt --out mine.html

For each latent: its density, a histogram of its activations, the contexts in which it is strongest (each from another
sequence, shaded by its activation), and the next tokens its decoder direction promotes and suppresses. The forwards
stop at the site; position 0, an attention sink, is left out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from language_common import codes_of, counts_of

import saehooks as sh
from saehooks.demo import text as packaged_text
from saehooks.demo.data import ASSETS
from saehooks.demo.models import smollm2
from saehooks.show import figures, html
from saehooks.show.values import number, visible
from saehooks.streams import read_text

CONTEXTS, BEFORE, AFTER = 8, 14, 6
"""Contexts shown for a latent, and tokens on either side of the strongest one."""


class Survey:
    """Codes of an SAE over a text, and the tokens they belong to."""

    def __init__(self, model, sae: sh.SAE, batches: sh.TokenBatches) -> None:
        self.sae, self.tokens = sae, batches.tokens
        self.codes = codes = codes_of(model, sae, batches)
        self.position = codes.rows % codes.shape[1]
        self.sequence = codes.rows // codes.shape[1]
        self.counts = counts_of(codes)
        self.n_tokens = codes.shape[0] * (codes.shape[1] - 1)

    def entries(self, latent: int) -> torch.Tensor:
        """Places in the codes where a latent was selected, strongest first."""
        found = ((self.codes.indices == latent) & (self.position > 0)).nonzero()[:, 0]
        return found[self.codes.values[found].argsort(descending=True)]

    def contexts(self, latent: int, n: int) -> list[tuple[int, int]]:
        """(sequence, position) of its strongest activations, each from another sequence."""
        places: dict[int, int] = {}
        for entry in self.entries(latent).tolist():
            places.setdefault(int(self.sequence[entry]), int(self.position[entry]))
            if len(places) == n:
                break
        return list(places.items())


def spread(counts: torch.Tensor, n: int, at_least: int = 20) -> list[int]:
    """n latents evenly spaced in order of density, among those that fired at least so often."""
    order = counts.argsort(stable=True)
    order = order[counts[order] >= at_least]
    places = torch.linspace(0, len(order) - 1, min(n, len(order))).long()
    return order[places].tolist()


def logit_effects(model, sae: sh.SAE, latent: int, n: int = 10) -> tuple[list[tuple[int, float]], ...]:
    """The next tokens a latent's decoder direction promotes and suppresses most, through the final norm's weights."""
    with torch.no_grad():
        direction = sae.directions(latent)[0] * model.ln_final.weight
        effect = direction @ model.W_U
        effect = effect - effect.mean()
    top, bottom = effect.topk(n), (-effect).topk(n)
    return tuple(
        list(zip(x.indices.tolist(), (s * x.values).tolist(), strict=True)) for x, s in ((top, 1), (bottom, -1))
    )


def section(survey: Survey, model, tokenizer, latent: int) -> html.Section:
    """Everything about one latent."""
    found = html.Section(f"Latent {latent}")
    entries = survey.entries(latent)
    if not len(entries):
        return found.add(html.paragraph("It never fires in this text."))
    values = survey.codes.values[entries]
    density = len(entries) / survey.n_tokens
    facts = f"Fires on {density:.3%} of {survey.n_tokens:,} tokens; mean {number(float(values.mean()))}, "
    found.add(html.paragraph(facts + f"largest {number(float(values[0]))}."))
    column = survey.codes.of(latent)
    for sequence, position in survey.contexts(latent, CONTEXTS):
        low, high = max(1, position - BEFORE), min(column.shape[1], position + AFTER + 1)
        words = [tokenizer.decode([i]) for i in survey.tokens[sequence, low:high].tolist()]
        found.add(html.tokens_html(words, column[sequence, low:high], unit="", low=0.0, high=float(values[0])))
    up, down = logit_effects(model, survey.sae, latent)
    rows = [
        {"promotes": visible(tokenizer.decode([a])), "by": x, "suppresses": visible(tokenizer.decode([b])), "by ": y}
        for (a, x), (b, y) in zip(up, down, strict=True)
    ]
    found.add(html.table_html(rows, caption="logits of the decoder direction, one unit of it, minus their mean"))
    figure, (ax,) = figures.blank(width=5, height=2)
    ax.hist(values.numpy(), bins=40, color=figures.BLUE)
    ax.set(xlabel="activation where selected", ylabel="tokens")
    return found.add(html.image(figures.png(figure, dpi=80), f"histogram of latent {latent}"))


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
    batches = sh.TokenBatches(tokenizer, text, context=128, batch_size=16, limit=args.tokens)
    survey = Survey(model, sae, batches)
    latents = args.latents or spread(survey.counts, 12)
    survey.codes.check_latents(latents)
    sizes = survey.codes.support_size[:, 1:]
    about = html.Section("The SAE on this text").add(
        html.paragraph(
            f"{int((survey.counts > 0).sum()):,} of {sae.d_sae:,} latents fired on {survey.n_tokens:,} tokens; "
            f"{float(sizes.double().mean()):.1f} latents on a token."
        ),
        html.image(figures.png(figures.support_size_histogram(sizes), dpi=80), "histogram of support sizes"),
    )
    chosen = "as asked" if args.latents else "evenly spaced in order of density among those that fired 20 times or more"
    lead = f"{len(latents)} latents of an SAE at {sae.hook_name} of SmolLM2-135M-Instruct, {chosen}, not by result."
    made = f"Made by `recipes/concept_dashboard.py --tokens {args.tokens}` with {sae!r}"
    footer = f"{made}, in {time.perf_counter() - start:.0f} s."
    page = html.page(
        "Concept dashboard", [about, *(section(survey, model, tokenizer, i) for i in latents)], lead=lead, footer=footer
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8")
    print(f"wrote {args.out}: latents {', '.join(map(str, latents))}")


if __name__ == "__main__":
    main()
