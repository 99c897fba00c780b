"""The running figures of `measure`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saehooks.codes import Codes
from saehooks.errors import NeverFiredError
from saehooks.evaluation.comparison import Comparison
from saehooks.metrics import ReconstructionMeter
from saehooks.show import html, terminal

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

HISTORY = 1000
"""Rows of history kept; beyond that every second one is dropped, again and again."""


class Measurement:
    """The running figures of a `measure` block. It prints, shows itself in a notebook, and gives a plain dict.

    Sums are kept, never activations or logits, so memory does not grow with the number of calls.
    """

    def __init__(
        self,
        comparison: Comparison,
        meter: ReconstructionMeter,
        site: str,
        note: str = "",
        on_record: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.site = site
        """The site that is measured."""
        self.calls = 0
        """Calls of the model measured so far."""
        self.history: list[dict[str, float]] = []
        """The summary as it stood after each call, with the key ``calls``; thinned to at most 1000 rows."""
        self.note = f"{site} · {note}" if note else site
        """One line on what is spliced."""
        self.comparison = comparison
        """What is compared between the three runs."""
        self._meter, self._stride, self._on_record = meter, 1, on_record

    @property
    def labels(self) -> Tensor | None:
        """(batch,) int64 labels of the next call's images: set them before it, unless ``labels=`` gave them all."""
        return getattr(self.comparison, "labels", None)

    @labels.setter
    def labels(self, labels: Any) -> None:
        self.comparison.set_labels(labels)

    @property
    def support_sizes(self) -> Tensor:
        """(d_sae + 1,) int64 histogram: how many positions used 0, 1, 2, ... latents."""
        return self._meter.support_sizes

    def summary(self) -> dict[str, float]:
        """Everything measured so far, as a plain dict.

        Returns:
            For logits, in nats per prediction: ``ce_clean``, ``ce_spliced``, ``ce_zero``, ``ce_degradation`` (spliced -
            clean, 0 is best), ``ce_recovered`` ((zero - spliced) / (zero - clean), 1 is best), ``kl`` (clean ||
            spliced), ``n_predictions``, ``n_skipped`` (texts in which nothing is predicted, such as one token alone).
            For embeddings: ``cos_spliced``, ``cos_zero`` (cosine with the clean embedding), ``n_images`` or
            ``n_texts``, and with prompts and labels ``acc_clean``, ``acc_spliced``, ``acc_zero``. For both, of the
            activations that were spliced: ``nmse``, ``fvu`` (fraction of variance unexplained, centred), ``cosine``
            (of activation and reconstruction, 1 is best), ``shrinkage`` (norm of the reconstruction over that of the
            activation, 1 is best), ``reconstruction_bias`` (see `saehooks.metrics.reconstruction_bias`), ``l0``,
            ``l0_q05``, ``l0_median``, ``l0_q95``, ``dead`` (latents that never fired), ``n_tokens``.
        Raises:
            NeverFiredError: nothing was measured yet.
        """
        if not self.calls:
            raise NeverFiredError(f"nothing was measured at '{self.site}' yet: {self.comparison.how_to_call()}")
        site = self._meter.summary()
        rows = site.pop("rows")
        return {**self.comparison.summary(), **site, "n_tokens": rows}

    def compare_by(self, comparison: Comparison) -> None:
        """Use another comparison, before anything was measured."""
        self.comparison = comparison

    def add(self, acts: Tensor, recons: Tensor, codes: Codes) -> None:
        """Add what was spliced: acts and recons (n, d_in), codes (n,)."""
        self._meter.update(acts.to(recons), recons, codes)

    def after_call(self) -> None:
        """Record that one more call was measured."""
        self.calls += 1
        if self._on_record is not None:
            self._on_record({"step": self.calls, **self.summary()})
        if self.calls % self._stride == 0:
            self.history.append({"calls": self.calls, **self.summary()})
        if len(self.history) > HISTORY:
            self.history, self._stride = self.history[1::2], self._stride * 2

    def _figures(self) -> dict[str, Any]:
        """What does not exist once for each run, by the name a reader sees."""
        s, d_sae = self.summary(), self._meter.counts.numel()
        return {
            **self.comparison.figures(),
            "NMSE": s["nmse"],
            "variance unexplained": s["fvu"],
            "cosine, norm ratio": f"{s['cosine']:.4f}, {s['shrinkage']:.4f}",
            "L0 (5/50/95%)": f"{s['l0']:.1f} ({s['l0_q05']:.0f}/{s['l0_median']:.0f}/{s['l0_q95']:.0f})",
            "dead latents": f"{int(s['dead']):,} of {d_sae:,}",
            "tokens spliced": int(s["n_tokens"]),
        }

    def __rich__(self) -> Group | Text:
        from rich.console import Group
        from rich.text import Text

        if not self.calls:
            return Text(f"measure: nothing yet · {self.note}")
        table, figures = terminal.table(self.comparison.rows()), terminal.pairs(self._figures())
        return Group(table, Text(""), figures, Text(self.note, style="dim"))

    def __repr__(self) -> str:
        return terminal.render(self.__rich__())

    def _repr_html_(self) -> str:
        if not self.calls:
            return html.paragraph(f"measure: nothing yet · {self.note}")
        figures = [{"": name, "value": value} for name, value in self._figures().items()]
        return html.table_html(self.comparison.rows(), caption=self.note) + html.table_html(figures)
