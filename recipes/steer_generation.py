"""Steering: what generated text becomes when a latent is held at a value, over a sweep of strengths, and what it costs.

    python recipes/steer_generation.py                  # the packaged SAE; about five minutes on two cores
    python recipes/steer_generation.py --latents 901 --strengths 0.5 1 2

Which latents are steered is decided by a rule stated here, before any text is generated:

1. On every eighth paragraph of Wikipedia, take every latent that is selected on 0.02% to 1% of the tokens, and its 20
   strongest activations, each from another sequence.
2. Its *words* are those that stand within 10 tokens of them in at least 3 of the 20, and are at least 8 times as
   frequent there as in the whole text; most over-represented first, 12 at most; words of fewer than 4 letters do not
   count.
3. Its *coherence* is the share of the 20 contexts that hold at least two of these words.
4. Of the latents with at least 4 words, go down by coherence, skipping one that shares a word with a latent already
   taken, until there are six.

(This is the third form of the rule. The first had no "8 times" and took latents for words like "with"; it was mended
before any text was generated. The second read the first paragraphs only and let latents share up to 3 words, so that
four of its six were about the "United States" (three of the six met the criterion below); the text it generated was
seen before this third form was written, the latents that this form chooses were not.)

Then clamp each to multiples of its largest activation, everywhere but at position 0, while the model writes. A latent
steers when, at some strength, its words make up at least three times the share of the generated words that they make
up without it, and at least 3% of all; the cross-entropy of neutral text is given beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import torch

import saehooks as sh
from saehooks.demo import text as packaged_text
from saehooks.demo.data import ASSETS
from saehooks.demo.models import smollm2
from saehooks.hosts import host
from saehooks.show import charts, html, terminal
from saehooks.streams import prompt_tokens

PROMPT = "I think that"
SAMPLES, NEW_TOKENS = 8, 30
CONTEXTS, WINDOW, AT_LEAST, LIFT, FEWEST, WORDS = 20, 10, 3, 8, 4, 12
DENSITY = (0.0002, 0.01)
EVERYWHERE = sh.positions(slice(1, None))
"""Where latents are held: position 0 is an attention sink and is left alone."""


@dataclass
class Chosen:
    """A latent that is steered."""

    latent: int
    words: list[str]
    coherence: float
    largest: float
    """Its largest activation on the text."""
    contexts: list[str]


def words_of(text: str) -> list[str]:
    """Lower-case words of four letters or more."""
    return re.findall(r"[a-z]{4,}", text.lower())


# ---------------------------------------------------------------------- the rule


def codes_of(model, sae: sh.SAE, batches: sh.TokenBatches) -> sh.Codes:
    """Codes of shape (sequences, positions) at the SAE's own site; each forward stops there."""
    source, parts = host(model), []
    site = source.site(sae.hook_name)
    for tokens in batches:
        with torch.no_grad(), sh.read(model, sae) as trace, source.stop_at(site):
            source.run(tokens)
        parts.append(trace.codes)
    return sh.Codes.cat(parts)


def counts_of(codes: sh.Codes) -> torch.Tensor:
    """(d_sae,) tokens on which each latent fires; position 0, an attention sink, is left out."""
    return torch.bincount(codes.indices[codes.rows % codes.shape[1] > 0], minlength=codes.d_sae)


def describe(codes: sh.Codes, entries: torch.Tensor, tokens: torch.Tensor, tokenizer, usual: Counter) -> Chosen | None:
    """Steps 1 to 3 for one latent, from its entries in the codes; None where too few sequences have it."""
    rows, width = codes.rows, codes.shape[1]
    places: dict[int, int] = {}
    for entry in entries[codes.values[entries].argsort(descending=True)].tolist():
        places.setdefault(int(rows[entry]) // width, int(rows[entry]) % width)
        if len(places) == CONTEXTS:
            break
    if len(places) < CONTEXTS:
        return None
    contexts = [tokenizer.decode(tokens[s, max(1, p - WINDOW) : p + WINDOW + 1]) for s, p in places.items()]
    held = [set(words_of(context)) for context in contexts]
    count = Counter(word for one in held for word in one)
    # How often a word would stand in these contexts if they were like the rest of the text.
    share = sum(len(words_of(context)) for context in contexts) / max(1, sum(usual.values()))
    often = [word for word, n in count.items() if n >= AT_LEAST and n >= LIFT * usual[word] * share]
    words = sorted(often, key=lambda word: -count[word] / max(1, usual[word]))[:WORDS]
    coherence = sum(len(one & set(words)) >= 2 for one in held) / CONTEXTS
    return Chosen(int(codes.indices[entries[0]]), words, coherence, float(codes.values[entries].max()), contexts[:5])


def choose(model, sae: sh.SAE, tokenizer, n_tokens: int, n: int) -> list[Chosen]:
    """The rule of this recipe."""
    text = "\n".join(packaged_text("train").splitlines()[::8])
    batches = sh.TokenBatches(tokenizer, text, context=128, batch_size=16, limit=n_tokens)
    codes = codes_of(model, sae, batches)
    counts = counts_of(codes)
    total = codes.shape[0] * (codes.shape[1] - 1)
    usual = Counter(words_of(tokenizer.decode(batches.tokens[:, 1:].reshape(-1))))
    inside = codes.rows % codes.shape[1] > 0
    order = torch.argsort(torch.where(inside, codes.indices, sae.d_sae), stable=True)
    groups = order[: int(inside.sum())].split(counts.tolist())
    described = []
    for latent in ((counts >= DENSITY[0] * total) & (counts <= DENSITY[1] * total)).nonzero()[:, 0].tolist():
        found = describe(codes, groups[latent], batches.tokens, tokenizer, usual)
        if found is not None:
            described.append(found)
    described.sort(key=lambda one: -one.coherence)
    taken: list[Chosen] = []
    for one in described:
        fresh = all(not set(one.words) & set(other.words) for other in taken)
        if len(taken) < n and fresh and len(one.words) >= FEWEST:
            taken.append(one)
    return taken


# ------------------------------------------------------------------ the experiment


class Writer:
    """Generates, and measures neutral text, under one edit at a time."""

    def __init__(self, model, sae: sh.SAE, tokenizer, neutral: torch.Tensor) -> None:
        self.model, self.sae, self.tokenizer, self.neutral = model, sae, tokenizer, neutral
        self.prompt = prompt_tokens(tokenizer, PROMPT).repeat(SAMPLES, 1)

    def write(self) -> list[str]:
        """Texts after the prompt, sampled with the same seed each time."""
        torch.manual_seed(0)
        with torch.no_grad():
            out = self.model.generate(
                self.prompt, max_new_tokens=NEW_TOKENS, temperature=0.8, top_k=50, stop_at_eos=False, verbose=False
            )
        return [self.tokenizer.decode(row[self.prompt.shape[1] :]) for row in out]

    def cost(self) -> float:
        """Cross-entropy of the neutral text, nats per token."""
        with torch.no_grad():
            return float(self.model(self.neutral, return_type="loss"))

    def under(self, verb, latent: int, value: float) -> tuple[list[str], float]:
        """Both, with a latent clamped or steered."""
        with verb(self.model, self.sae, {latent: value}, where=EVERYWHERE):
            return self.write(), self.cost()


def share(texts: list[str], words: list[str]) -> float:
    """Share of the words of some texts that are among the given ones."""
    found = [word for text in texts for word in words_of(text)]
    return sum(word in words for word in found) / max(1, len(found))


def sweep(writer: Writer, one: Chosen, strengths: list[float], base: tuple[list[str], float]) -> list[dict]:
    """Rows of a table for one latent, the unedited model first."""
    rows = [
        {
            "verb": "none",
            "strength": 0.0,
            "value": None,
            "words": share(base[0], one.words),
            "CE": base[1],
            "texts": base[0],
        }
    ]
    runs = [(sh.clamp, s) for s in strengths] + [(sh.steer, strengths[len(strengths) // 2])]
    for verb, strength in runs:
        texts, cost = writer.under(verb, one.latent, strength * one.largest)
        row = {"verb": verb.__name__, "strength": strength, "value": strength * one.largest}
        rows.append({**row, "words": share(texts, one.words), "CE": cost, "texts": texts})
        print(
            f"  {verb.__name__} x{strength:g}: words {rows[-1]['words']:.1%}, CE {cost:.2f}: {texts[0]!r}", flush=True
        )
    return rows


def steers(rows: list[dict]) -> bool:
    """At least three times the unedited share of its words, and at least 3% of all, at some strength."""
    return any(is_steered(row, rows[0]) for row in rows[1:])


def is_steered(row: dict, unedited: dict) -> bool:
    """The same, at one strength."""
    return row["words"] >= max(3 * unedited["words"], 0.03)


# ------------------------------------------------------------------------ the page


def section(one: Chosen, rows: list[dict]) -> html.Section:
    """One latent: its contexts, the sweep, the samples; the words that are counted are highlighted in both."""
    found = html.Section(f"Latent {one.latent}: {', '.join(one.words[:4])}")
    found.add(
        html.paragraph(
            f"Words of its 20 strongest contexts: {', '.join(one.words)}. Coherence {one.coherence:.0%}. Five contexts:"
        )
    )
    contexts = (charts.marked_html(context.replace("\n", " "), one.words) for context in one.contexts)
    found.add(f"<ul>{''.join(f'<li>… {context} …</li>' for context in contexts)}</ul>")
    shares = {label(row): 100 * row["words"] for row in rows}
    enough = [label(row) for row in rows[1:] if is_steered(row, rows[0])]
    found.add(
        charts.bars_html({"": shares}, highlight=enough, caption="its words, % of all generated; blue: it steers"),
        charts.bars_html({"": {label(row): row["CE"] - rows[0]["CE"] for row in rows}}, caption="CE cost, nats"),
    )
    samples = [
        {"edit": label(row), "text": charts.marked_html(PROMPT + text, one.words)}
        for row in rows
        for text in row["texts"][:2]
    ]
    caption = f"two samples of each, same seed; x1 is its largest activation, {one.largest:.3g}"
    return found.add(html.table_html(samples, caption=caption))


def label(row: dict) -> str:
    """An edit in a few letters."""
    return "unedited" if row["verb"] == "none" else f"{row['verb']} x{row['strength']:g}"


def page(found: list[tuple[Chosen, list[dict]]], made: str) -> str:
    """One HTML page; ``made`` says how."""
    summary = []
    for one, rows in found:
        best = max(rows[1:], key=lambda row: row["words"])
        summary.append(
            {
                "latent": str(one.latent),
                "words": ", ".join(one.words[:4]),
                "share unedited": f"{rows[0]['words']:.1%}",
                "share at best": f"{best['words']:.1%}",
                "by": label(best),
                "CE cost there": best["CE"] - rows[0]["CE"],
                "steers": steers(rows),
            }
        )
    first = html.Section("What came of it").add(
        html.table_html(summary),
        f'<div class="sh-cards">{"".join(card(one, rows) for one, rows in found)}</div>',
    )
    rule = html.Section("The rule").add(html.code((__doc__ or "").split("\n\n", 2)[2]))
    count = sum(steers(rows) for _, rows in found)
    lead = f"{count} of the {len(found)} latents that the rule chose change generated text towards their contexts."
    sections = [first, *(section(*pair) for pair in found), rule]
    return html.page("Steering generated text", sections, lead=lead, footer=made)


def card(one: Chosen, rows: list[dict]) -> str:
    """The share of a latent's words over the strengths at which it was clamped."""
    clamped = [row for row in rows if row["verb"] != "steer"]
    values = [100 * row["words"] for row in clamped]
    picture = charts.curves_svg(
        [f"x{row['strength']:g}" for row in clamped],
        {"its words": values},
        high=10.0 * math.ceil(max(10.0, *values) / 10),
        highlight=["its words"] if steers(rows) else [],
        xlabel="clamped at multiples of its largest value",
        label=f"share of the words of latent {one.latent}, in percent",
    )
    words = escape(", ".join(one.words[:4]))
    return f'<div class="sh-card"><h3>{one.latent} <small>{words}</small></h3>{picture}</div>'


# ------------------------------------------------------------------------- to and from a file


def write(found: list[tuple[Chosen, list[dict]]], made: str, out: Path) -> None:
    """The page, and beside it what it shows as JSON, from which ``--draw`` makes the page again."""
    content = {"made": made, "found": [{"chosen": asdict(one), "rows": rows} for one, rows in found]}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    out.write_text(page(found, made), encoding="utf-8")


def draw(file: Path, out: Path) -> None:
    """The page of a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    found = [(Chosen(**one["chosen"]), one["rows"]) for one in content["found"]]
    out.write_text(page(found, content["made"]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, default=ASSETS / "sae-smollm2-l15")
    parser.add_argument("--latents", type=int, nargs="*", help="steer these instead of those the rule chooses")
    parser.add_argument("--n", type=int, default=6, help="how many latents the rule chooses (%(default)s)")
    parser.add_argument("--strengths", type=float, nargs="*", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--tokens", type=int, default=32_000, help="tokens the rule looks at (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "steer_generation.html")
    parser.add_argument("--draw", type=Path, help="draw the page again, from the JSON beside it; nothing is run")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.draw:
        draw(args.draw, args.out)
        return
    start = time.perf_counter()
    (model, tokenizer), sae = smollm2(), sh.load(args.sae)
    chosen = choose(model, sae, tokenizer, args.tokens, 10**6 if args.latents else args.n)
    if args.latents:
        chosen = [one for one in chosen if one.latent in args.latents]
    for one in chosen:
        print(f"latent {one.latent}: coherence {one.coherence:.0%}: {', '.join(one.words)}", flush=True)
    neutral = sh.TokenBatches(tokenizer, packaged_text("eval"), context=64, batch_size=8, limit=256).tokens
    writer = Writer(model, sae, tokenizer, neutral)
    base, found = (writer.write(), writer.cost()), []
    try:
        for one in chosen:
            print(f"latent {one.latent}: {', '.join(one.words[:6])}", flush=True)
            found.append((one, sweep(writer, one, sorted(args.strengths), base)))
            made = (
                f"Made by `recipes/steer_generation.py` with {sae!r}, in {time.perf_counter() - start:.0f} s. "
                f"{SAMPLES} samples of {NEW_TOKENS} tokens each, temperature 0.8, top 50; CE in nats on "
                f"{neutral.numel()} tokens of WikiText-2; position 0 is not edited."
            )
            write(found, made, args.out)
    except KeyboardInterrupt:
        print("interrupted; the page holds the latents that were done")
    rows = [{"latent": one.latent, "words": ", ".join(one.words[:3]), "steers": steers(rows)} for one, rows in found]
    print(terminal.render(terminal.table(rows)))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
