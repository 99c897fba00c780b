"""The demo on a language model: support sizes, what splicing costs, ablating, steering, training."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehooks.attachments import ablate, read, steer
from saehooks.causal import log_prob, rank_latents
from saehooks.codes import Codes
from saehooks.demo.data import text
from saehooks.demo.report import Report
from saehooks.errors import ConfigError
from saehooks.evaluation import measure
from saehooks.latents import LatentIndex, survey
from saehooks.sae import SAE
from saehooks.show import figures
from saehooks.show.values import visible
from saehooks.streams import TokenBatches, prompt_tokens
from saehooks.training.fit import fit

PROMPT = "The Eiffel Tower is located in the city of"
STEERED = "Last week I went to the"
OPENINGS = (STEERED, "We talked for hours about the", "What she remembered most was the")
THEMES = {
    "the sea": (
        "The ship sailed across the ocean, and the captain watched the waves. The fleet left the harbour at dawn; "
        "sailors hauled the anchor, the naval vessel turned into the wind, and the coast sank behind the sea.",
        (" sea", " ocean", " beach", " boat", " ship", " harbor", " coast", " port", " island", " water", " river"),
    ),
    "music": (
        "The band recorded their new album in the studio, and the song reached number one on the charts. The singer "
        "played guitar and piano; the orchestra performed the symphony, and the concert tour sold out.",
        (" music", " song", " band", " concert", " album", " guitar", " piano", " songs", " singer", " show"),
    ),
    "war": (
        "The army attacked the fort at night, and the soldiers held the line under heavy artillery fire. The general "
        "ordered the division to advance; the battalion took the hill, and the enemy troops retreated from the battle.",
        (" war", " army", " battle", " soldiers", " military", " enemy", " soldier", " troops", " front", " fort"),
    ),
}
"""A theme: sentences by which its latents are found, and words by which its rise is seen."""


FACTORS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
"""Steering strengths, in typical values of the latent."""
SEED = 1
"""Of the texts that the model writes."""
WRITTEN = (0.0, 1.0, 2.0, 4.0)
"""Strengths at which the model writes."""


@dataclass(frozen=True)
class Budget:
    """How much the demo does; the defaults take about three minutes on two CPU cores."""

    train_seconds: float = 60.0
    """Training of the fresh SAE."""
    tokens: int = 4096
    """Held-out tokens measured and surveyed."""
    new_tokens: int = 30
    """Tokens of each generated text."""
    candidates: int = 12
    """Latents tried one by one."""
    photos: int = 200
    """Photos that the CLIP part reads."""


class Push(NamedTuple):
    """A latent to steer."""

    theme: str
    latent: int
    typical: float
    """An ordinary strong value of the latent."""
    tokens: list[str]
    """The theme's sentences."""
    values: Tensor
    """(n,) the latent on each of their tokens, 0 where it does not fire."""


@dataclass(frozen=True)
class Language:
    """A language model, its tokenizer and an SAE at one of its sites."""

    model: Any
    tokenizer: Any
    sae: SAE
    report: Report
    budget: Budget
    checks: list[bool] = field(default_factory=list)
    """Of each generated text, whether it came out the same without the KV cache."""

    def batches(self, split: str, tokens: int | None = None) -> TokenBatches:
        """Packaged text as token batches."""
        return TokenBatches(self.tokenizer, text(split), context=256, batch_size=4, limit=tokens)

    def encode_prompt(self, prompt: str) -> Tensor:
        """(1, pos) tokens, with the token that sequences begin with."""
        return prompt_tokens(self.tokenizer, prompt)[None]

    def generated(self, prompt: str) -> str:
        """What the model writes after a prompt, drawn with one seed: the likeliest tokens alone go round in circles."""
        tokens, texts = self.encode_prompt(prompt), []
        for cached in (True, False):
            with torch.random.fork_rng():
                torch.manual_seed(SEED)
                texts.append(self.model.generate(tokens, use_past_kv_cache=cached, **self.drawn))
        out, again = texts
        self.checks.append(torch.equal(out, again))
        return self.tokenizer.decode(out[0, tokens.shape[1] :].tolist(), skip_special_tokens=True)

    @property
    def drawn(self) -> dict[str, Any]:
        """How texts are drawn."""
        length = self.budget.new_tokens
        return {
            "max_new_tokens": length, "do_sample": True, "temperature": 0.7, "top_k": 40,
            "return_type": "tokens", "verbose": False,
        }  # fmt: skip

    def next_probs(self, tokens: Tensor) -> Tensor:
        """(vocabulary,) probabilities of the token after the last."""
        with torch.no_grad():
            return self.model(tokens)[0, -1].float().softmax(-1)

    def word(self, token: int) -> str:
        """A token as text that shows its spaces."""
        return visible(self.tokenizer.decode([token]))

    # ------------------------------------------------------------------ parts

    def support_sizes(self) -> None:
        """How many latents each token of a paragraph uses."""
        self.report.begin(
            "How many latents does each token need?",
            f"`read` attaches the SAE at `{self.sae.hook_name}` and changes nothing. Under sparsemax every token "
            "chooses its own number of latents. Point at a token to see its strongest ones.",
            "with sh.read(model, sae) as trace:\n    model(tokens)\ntrace.support_size, trace.codes, trace.top(5)",
        )
        passage = max(text("eval").splitlines()[:60], key=lambda line: -abs(len(line) - 620))
        tokens = self.encode_prompt(passage)
        with torch.no_grad():
            clean = self.model(tokens)
            with read(self.model, self.sae) as trace:
                same = torch.equal(self.model(tokens), clean)
        sizes = trace.support_size[0].float()
        sizes[0] = float("nan")  # the first token is an attention sink, and left out of training
        self.report.tokens(
            trace.token_strings(), sizes, top=strongest(trace.codes[0], 5), unit="latents", caption="latents per token"
        )
        words = "bit-identical to" if same else "DIFFERENT from"
        self.report.say(f"The logits with the SAE attached are {words} the logits without it.")

    def degradation(self) -> None:
        """What splicing costs, live on ordinary calls."""
        self.report.begin(
            "What does the reconstruction cost the model?",
            "`measure` runs each ordinary call again with the reconstruction at the site, and with zeros there. The "
            "text is WikiText-2, which the SAE was not trained on.",
            "with sh.measure(model, sae) as live:\n    for tokens in batches:\n        model(tokens)\nlive.summary()",
        )
        with torch.no_grad(), measure(self.model, self.sae) as live:
            for batch in self.batches("eval", self.budget.tokens):
                self.model(batch)
        self.report.show(live)
        sizes = live.support_sizes
        self.report.figure(
            figures.support_size_histogram(torch.arange(len(sizes)).repeat_interleave(sizes)),
            "histogram of support sizes",
        )
        calls = [row["calls"] for row in live.history]
        lines = {run: (calls, [row[f"ce_{run}"] for row in live.history]) for run in ("clean", "spliced")}
        curve = figures.effect_curves(lines, xlabel="calls of the model", ylabel="cross-entropy so far (nats)")
        curve.axes[0].locator_params(axis="x", integer=True)
        self.report.figure(curve, "running cross-entropy, clean and spliced")

    def index(self) -> LatentIndex:
        """What the latents stand for in held-out text, by which they are described."""
        # Short sequences, for an index keeps one place of each.
        batches = TokenBatches(self.tokenizer, text("eval"), context=64, batch_size=16, limit=self.budget.tokens)
        return survey(
            self.model, self.sae, batches, where=slice(1, None), tokenizer=self.tokenizer, sampled=0, logits=0,
            neighbours=0, progress=False,
        )  # fmt: skip

    def ablation(self, index: LatentIndex) -> None:
        """Which latents carry a fact, and what the model says without them."""
        self.report.begin(
            "Which latents carry a fact?",
            f"The prompt is “{PROMPT}”. Latents are ranked by attribution (gradient times value), the best are ablated "
            "one by one, and those whose loss hurts most are ablated together. The reconstruction error is kept, so "
            "nothing else changes.",
            "with sh.ablate(model, sae, latents):\n    edited = model(tokens)",
        )
        tokens = self.encode_prompt(PROMPT)
        before = self.next_probs(tokens)
        answer = int(before.argmax())
        effects = {}
        ranked = rank_latents(
            self.model, self.sae, tokens, log_prob([answer]), order="lowering", where=slice(1, None), progress=False
        )
        for latent in ranked.top(self.budget.candidates):
            with ablate(self.model, self.sae, [latent]):
                effects[latent] = float((self.next_probs(tokens)[answer] / before[answer]).log())
        worst = sorted(effects, key=lambda latent: effects[latent])
        rows = [
            {
                "latent": str(latent),
                f"Δ log p({self.word(answer)})": effects[latent],
                "fires most on": index.words(latent, 6),
            }
            for latent in worst[:8]
        ]
        contexts = [index.context_html(latent) for latent in worst[:8]]
        self.report.table(rows, "one latent ablated at a time", on_page={"strongest at": contexts})
        together = [latent for latent in worst if effects[latent] < 0][:5] or worst[:1]
        with ablate(self.model, self.sae, together):
            after = self.next_probs(tokens)
            changed = self.generated(PROMPT)
        shown = list(dict.fromkeys([*before.topk(6).indices.tolist(), *after.topk(4).indices.tolist()]))
        series = {"clean": before[shown].tolist(), f"{len(together)} latents ablated": after[shown].tolist()}
        bars = figures.paired_bars([self.word(token) for token in shown], series, title="next token")
        self.report.figure(bars, "next-token probabilities before and after the ablation")
        self.report.table(
            [
                {"next token": self.word(token), "clean": float(before[token]), "ablated": float(after[token])}
                for token in shown
            ],
            f"latents {', '.join(map(str, together))} ablated together",
        )
        self.report.quotes({"clean": self.generated(PROMPT), "ablated": changed})
        self._say_checked()

    def steering(self, index: LatentIndex) -> None:
        """Push one latent, and read what the model then writes."""
        push = self._push(index)
        self.report.begin(
            "Steering: push one latent",
            "Three themes were tried, each by the latents that fire more in a few sentences about it than in held-out "
            f"text. The one whose push raises the theme's words most is latent {push.latent}, for {push.theme}. Below, "
            "where it fires in those sentences; then `steer` adds to it at every position but the first. A typical "
            f"value of it is {push.typical:.3g}.",
            f"with sh.steer(model, sae, {{{push.latent}: +strength}}, where=slice(1, None)):\n"
            "    model.generate(prompt)",
        )
        self.report.tokens(
            push.tokens, push.values, unit="", caption=f"latent {push.latent} in sentences about {push.theme}"
        )
        words = self._words_of(push.theme)
        raised: dict[str, list[float]] = {opening: [] for opening in OPENINGS}
        texts = {}
        for factor in FACTORS:
            with steer(self.model, self.sae, {push.latent: factor * push.typical}, where=slice(1, None)):
                for opening in OPENINGS:
                    raised[opening].append(float(self.next_probs(self.encode_prompt(opening))[words].sum()))
                if factor in WRITTEN:
                    texts[f"{factor:g} × typical"] = f"{STEERED}{self.generated(STEERED)}"
        curves = {f"{opening} …": (FACTORS, values) for opening, values in raised.items()}
        ylabel = f"probability of words about {push.theme}"
        figure = figures.effect_curves(curves, xlabel="strength, in typical values of the latent", ylabel=ylabel)
        self.report.figure(figure, "probability of theme words over steering strength")
        rows = [
            {"prompt": f"{opening} …"} | {f"{factor:g}×": value for factor, value in zip(FACTORS, values, strict=True)}
            for opening, values in raised.items()
        ]
        self.report.table(rows, f"probability that the next word is about {push.theme}, over strength")
        self.report.quotes(texts)
        self._say_checked()

    def _say_checked(self) -> None:
        """Whether the texts generated so far are what the model writes without its KV cache."""
        wrong = self.checks.count(False)
        if wrong:
            self.report.say(
                f"{wrong} of {len(self.checks)} generated texts are DIFFERENT without the KV cache: what is shown is "
                "not what the model would write. `saehooks doctor` says which releases do not work together."
            )
        else:
            self.report.say(f"All {len(self.checks)} texts so far are the same, token for token, without the KV cache.")

    def _words_of(self, theme: str) -> Tensor:
        """Token ids of the theme's words that are one token."""
        ids = [self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in THEMES[theme][1]]
        return torch.tensor([one[0] for one in ids if len(one) == 1])

    def _push(self, index: LatentIndex) -> Push:
        """The theme and the latent whose push, by twice its typical value, raises the theme's words most."""
        best: Push | None = None
        highest = -1.0
        opening = self.encode_prompt(OPENINGS[1])
        for theme, (sentences, _) in THEMES.items():
            words = self._words_of(theme)
            with read(self.model, self.sae) as trace, torch.no_grad():
                self.model(self.encode_prompt(sentences))
            codes = trace.codes[0, 1:]
            for latent in (
                contrast(index.counts, index.positions, codes)
                .argsort(descending=True)[: self.budget.candidates]
                .tolist()
            ):
                value = typical(codes, latent)
                with steer(self.model, self.sae, {latent: 2 * value}, where=slice(1, None)):
                    raised = float(self.next_probs(opening)[words].sum())
                if raised > highest:
                    highest = raised
                    best = Push(theme, latent, value, trace.token_strings()[1:], codes.of(latent).clamp_min(0))
        if best is None:
            raise ConfigError("no latent to steer: candidates must be at least 1")
        return best

    def training(self) -> None:
        """A fresh SAE, trained for a minute."""
        seconds = self.budget.train_seconds
        site = str(self.sae.hook_name)
        self.report.begin(
            "Train a new one",
            f"`fit` stops each forward pass at the site and trains on what arrives there: {seconds:.0f} seconds on "
            "Wikipedia text, each activation used four times.",
            f'new = sh.SAE(d_in={self.sae.d_in}, d_sae=2304)\nsh.fit(model, new, batches, at="{site}", passes=4)',
        )
        torch.manual_seed(0)
        new = SAE(self.sae.d_in, 2304)
        trainer = fit(
            self.model,
            new,
            for_seconds(self.batches("train", 200_000), seconds),
            site,
            passes=4,
            batch_size=512,
            decay=0.0,  # the clock ends the training, so the last step is not known beforehand
            buffer_rows=8192,
            log_every=5,
            eval_batches=list(self.batches("eval", min(2048, self.budget.tokens))),
        )
        names = [name for name in ("loss", "nmse", "l0", "dead") if any(row.get(name) for row in trainer.history)]
        if names:
            self.report.figure(figures.training_curves(trainer.history, names), "training curves")
        logged = [row for row in trainer.history if "loss" in row]
        if logged:
            ends = {"first record": logged[0], "last record": logged[-1]}
            rows = [{"": when, "step": row["step"], **{n: row.get(n) for n in names}} for when, row in ends.items()]
            self.report.table(rows, f"{trainer.steps} steps on {trainer.rows_seen:,} activations")
        held_out = new.cfg.metadata.get("metrics", {}).get("held_out", {})
        if held_out:
            self.report.table([held_out], "on held-out text")


def strongest(codes: Codes, k: int) -> list[list[tuple[int, float]]]:
    """For each row of codes (n,) its k strongest latents as (latent, value)."""
    top = codes.top(k)
    rows = zip(top.latents.tolist(), top.values.tolist(), strict=True)
    return [[pair for pair in zip(*row, strict=True) if pair[0] >= 0] for row in rows]


def contrast(counts: Tensor, positions: int, codes: Codes) -> Tensor:
    """(d_sae,) by how much more often each latent fires in some codes than elsewhere, in standard errors.

    Args:
        counts: (d_sae,) int64, positions elsewhere at which each latent fired.
        positions: how many were looked at.
        codes: of shape (n,).
    """
    n = codes.sizes.numel()
    p, q = counts / positions, codes.counts() / n
    pooled = (counts + codes.counts()) / (positions + n)
    return (q - p) / (pooled * (1 - pooled) * (1 / positions + 1 / n)).clamp_min(1e-12).sqrt()


def typical(codes: Codes, latent: int) -> float:
    """A strong but ordinary value of a latent: the 95% quantile of its positive values; 0 if it has none."""
    values = codes.values[codes.indices == latent]
    values = values[values > 0]
    return float(values.quantile(0.95)) if values.numel() else 0.0


def for_seconds(batches: Iterable[Tensor], seconds: float) -> Iterator[Tensor]:
    """Batches (batch, pos) until the time is up; at least one."""
    end = time.monotonic() + seconds
    for batch in batches:
        yield batch
        if time.monotonic() > end:
            return
