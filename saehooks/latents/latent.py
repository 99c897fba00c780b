"""One latent of an index, and the places where it fires."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from saehooks.latents.result import Context, SurveyResult
from saehooks.latents.views import contexts_html
from saehooks.show import contexts as show
from saehooks.show.values import number, visible

SHOWN = 5
"""Contexts, tokens and neighbours in a terminal repr."""


@dataclass(frozen=True, eq=False, repr=False)
class Latent:
    """Everything an index knows of one latent: ``index[901]``."""

    index: SurveyResult
    latent: int

    @property
    def words(self) -> str:
        """Its name, or the different tokens where it is strongest."""
        return self.index.words(self.latent)

    @property
    def count(self) -> int:
        """Positions at which it was selected."""
        return int(self.index.counts[self.latent])

    @property
    def density(self) -> float:
        """Share of the positions at which it was selected."""
        return self.count / max(1, self.index.positions)

    @property
    def dead(self) -> bool:
        """Whether it was never selected."""
        return self.count == 0

    @property
    def typical(self) -> float:
        """Median of its values where selected."""
        return self.index.typical(self.latent)

    @property
    def mean(self) -> float:
        """Mean of its values where selected."""
        return float(self.index.mean[self.latent])

    @property
    def largest(self) -> float:
        """Its largest value."""
        return self.index.quantile(self.latent, 1.0)

    def quantile(self, q: float) -> float:
        """A quantile of its values where selected."""
        return self.index.quantile(self.latent, q)

    @property
    def contexts(self) -> list[Context]:
        """Where it is strongest, each place in another sequence."""
        return self.index.contexts(self.latent)

    @property
    def sampled(self) -> list[Context]:
        """Places drawn at random from all where it fires, strongest first."""
        return self.index.contexts(self.latent, sampled=True)

    @property
    def raises(self) -> list[tuple[str, float]]:
        """Tokens whose logits its direction raises most, with the change by one unit of it."""
        return self._tokens("raises")

    @property
    def lowers(self) -> list[tuple[str, float]]:
        """Tokens whose logits its direction lowers most."""
        return self._tokens("lowers")

    def _tokens(self, name: str) -> list[tuple[str, float]]:
        kept = getattr(self.index, name)
        if kept is None:
            return []
        pairs = zip(kept.latents[self.latent].tolist(), kept.similarity[self.latent].tolist(), strict=True)
        return [(self.index.piece(token), change) for token, change in pairs]

    @property
    def fires_with(self) -> list[tuple[int, float]]:
        """Latents that fire at the same positions, with the cosine of the firing patterns."""
        return self._neighbours("fired_with")

    @property
    def alike(self) -> list[tuple[int, float]]:
        """Latents whose directions point the same way, with the cosine."""
        return self._neighbours("alike")

    def _neighbours(self, name: str) -> list[tuple[int, float]]:
        kept = getattr(self.index, name)
        if kept is None:
            return []
        pairs = zip(kept.latents[self.latent].tolist(), kept.similarity[self.latent].tolist(), strict=True)
        return [(other, similarity) for other, similarity in pairs if other >= 0]

    def facts(self) -> str:
        """How often and how strongly, as one line."""
        positions = self.index.positions
        if self.dead:
            return f"never fired on {positions:,} positions"
        low, mid, high, most = (number(self.quantile(q)) for q in (0.05, 0.5, 0.95, 1.0))
        return (
            f"fires on {self.density:.3%} of {positions:,} positions; "
            f"values 5% {low}, 50% {mid}, 95% {high}, largest {most}"
        )

    def __repr__(self) -> str:
        lines = [f"latent {self.latent} of {self.index.site}: {self.words or 'no words'}", "  " + self.facts()]
        for title, pairs in (("raises", self.raises), ("lowers", self.lowers)):
            if pairs:
                words = "  ".join(f"{visible(piece)} {change:+.3g}" for piece, change in pairs[:SHOWN])
                lines.append(f"  {title}  {words}")
        for title, found in (("fires with", self.fires_with), ("points like", self.alike)):
            if found:
                near = "  ".join(f"{other} ({similarity:.2f})" for other, similarity in found[:SHOWN])
                lines.append(f"  {title}  {near}")
        lines += [f"  {number(context.value):>9}  {self._line(context)}" for context in self.contexts[:SHOWN]]
        return "\n".join(lines)

    def _line(self, context: Context) -> str:
        """A context on one line, its peak in brackets."""
        if context.tokens is None:
            label = self.index.word(context)
            return f"image {context.sequence}" + (f" ({label})" if label else "") + f", position {context.column}"
        pieces = [self.index.piece(token).replace("\n", "↵") for token in context.tokens]
        peak = pieces[context.peak]
        return f"…{''.join(pieces[: context.peak])}[{peak}]{''.join(pieces[context.peak + 1 :])}…"

    def _repr_html_(self) -> str:
        """Its figures, tokens, neighbours and contexts."""
        parts = [
            f'<div class="sh-latent"><b>latent {self.latent}</b> '
            f'<span class="sh-words">{escape(self.words)}</span></div>',
            f'<div class="sh-caption">{escape(self.index.site)} · {escape(self.facts())}</div>',
        ]
        if self.dead:
            return show.styled("".join(parts))
        parts.append(show.quantile_svg(self.index.quantiles[self.latent].tolist()))
        for title, pairs in (("raises", self.raises), ("lowers", self.lowers)):
            if pairs:
                chips = " ".join(
                    f"<code>{escape(visible(piece))}</code> {number(change)}" for piece, change in pairs[:8]
                )
                parts.append(f'<div class="sh-near">{title}: {chips}</div>')
        for title, found in (("fires with", self.fires_with), ("points like", self.alike)):
            if found:
                near = ", ".join(
                    f"{other} ({similarity:.2f}) <i>{escape(self.index.words(other, 2))}</i>"
                    for other, similarity in found[:6]
                )
                parts.append(f'<div class="sh-near">{title}: {near}</div>')
        strongest = self.contexts
        high = max((context.value for context in strongest), default=0.0)
        parts.append(contexts_html(self.index, "strongest", strongest, high))
        parts.append(contexts_html(self.index, "drawn at random", self.sampled, high))
        return show.styled("".join(parts))
