"""One call of the model, run with the reconstruction at the site, with zeros there, and as it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from saehooks.attachments.attachment import Attachment
from saehooks.attachments.resolve import find
from saehooks.attachments.transcoder import TranscoderAttachment, attachment_of
from saehooks.errors import ConfigError
from saehooks.evaluation.comparison import Call, Comparison, Passage, passage_of
from saehooks.evaluation.embeddings import EmbeddingComparison
from saehooks.evaluation.logits import LogitsComparison
from saehooks.evaluation.measurement import Measurement
from saehooks.hosts import Host
from saehooks.hosts.partial_forward import CachedPrefix, equal_up_to_rounding
from saehooks.hosts.reruns import rerunning
from saehooks.hosts.sequences import SequenceWatch
from saehooks.hosts.train_mode import unsettled
from saehooks.sae import SparseCoder
from saehooks.trace import Forward, Trace
from saehooks.where import Came, where_of

Mode = Literal["off", "spliced", "zero"]


class _Now(threading.local):
    """The call that is being measured in one thread."""

    def __init__(self) -> None:
        self.running = False
        self.mode: Mode = "off"
        self.attachment: Attachment | None = None
        self.zeroed = 0
        """How often the site fired in the zero-ablated run."""

    def reset(self) -> None:
        """Forget the call that was measured."""
        self.running, self.mode, self.attachment, self.zeroed = False, "off", None, 0


class ThreeRuns:
    """Runs calls of a model three times, and compares.

    Args:
        sae, at, head, where: as in `saehooks.evaluation.measure`.
        resume_clean: the calls are ours, so that the clean run may start at the site too.
    """

    def __init__(
        self, host: Host, sae: SparseCoder, at: str | None, head: int | None, where: Any, *, resume_clean: bool
    ) -> None:
        self.host, self.site, self.resume_clean = host, find(host, sae, at, head), resume_clean
        rule = where_of(sae, where)
        trace = Trace(self.site.name, keep_all=True)
        self.attachment = attachment_of(host, self.site, sae, (), rule, "drop", False, trace, Came(rule))
        self._written = self.attachment.places[0][0]
        self.note = f"at {rule!r}"
        self._watch = SequenceWatch(host, of_reruns=True)
        self._now = _Now()
        self._settled = not any(unsettled(module) for module in host.model.modules())
        # With random numbers the runs must draw the same ones, from the first layer on.
        self._resume = self._settled
        self._tried_resuming = self._tried_changing = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block the site carries what the run asks for."""
        read = [(self.site, self._reading)] if isinstance(self.attachment, TranscoderAttachment) else []
        with self._watch.watching([*read, (self._written, self._hook)]):
            yield

    @property
    def is_running(self) -> bool:
        """Whether a call is being measured in this thread."""
        return self._now.running

    def check_used(self) -> None:
        """Raise WhereError if a position that was asked for never came."""
        self.attachment.came.check(self.site.name)

    # ------------------------------------------------------------------ one call

    def measured(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Measurement
    ) -> Any:
        """Run a call three times, compare, and return what the clean one returned."""
        self._now.running = True
        try:
            return self._measured(Call(forward, args, kwargs), result)
        finally:
            self._now.reset()

    def _measured(self, call: Call, result: Measurement) -> Any:
        _refuse_empty(call)
        result.comparison.check(call)
        now, prefix = self._now, CachedPrefix(self.host, self.site)
        output, seen = self._spliced(call, result, prefix)
        if not seen:  # another path through the model: nothing to compare
            return call()
        comparison = result.comparison
        passage = passage_of(self.host, call, seen[0].columns)
        targets = comparison.targets(call, passage, output)
        spliced, output = _tensor(comparison, output), None
        self._try_once(call, comparison, prefix, passage, targets, spliced)
        zero = comparison.reduce(_tensor(comparison, self._rerun(call, comparison, "zero", prefix)), targets)
        now.mode = "off"
        if self.resume_clean and self._resume and self._tried_resuming:
            answer = self._rerun(call, comparison, "off", prefix)
        else:
            prefix.forget()  # the whole forward needs the memory
            answer = call()
        clean = comparison.compared(answer)
        if clean is None or clean.shape != spliced.shape:  # a loss, or nothing
            clean = _tensor(comparison, self._rerun(call, comparison, "off"))
        with torch.no_grad():
            comparison.add(targets, clean.detach(), spliced, zero)
            for one in seen:
                inside = slice(None) if one.mask is None else one.mask
                result.add(one.acts[inside], one.recons[inside], one.codes[inside])
        result.after_call()
        return answer

    def _spliced(self, call: Call, result: Measurement, prefix: CachedPrefix) -> tuple[Any, list[Forward]]:
        """The output with the reconstruction at the site, and what was recorded each time the site fired."""
        now = self._now
        now.attachment, now.mode = self._attachment(), "spliced"
        with rerunning(self.host.model):
            if self._resume:
                with prefix.recording():
                    output = self._output(call, result)
            else:
                output = self._output(call, result)
        return output, now.attachment.trace.forwards

    def _output(self, call: Call, result: Measurement) -> Any:
        """The first output of a call; a model without logits is compared by its embedding from then on."""
        comparison = result.comparison
        output = comparison.rerun(call)
        if not result.calls and isinstance(comparison, LogitsComparison) and comparison.is_embedding(call, output):
            result.compare_by(EmbeddingComparison(self.host, "visual", None, None, None))
        else:
            _tensor(comparison, output)
        return output

    def _rerun(self, call: Call, comparison: Comparison, mode: Mode, prefix: CachedPrefix | None = None) -> Any:
        self._now.mode, self._now.zeroed = mode, 0
        with rerunning(self.host.model):
            if prefix is None or not self._resume or not prefix.usable:
                return comparison.rerun(call)
            with prefix.resuming():
                return comparison.rerun(call)

    def _try_once(
        self,
        call: Call,
        comparison: Comparison,
        prefix: CachedPrefix,
        passage: Passage,
        targets: Any,
        spliced: Tensor,
    ) -> None:
        """At the first call, see that starting at the site changes nothing, and that logits predict what comes next.

        Raises:
            ConfigError: a logit depends on a later token.
        """
        recorded = self._now.attachment
        if self._resume and not self._tried_resuming:
            self._tried_resuming = True
            self._resume = _same_rows(_tensor(comparison, self._spliced_again(call, comparison, prefix)), spliced)
        if self._settled and not self._tried_changing and isinstance(comparison, LogitsComparison):
            changed = comparison.with_other_ends(call, passage, targets)
            if changed is not None:
                self._tried_changing = True
                output = _tensor(comparison, self._spliced_again(changed, comparison))
                comparison.check_next_token(targets, spliced, output)
        self._now.attachment = recorded

    def _spliced_again(self, call: Call, comparison: Comparison, prefix: CachedPrefix | None = None) -> Any:
        """The output with the reconstruction at the site; what the site carried is not kept."""
        self._now.attachment = self._attachment()
        return self._rerun(call, comparison, "spliced", prefix)

    def _attachment(self) -> Attachment:
        """What puts the reconstruction at the site, with a trace of its own."""
        return replace(self.attachment, trace=Trace(self.site.name, keep_all=True))

    # ------------------------------------------------------------------ the site

    def _reading(self, acts: Tensor) -> None:
        """The hook at the site that a transcoder reads."""
        now = self._now
        if now.mode == "spliced" and isinstance(now.attachment, TranscoderAttachment):
            now.attachment.reading(self._watch, acts)

    def _hook(self, acts: Tensor) -> Tensor | None:
        now = self._now
        if now.attachment is None or now.mode == "off":
            return None
        if now.mode == "spliced":
            return now.attachment(self._watch, acts)
        columns = self._watch.look(self._written, acts)
        forwards = now.attachment.trace.forwards
        mask = forwards[min(now.zeroed, len(forwards) - 1)].mask  # the places where the reconstruction was
        now.zeroed += 1
        if mask is None:
            return torch.zeros_like(acts)
        return columns.restore(columns.arrange(acts).masked_fill(mask.to(acts.device)[..., None], 0.0), acts)


def _tensor(comparison: Comparison, output: Any) -> Tensor:
    found = comparison.compared(output)
    if found is None:
        raise ConfigError(f"{comparison.nothing_found}: {comparison.how_to_call()}")
    return found


def _same_rows(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are the same up to rounding, row by row: no copy of all of them is made."""
    return one.shape == other.shape and all(equal_up_to_rounding(*rows) for rows in zip(one, other, strict=True))


def _refuse_empty(call: Call) -> None:
    empty = next((tensor for tensor in call.tensors if not tensor.numel()), None)
    if empty is not None:
        raise ConfigError(f"nothing to measure in an empty batch: got a tensor of shape {tuple(empty.shape)}")
