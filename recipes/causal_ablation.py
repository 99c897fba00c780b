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
import base64
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

import saehooks as sh
from saehooks import causal
from saehooks.demo import text
from saehooks.demo.data import ASSETS
from saehooks.demo.models import smollm2
from saehooks.latents import LatentIndex
from saehooks.show import charts, figures, html, terminal

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

    def data(self, others: list[Behaviour]) -> dict[str, Any]:
        """What the page shows of it, as plain values."""
        known = {"name": self.name, "about": self.about, "asked": self.asked, "prompts": len(self.prompts)}
        known |= {"examples": self.prompts[:4], "accuracy": self.accuracy, "held_out": len(self.held_out)}
        if not self.has_it:
            return known
        return known | {
            "spearman": self.ranking.agreement.spearman,
            "bars": self.bars(),
            "by_count": self.bars_by_count(),
            "crossed": {other.name: self.mean(f"of {other.name}") for other in others},
            "caption": self.ranking._caption(),
            "ranking": self.ranking.rows(12),
            "agreement": base64.b64encode(figures.png(self.ranking.plot_agreement())).decode("ascii"),
        }

    def bars(self) -> dict[str, float]:
        """The metric clean and under each kind of set of the largest size, by name."""
        n = max(COUNTS)
        kinds = {f"top {n} ablated": f"top {n}", f"{n} random ablated": f"random {n}"}
        kinds |= {f"{n} frequent ablated": f"frequent {n}", f"only top {n} kept": f"keep top {n}", "none kept": "none"}
        return {"clean": float(self.found.clean.mean())} | {name: self.mean(kind) for name, kind in kinds.items()}

    def bars_by_count(self) -> dict[str, dict[str, float]]:
        """Top, random and frequent latents ablated, for each n."""
        clean = {"clean": float(self.found.clean.mean())}
        return {
            f"{n} latents ablated": clean | {kind: self.mean(f"{kind} {n}") for kind in ("top", "random", "frequent")}
            for n in COUNTS
        }

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


def page(found: list[dict[str, Any]], index: LatentIndex | None, footer: str) -> str:
    """One HTML page of what `Behaviour.data` holds; ``index`` says what latents stand for."""
    having = [one for one in found if "bars" in one]
    summary = html.Section("Held-out prompts")
    if having:
        marked = [name for name in having[0]["bars"] if name.startswith(("top", "only"))]
        bars = {one["name"]: one["bars"] for one in having}
        summary.add(charts.bars_html(bars, highlight=marked, caption="logit difference, right minus wrong"))
    summary.add(html.paragraph(READING), *map(html.paragraph, verdicts(found)))
    sections = [summary]
    crossed = [{"prompts": one["name"], "clean": one["bars"]["clean"]} | one["crossed"] for one in having]
    if len(having) > 1:
        sections.append(
            html.Section("Is it this behaviour's latents?").add(
                html.paragraph("Each row: the prompts of one behaviour, with the top 20 latents of each ablated."),
                html.table_html(crossed),
            )
        )
    sections += [section(one, index) for one in found]
    return html.page("Causal ablation of four behaviours", sections, lead=LEAD, footer=footer)


def section(one: dict[str, Any], index: LatentIndex | None) -> html.Section:
    """One behaviour: its prompts, the effect of ablating a few latents or many, and which latents they are."""
    part = html.Section(one["name"].capitalize()).add(html.paragraph(one["about"]))
    examples = [{"prompt": p, "right": r, "wrong": w} for p, r, w in one["examples"]]
    caption = (
        f"{one['prompts']} prompts of {one['asked']} have one-token answers; the model solves {one['accuracy']:.0%}, "
        f"{one['held_out']} are held out"
    )
    part.add(html.table_html(examples, caption=caption))
    if "bars" not in one:
        return part
    if one["by_count"]:
        caption = "logit difference, right minus wrong, on held-out prompts"
        part.add(charts.bars_html(one["by_count"], highlight=["top"], caption=caption))
    rows = [
        {
            "latent": str(row["latent"]),
            "effect": row["attribution"] if row["exact"] is None else row["exact"],
            "tokens": row["tokens"],
            **({} if index is None else {"stands for": index.words(row["latent"], 4)}),
            **({} if index is None else {"strongest at": index.context_html(row["latent"])}),
        }
        for row in one["ranking"]
    ]
    part.add(html.table_html(rows, caption=one["caption"]))
    return part.add(html.image(base64.b64decode(one["agreement"]), f"attribution against exact, {one['name']}"))


def verdicts(found: list[dict[str, Any]]) -> list[str]:
    """In words, with the numbers that decide."""
    parts = []
    for one in found:
        if "bars" not in one:
            parts.append(f"{one['name']}: the model solves {one['accuracy']:.0%} of the prompts, too few to go on.")
            continue
        bars, n = one["bars"], max(COUNTS)
        top, random_, frequent = (
            bars[name] - bars["clean"] for name in (f"top {n} ablated", f"{n} random ablated", f"{n} frequent ablated")
        )
        words = "separates" if abs(top) >= 3 * max(abs(random_), abs(frequent)) else "does not separate"
        parts.append(
            f"{one['name']} {words}: {bars['clean']:.2f} clean; ablating {n} changes it by {top:.2f} (top), "
            f"{random_:.2f} (random), {frequent:.2f} (frequent). Attribution and exact ablation: Spearman "
            f"{one['spearman']:.2f}."
        )
    return parts


def write(found: list[dict[str, Any]], index: LatentIndex | None, footer: str, out: Path) -> None:
    """The page, and beside it what it shows as JSON, from which ``--draw`` makes the page again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"footer": footer, "found": found}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    out.write_text(page(found, index, footer), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, default=ASSETS / "sae-smollm2-l15")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "causal_ablation.html")
    parser.add_argument("--only", nargs="*", choices=list(BEHAVIOURS), default=list(BEHAVIOURS))
    parser.add_argument("--index", type=Path, help="an index of the SAE's latents; by default one over 16,384 tokens")
    parser.add_argument("--prompts", type=int, default=40, help="prompts of each behaviour (%(default)s)")
    parser.add_argument("--draw", type=Path, help="draw the page again, from the JSON beside it; nothing is run")
    args = parser.parse_args()
    if args.draw:
        kept = json.loads(args.draw.read_text(encoding="utf-8"))
        index = LatentIndex.load(args.index) if args.index else None
        if index is not None:
            index.check(sh.load(args.sae))
        args.out.write_text(page(kept["found"], index, kept["footer"]), encoding="utf-8")
        return
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
    plain = [one.data(having) for one in found]
    print(*verdicts(plain), sep="\n")
    if args.index is None:
        index = sh.survey(
            model, sae, sh.TokenBatches(tokenizer, text("train"), context=128, batch_size=8, limit=16_384)
        )
    else:
        index = LatentIndex.load(args.index)
    footer = f"Made by `recipes/causal_ablation.py` with {sae!r}, in {time.perf_counter() - start:.0f} s."
    write(plain, index, footer, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
