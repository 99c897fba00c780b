"""Causal ablation: which latents carry four behaviours of SmolLM2-135M-Instruct?

    python recipes/causal_ablation.py                     # the packaged SAE; about four minutes on two idle cores
    python recipes/causal_ablation.py --sae saes/mine

For each behaviour: does the model have it at all? Rank latents on half of the prompts (attribution for every active
latent, exact ablation of a sample), then on the other half measure the logit difference clean, with the top latents
ablated, with as many random active latents ablated, and with only the top latents kept. Writes one HTML page.

The prompts are fixed below and were not chosen by result; a behaviour that does not separate stays in the table.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch

import saehooks as sh
from saehooks import causal
from saehooks.demo import text
from saehooks.demo.data import ASSETS
from saehooks.demo.models import smollm2
from saehooks.latents import LatentIndex
from saehooks.show import figures, html, terminal

# ------------------------------------------------------------------ the prompts

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Greece": "Athens", "Austria": "Vienna", "Ireland": "Dublin", "Poland": "Warsaw", "Hungary": "Budapest",
    "Russia": "Moscow", "China": "Beijing", "Japan": "Tokyo", "Egypt": "Cairo", "Turkey": "Ankara",
    "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus", "Lebanon": "Beirut", "Cuba": "Havana",
    "Peru": "Lima", "Canada": "Ottawa", "Kenya": "Nairobi", "Norway": "Oslo", "Sweden": "Stockholm",
    "Denmark": "Copenhagen", "Finland": "Helsinki", "Belgium": "Brussels", "Thailand": "Bangkok", "Taiwan": "Taipei",
    "South Korea": "Seoul", "Argentina": "Buenos", "the United Kingdom": "London", "the Czech Republic": "Prague",
    "Afghanistan": "Kabul", "Mexico": "Mexico", "India": "New", "Ukraine": "Kiev", "Indonesia": "Jakarta",
    "Pakistan": "Islam",
}  # fmt: skip

NOUNS = [
    "key", "book", "teacher", "dog", "river", "car", "house", "letter", "student", "picture", "farmer", "bridge",
    "window", "song", "player", "engine", "table", "road", "doctor", "tree", "boat", "friend", "girl", "king",
    "machine", "flower", "ship", "painter", "lamp", "horse",
]  # fmt: skip
NEAR = ["cabinet", "garden", "tower", "station", "castle", "market", "school", "hill", "lake", "farm"]

WORDS = [
    "apple", "river", "window", "paper", "music", "garden", "stone", "water", "silver", "horse", "letter", "summer",
    "doctor", "bridge", "forest", "market", "winter", "table", "engine", "flower", "island", "castle", "shadow",
    "mirror", "basket", "copper", "thunder", "valley", "school", "button",
]  # fmt: skip

NAMES = [
    "Mary", "John", "Tom", "James", "Sarah", "David", "Anna", "Peter", "Paul", "Lisa", "Mark", "Emma", "Jack", "Kate",
    "Daniel", "Alice", "Robert", "Laura", "Michael", "Susan",
]  # fmt: skip
PLACES = ["store", "park", "school", "office", "station", "restaurant", "beach", "library"]
THINGS = ["drink", "book", "letter", "ring", "ball", "ticket", "key", "gift"]

Prompts = list[tuple[str, str, str]]
"""(prompt, right next token, wrong next token), the tokens with their leading space."""


def capitals() -> Prompts:
    """Facts: the capital of one country, against the capital of another."""
    countries = list(CAPITALS)
    random.Random(0).shuffle(countries)
    others = countries[1:] + countries[:1]
    return [
        (f"The capital of {country} is the city of", f" {CAPITALS[country]}", f" {CAPITALS[other]}")
        for country, other in zip(countries, others, strict=True)
    ]


def agreement() -> Prompts:
    """Grammar: the verb agrees with the subject, not the noun before it. A noun can be on both sides of the split."""
    rng, prompts = random.Random(0), []
    for noun in NOUNS:
        near = rng.choice(NEAR)
        prompts.append((f"The {noun}s near the {near}", " are", " is"))
        prompts.append((f"The {noun} near the {near}s", " is", " are"))
    rng.shuffle(prompts)
    return prompts


def induction() -> Prompts:
    """Copying: in a repeated list, the word that came after this one before, against another word of the list."""
    rng, prompts = random.Random(0), []
    for _ in range(60):
        words = rng.sample(WORDS, 8)
        prompts.append((" " + " ".join([*words, *words[:5]]), f" {words[5]}", f" {words[7]}"))
    return prompts


def indirect_object() -> Prompts:
    """Names: who receives it, against who gives it."""
    rng, prompts = random.Random(0), []
    for _ in range(60):
        receiver, giver = rng.sample(NAMES, 2)
        first, second = rng.sample([receiver, giver], 2)
        text = f"When {first} and {second} went to the {rng.choice(PLACES)}, {giver} gave a {rng.choice(THINGS)} to"
        prompts.append((text, f" {receiver}", f" {giver}"))
    return prompts


BEHAVIOURS = {"capitals": capitals, "agreement": agreement, "induction": induction, "indirect object": indirect_object}


# ---------------------------------------------------------------- the experiment

EXACT_BEST, EXACT_SPREAD = 40, 40
"""Latents ablated exactly: the best by attribution, and others spread evenly over its range."""
COUNTS = (5, 20)
DRAWS = 3
HAS_IT = 0.75
"""Share of prompts with the right token above the wrong one from which on the model counts as having a behaviour."""


class Behaviour:
    """Prompts of one behaviour, and what was found on them."""

    def __init__(self, name: str, prompts: Prompts, tokenizer) -> None:
        self.name, self.about = name, (BEHAVIOURS[name].__doc__ or "").strip()
        single = [
            one for one in prompts if all(len(tokenizer(w, add_special_tokens=False).input_ids) == 1 for w in one[1:])
        ]
        self.asked, self.prompts = len(prompts), single
        self.train, self.held_out = single[0::2], single[1::2]
        self.tokenizer = tokenizer

    def metric(self, prompts: Prompts) -> causal.Metric:
        """Logit of the right next token minus that of the wrong one."""
        right, wrong = (causal.token_ids(self.tokenizer, [one[i] for one in prompts]) for i in (1, 2))
        return causal.logit_difference(right, wrong)

    def check(self, model, sae) -> None:
        """What the model solves: the others are left out, on both sides of the split."""
        solved = []
        for side in (self.train, self.held_out):
            clean = causal.ablate_sets(model, sae, texts(side), self.metric(side), ablate={"none": []}).clean
            solved.append([one for one, difference in zip(side, clean.tolist(), strict=True) if difference > 0])
        self.accuracy = sum(map(len, solved)) / len(self.prompts)
        self.train, self.held_out = solved
        self.has_it = self.accuracy >= HAS_IT and min(map(len, solved)) >= 8

    def rank(self, model, sae) -> None:
        """Attribution of every active latent; exact ablation of the best, and of others for comparison."""
        data, metric = texts(self.train), self.metric(self.train)
        first = causal.rank_latents(model, sae, data, metric, order="lowering")
        step = max(1, (len(first) - EXACT_BEST) // EXACT_SPREAD)
        chosen = first.latents[:EXACT_BEST].tolist() + first.latents[EXACT_BEST::step].tolist()[:EXACT_SPREAD]
        self.ranking = causal.rank_latents(model, sae, data, metric, order="lowering", exact=chosen)

    def evaluate(self, model, sae, others: list[Behaviour]) -> None:
        """The held-out prompts, under sets of latents."""
        data, metric = texts(self.held_out), self.metric(self.held_out)
        active = causal.curves.active_latents(model, sae, data)
        pool = active[~torch.isin(active, torch.tensor(self.ranking.top(max(COUNTS))))]
        frequent = self._by_frequency(pool)
        generator = torch.Generator().manual_seed(0)
        ablate, keep = {}, {"none": []}
        for n in COUNTS:
            ablate[f"top {n}"] = keep[f"keep top {n}"] = self.ranking.top(n)
            for draw in range(DRAWS):
                ablate[f"random {n}/{draw}"] = _draw(pool, n, generator)
                ablate[f"frequent {n}/{draw}"] = _draw(frequent, n, generator)
                keep[f"keep random {n}/{draw}"] = _draw(pool, n, generator)
        keep["keep top 100"] = self.ranking.top(100)
        for other in others:
            ablate[f"of {other.name}"] = other.ranking.top(max(COUNTS))
        self.found = causal.ablate_sets(model, sae, data, metric, ablate=ablate, keep=keep)

    def _by_frequency(self, pool: torch.Tensor) -> torch.Tensor:
        """The latents of the pool that fire as often on the ranking prompts as the top ones, or more."""
        ranking = self.ranking
        count = torch.zeros(int(max(ranking.latents.max(), pool.max())) + 1, dtype=torch.int64)
        count[ranking.latents] = ranking.tokens
        needed = count[torch.tensor(ranking.top(max(COUNTS)))].double().median()
        found = pool[count[pool] >= needed]
        return found if len(found) >= max(COUNTS) else pool

    def mean(self, name: str) -> float:
        """The metric under a set, or under the draws of a random one."""
        values = [self.found.of(one) for one in self.found.names if one == name or one.startswith(name + "/")]
        return sum(values) / len(values)

    def row(self) -> dict[str, object]:
        """One line of the table."""
        row = {"behaviour": self.name, "accuracy": f"{self.accuracy:.0%}", "held-out prompts": len(self.held_out)}
        if not self.has_it:
            return {**row, "verdict": "the model does not have it"}
        clean = float(self.found.clean.mean())
        row["clean"] = clean
        for n in COUNTS:
            row[f"top {n} ablated"] = self.mean(f"top {n}")
            row[f"{n} random ablated"] = self.mean(f"random {n}")
            row[f"{n} frequent ablated"] = self.mean(f"frequent {n}")
        for n in COUNTS:
            row[f"only top {n} kept"] = self.mean(f"keep top {n}")
        row["only top 100 kept"] = self.mean("keep top 100")
        row["none kept"] = self.mean("none")
        row["Spearman"] = self.ranking.agreement.spearman
        row["verdict"] = "separates" if self.separates else "does not separate"
        return row

    def short_row(self) -> dict[str, object]:
        """The line of the page's table; the other figures are its bars."""
        row, n = self.row(), max(COUNTS)
        wanted = ("behaviour", "accuracy", "held-out prompts", "clean", f"top {n} ablated", f"{n} random ablated",
                  f"{n} frequent ablated", f"only top {n} kept", "none kept", "Spearman", "verdict")  # fmt: skip
        return {name: row[name] for name in wanted if name in row}

    def bars(self):
        """Clean, top, random and frequent latents ablated, for each n."""
        clean = float(self.found.clean.mean())
        kinds = {"top": "top", "random": "random", "as frequent": "frequent"}
        series = {name: [self.mean(f"{kind} {n}") for n in COUNTS] for name, kind in kinds.items()}
        return figures.paired_bars(
            [f"{n} ablated" for n in COUNTS],
            {"clean": [clean] * len(COUNTS), **series},
            xlabel="logit difference, right minus wrong",
            highlight="top",
        )

    @property
    def separates(self) -> bool:
        """Ablating the top 20 changes the metric at least three times as much as ablating 20 frequent ones."""
        clean, n = float(self.found.clean.mean()), max(COUNTS)
        change = abs(self.mean(f"top {n}") - clean)
        return change >= 3 * max(abs(self.mean(f"{kind} {n}") - clean) for kind in ("random", "frequent"))


def texts(prompts: Prompts) -> list[str]:
    """The prompts alone."""
    return [one[0] for one in prompts]


def _draw(pool: torch.Tensor, n: int, generator: torch.Generator) -> list[int]:
    return pool[torch.randperm(len(pool), generator=generator)[:n]].tolist()


# ----------------------------------------------------------------------- the page

LEAD = (
    "Which latents of an SAE at the output of block 15 of SmolLM2-135M-Instruct carry four behaviours? The number is "
    "the logit of the right next token minus that of a wrong one. Latents were ranked on half of the prompts and "
    "measured here on the other half; prompts that the model does not solve were left out of both. Ablating means "
    "setting a latent to zero at every position but 0, with the reconstruction error kept."
)
READING = (
    "`top n`: the n latents whose ablation lowers the number most, by exact ablation of the best 40 by attribution. "
    "`random`: as many of the latents active on these prompts, mean of 3 draws. `frequent`: the same among those that "
    "fire at least as often as the median of the top 20. `only top n kept`: every other latent set to zero. "
    "`none kept`: all set to zero, so what is left is the reconstruction error. A behaviour separates when ablating "
    "its top 20 moves the number at least three times as much as ablating 20 random, or 20 frequent, ones."
)


def page(found: list[Behaviour], sae, index, seconds: float) -> str:
    """One HTML page; ``index`` says what latents stand for."""
    summary = html.Section("Held-out prompts")
    summary.add(
        '<div class="scroll">' + html.table_html([one.short_row() for one in found]) + "</div>",
        html.paragraph(READING),
    )
    sections, having = [summary], [one for one in found if one.has_it]
    summary.add(html.paragraph(verdict(found)))
    crossed = [
        {"prompts": one.name, "clean": float(one.found.clean.mean())}
        | {f"top 20 of {other.name}": one.mean(f"of {other.name}") for other in having}
        for one in having
    ]
    if len(having) > 1:
        sections.append(
            html.Section("Is it this behaviour's latents?").add(
                html.paragraph("Each row: the prompts of one behaviour, with the top 20 latents of each ablated."),
                html.table_html(crossed),
            )
        )
    for one in found:
        section = html.Section(one.name.capitalize()).add(html.paragraph(one.about))
        examples = [{"prompt": p, "right": r, "wrong": w} for p, r, w in one.prompts[:4]]
        section.add(
            html.table_html(examples, caption=f"{len(one.prompts)} prompts of {one.asked} have one-token answers")
        )
        if one.has_it:
            section.add(
                html.image(figures.png(one.bars()), f"clean, top, random and frequent latents ablated, {one.name}")
            )
            section.add(one.ranking.with_index(index)._repr_html_())
            section.add(html.image(figures.png(one.ranking.plot_agreement()), f"attribution against exact, {one.name}"))
        sections.append(section)
    footer = f"Made by `recipes/causal_ablation.py` with {sae!r}, in {seconds:.0f} s."
    return html.page("Causal ablation of four behaviours", sections, lead=LEAD, footer=footer)


def verdict(found: list[Behaviour]) -> str:
    """In words, with the numbers that decide."""
    parts = []
    for one in found:
        if not one.has_it:
            parts.append(f"{one.name}: the model solves {one.accuracy:.0%} of the prompts, too few to go on.")
            continue
        clean = float(one.found.clean.mean())
        moved = {kind: one.mean(f"{kind} 20") - clean for kind in ("top", "random", "frequent")}
        words = "separates" if one.separates else "does not separate"
        parts.append(
            f"{one.name} {words}: {clean:.2f} clean; ablating 20 changes it by {moved['top']:.2f} (top), "
            f"{moved['random']:.2f} (random), {moved['frequent']:.2f} (frequent)."
        )
    return " ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, default=ASSETS / "sae-smollm2-l15")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "causal_ablation.html")
    parser.add_argument("--only", nargs="*", choices=list(BEHAVIOURS), default=list(BEHAVIOURS))
    parser.add_argument("--index", type=Path, help="an index of the SAE's latents; by default one over 16,384 tokens")
    parser.add_argument("--prompts", type=int, default=40, help="prompts of each behaviour (%(default)s)")
    args = parser.parse_args()
    start = time.perf_counter()
    (model, tokenizer), sae = smollm2(), sh.load(args.sae)
    found = [Behaviour(name, BEHAVIOURS[name]()[: args.prompts], tokenizer) for name in args.only]
    for one in found:
        one.check(model, sae)
        print(f"{one.name}: solves {one.accuracy:.0%} of {len(one.prompts)} prompts", flush=True)
        if one.has_it:
            one.rank(model, sae)
            print(one.ranking, flush=True)
    having = [one for one in found if one.has_it]
    for one in having:
        one.evaluate(model, sae, having)
    print(terminal.render(terminal.table([one.row() for one in found]), width=200))
    print(verdict(found))
    if args.index is None:
        index = sh.survey(
            model, sae, sh.TokenBatches(tokenizer, text("train"), context=128, batch_size=8, limit=16_384)
        )
    else:
        index = LatentIndex.load(args.index)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(found, sae, index, time.perf_counter() - start), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
