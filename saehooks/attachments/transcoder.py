"""A transcoder at two sites: it reads the one, and what it predicts or its edits change is written to the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from saehooks.attachments.attachment import Attachment, Coded
from saehooks.attachments.resolve import check_width, written_by
from saehooks.errors import ConfigError, NeverFiredError, WidthError
from saehooks.hosts.base import Host
from saehooks.hosts.sequences import SequenceWatch
from saehooks.hosts.site import Site
from saehooks.sae import SparseCoder, Transcoder


@dataclass(frozen=True, eq=False)
class TranscoderAttachment(Attachment):
    """One transcoder between two sites of a forward. What its trace calls activations are those that it predicts."""

    out: Site = None  # type: ignore[assignment]
    """The site that it writes."""
    read: dict[int, Coded] = field(default_factory=dict)
    """What was read in each thread and not written yet."""

    def hooks(self, watch: SequenceWatch) -> list[tuple[Site, Callable[[Tensor], Tensor | None]]]:
        return [(self.site, partial(self.reading, watch)), (self.out, partial(self.writing, watch))]

    @property
    def places(self) -> list[tuple[Site, int]]:
        return [(self.out, self.sae.d_out)]

    def __call__(self, watch: SequenceWatch, acts: Tensor) -> Tensor | None:
        return self.writing(watch, acts)

    def reading(self, watch: SequenceWatch, acts: Tensor) -> None:
        """The hook at the site that it reads: takes acts (batch, pos, d_in) and changes nothing."""
        check_width(self.sae, self.site, acts.shape[-1])
        columns = watch.look(self.site, acts)
        with self._computing(acts):
            self.read[threading.get_ident()] = self._coded(columns, columns.arrange(acts))

    def writing(self, watch: SequenceWatch, acts: Tensor) -> Tensor | None:
        """The hook at the site that it writes: takes acts (batch, pos, d_out); returns what replaces them, or None."""
        if acts.shape[-1] != self.sae.d_out:
            raise WidthError(
                f"the transcoder writes d_out={self.sae.d_out}, but '{self.out.name}' is {acts.shape[-1]} wide"
            )
        columns, coded = watch.look(self.out, acts), self.read.pop(threading.get_ident(), None)
        if coded is None:
            if columns.again and not self.changes and not self.grads:
                return None
            again = " again while gradients are computed, without the site that it reads: checkpoint both together"
            raise ConfigError(
                f"'{self.out.name}', which the transcoder writes, was reached{again}"
                if columns.again
                else f"'{self.out.name}', which the transcoder writes, was reached before '{self.site.name}', which it "
                "reads: give the sites as at=(read, written)"
            )
        arranged = columns.arrange(acts)
        if tuple(arranged.shape[:2]) != tuple(coded.codes.shape):
            raise WidthError(
                f"the transcoder read {tuple(coded.codes.shape)} positions at '{self.site.name}', and "
                f"'{self.out.name}' carries {tuple(arranged.shape[:2])}"
            )
        with self._computing(acts):
            self._record(arranged, coded)
            new = self._written(arranged, coded)
        return None if new is None else columns.restore(new, acts)

    def check_used(self, calls: int) -> None:
        if self.read and not self.trace.calls:
            raise NeverFiredError(
                f"the transcoder read at '{self.site.name}', but no forward went through '{self.out.name}', which it "
                "writes"
            )
        super().check_used(calls)


def attachment_of(host: Host, site: Site, sae: SparseCoder, *given: Any, out: str | None = None) -> Attachment:
    """The attachment of an SAE at its site, or of a transcoder at its two.

    Args:
        host: the model.
        site: what it reads.
        sae: an SAE or a transcoder.
        given: the other fields of an `Attachment`.
        out: the site that a transcoder writes; the one that it knows if not given.
    Raises:
        ConfigError: a second site for an SAE.
        SiteError, WidthError: none that fits for a transcoder.
    """
    if isinstance(sae, Transcoder):
        return TranscoderAttachment(host, site, sae, *given, out=written_by(host, sae, out))  # type: ignore[misc]
    if out is not None:
        raise ConfigError(
            f"at=({site.requested_name!r}, {out!r}) names two sites; an SAE reads and writes one, a transcoder two"
        )
    return Attachment(host, site, sae, *given)
