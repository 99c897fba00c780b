"""The comparison of models that put out logits: language models by the next token, others by their labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saehooks.errors import ConfigError
from saehooks.evaluation.comparison import Call, Comparison, Passage
from saehooks.evaluation.embeddings import embedding_of
from saehooks.evaluation.objective import Objective
from saehooks.hosts import Host
from saehooks.hosts.caches import find_cache

ROWS_AT_ONCE = 256
"""Rows of logits turned into log-probabilities at a time, so that memory stays at rows x vocabulary."""

IGNORED = -100
"""The label that is left out of a loss, as in `torch.nn.functional.cross_entropy`."""

SAME_LOSS = 2e-3
"""Largest relative difference between a model's own loss and the cross-entropy of its logits in lower precision."""

PARTIAL = ("stop_at_layer", "start_at_layer")


class Targets(NamedTuple):
    """What logits should predict."""

    ids: Tensor
    """(batch, n) int64, for the first n columns of the logits."""
    keep: Tensor
    """(batch, n) bool, which of them count."""
    by_labels: bool
    """Whether they are the call's labels; otherwise they are the next tokens."""


class LogitsComparison(Comparison):
    """Cross-entropy and KL divergence in nats, weighted by what is predicted.

    Args:
        host: the model.
    """

    nothing_found = "no logits of shape (batch, pos, vocabulary), or of a row for each input, came out of this call"

    def __init__(self, host: Host) -> None:
        self.host, self.objective = host, Objective(host.model)
        self._sums = torch.zeros(4, dtype=torch.float64)  # CE clean, CE spliced, CE zero, KL
        self._predictions = self._skipped = 0

    def entry_points(self) -> Iterable[tuple[nn.Module, str]]:
        return self.host.entry_points()

    def check(self, call: Call) -> None:
        given = call.given
        if any(given.get(name) is not None for name in PARTIAL):
            raise ConfigError("measure needs whole forward passes, from tokens to logits: leave out stop_at_layer=")
        if find_cache(given.items()) is not None:
            raise ConfigError(
                "measure runs each call three times, which a KV cache does not survive: call model(tokens) on whole "
                "sequences, and generate outside the block"
            )

    def rerun(self, call: Call) -> Any:
        return call.asking(return_type="logits", use_cache=False, return_dict=True)()

    def compared(self, output: Any) -> Tensor | None:
        """(batch, pos, vocabulary) logits, or (batch, classes)."""
        found = getattr(output, "logits", output)
        candidates = found if isinstance(found, (tuple, list)) else (found,)
        return next((one for one in candidates if isinstance(one, Tensor) and one.dim() in (2, 3)), None)

    def is_embedding(self, call: Call, output: Any) -> bool:
        """Whether a model that was given pictures, and no labels, put out one row for each."""
        pictures = any(tensor.dim() >= 4 for tensor in call.tensors)
        unlabelled = call.given.get("labels") is None and self.objective.why_labels is None
        return pictures and unlabelled and embedding_of(output) is not None

    # ---------------------------------------------------------- what is predicted

    def targets(self, call: Call, passage: Passage, output: Any) -> Targets:
        """By the labels of the call, counted as the model's own loss counts them; else the next tokens."""
        logits, labels = self.compared(output), call.given.get("labels")
        if logits is None:
            raise ConfigError("no logits came out of this call")
        return self._next_tokens(passage, logits) if labels is None else self._by_labels(labels, logits, output)

    def _next_tokens(self, passage: Passage, logits: Tensor) -> Targets:
        why = self.objective.why_labels
        if why is not None or logits.dim() == 2:
            why = why or "its logits are one row for each input"
            raise ConfigError(f"measure cannot compare this model by the next token: {why}. Call it with labels=")
        tokens = passage.tokens
        if tokens is None:
            raise ConfigError(
                "cross-entropy needs token ids, and this call had none: call model(tokens), not embeddings"
            )
        if tokens.shape != logits.shape[:2]:
            raise ConfigError(
                f"logits of shape {tuple(logits.shape)} do not belong to tokens of shape {tuple(tokens.shape)}: "
                "ask the model for the logits of every position, or call it with labels="
            )
        ids = tokens[:, 1:].to(logits.device)
        keep = torch.ones_like(ids, dtype=torch.bool) if passage.follows is None else passage.follows.to(ids.device)
        return Targets(ids, keep, by_labels=False)

    def _by_labels(self, labels: Any, logits: Tensor, output: Any) -> Targets:
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            raise ConfigError("measure compares by labels that are classes or tokens, as whole numbers")
        labels = labels.to(logits.device)
        if logits.dim() == 2 and labels.shape[:1] == logits.shape[:1] and labels.numel() == len(logits):
            fitting = [labels.reshape(-1, 1)]
        elif logits.dim() == 3 and labels.shape == logits.shape[:2]:
            fitting = [labels[:, 1:], labels]  # of the next column, as in a causal model, or of the same
        else:
            raise ConfigError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
        choices = [Targets(ids, ids != IGNORED, by_labels=True) for ids in fitting]
        return choices[0] if len(choices) == 1 else self._as_the_loss_does(choices, logits, output)

    def _as_the_loss_does(self, choices: list[Targets], logits: Tensor, output: Any) -> Targets:
        """Of two ways to read labels, the one that gives the model's own loss."""
        shifts = self.objective.shifts_labels
        if shifts is not None:
            choices = choices if shifts else choices[::-1]
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            for one in choices:
                mean = float(self._cross_entropy(logits, one)) / max(1, int(one.keep.sum()))
                if abs(mean - float(loss)) <= SAME_LOSS * max(1e-3, abs(float(loss))):
                    return one
        if shifts is None:
            raise ConfigError(
                "which logits these labels belong to cannot be told: the model's own loss is neither the cross-entropy "
                "of the same columns nor of the next ones"
            )
        return choices[0]

    def with_other_ends(self, call: Call, passage: Passage, targets: Targets) -> Call | None:
        """The call with the last token of each text changed; None where there is no need, or no way, to try it."""
        if targets.by_labels or passage.tokens is None or not bool(targets.keep.any()):
            return None
        return call.instead(passage.tokens, _with_other_ends(passage.tokens, targets.keep))

    def check_next_token(self, targets: Targets, before: Tensor, changed: Tensor) -> None:
        """Raise ConfigError when a logit (batch, pos, vocabulary) depends on a token after it."""
        if not _same_rows(before, changed, targets.keep):
            raise ConfigError(
                "measure cannot compare this model by the next token: its logits at earlier tokens change when the "
                "last one does, so it sees what it would have to predict. Call it with labels="
            )

    # ------------------------------------------------------------------- the sums

    def reduce(self, output: Tensor, targets: Targets) -> Tensor:
        return self._cross_entropy(output, targets)

    def _cross_entropy(self, logits: Tensor, targets: Targets) -> Tensor:
        """() float64, summed over what is predicted."""
        total = torch.zeros((), dtype=torch.float64)
        for rows, ids in chunks(targets, logits):
            total += F.cross_entropy(rows.float(), ids, reduction="sum").cpu().double()
        return total

    def add(self, targets: Targets, clean: Tensor, spliced: Tensor, zero: Tensor) -> None:
        sums = torch.zeros(3, dtype=torch.float64)
        for (now, ids), (then, _) in zip(chunks(targets, clean), chunks(targets, spliced), strict=True):
            log_clean, log_spliced = now.float().log_softmax(-1), then.to(now.device).float().log_softmax(-1)
            ce = [F.nll_loss(log, ids, reduction="sum") for log in (log_clean, log_spliced)]
            kl = F.kl_div(log_spliced, log_clean, reduction="sum", log_target=True)
            sums += torch.stack([*ce, kl]).cpu().double()
        self._sums += torch.stack([sums[0], sums[1], zero, sums[2]])
        self._predictions += int(targets.keep.sum())
        self._skipped += int((~targets.keep.any(1)).sum())

    @property
    def nothing_compared(self) -> str | None:
        if self._predictions or not self._skipped:
            return None
        return f"nothing is predicted in any of the {self._skipped} texts: give texts of at least 2 tokens, or labels"

    def summary(self) -> dict[str, float]:
        nothing = [float("nan")] * 4
        clean, spliced, zero, kl = (self._sums / self._predictions).tolist() if self._predictions else nothing
        lost = zero - clean
        return {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_zero": zero,
            "ce_degradation": spliced - clean,
            "ce_recovered": (zero - spliced) / lost if lost else float("nan"),
            "kl": kl,
            "n_predictions": self._predictions,
            "n_skipped": self._skipped,
        }

    def rows(self) -> list[dict[str, Any]]:
        s = self.summary()
        three = {"clean": s["ce_clean"], "spliced": s["ce_spliced"], "zero-ablated": s["ce_zero"]}
        return [{"": "cross-entropy (nats)", **three}]

    def figures(self) -> dict[str, Any]:
        s = self.summary()
        skipped = {"texts skipped": s["n_skipped"]} if s["n_skipped"] else {}
        return {
            "CE degradation": s["ce_degradation"],
            "CE recovered": f"{s['ce_recovered']:.1%}",
            "KL (clean || spliced)": s["kl"],
            "tokens predicted": s["n_predictions"],
            **skipped,
        }

    def how_to_call(self) -> str:
        return "call model(tokens) inside the block"


def chunks(targets: Targets, logits: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """(n, vocabulary) logits and (n,) targets of what counts, a few rows at a time."""
    if logits.dim() == 2:
        logits = logits[:, None]
    for part in targets.keep.nonzero().split(ROWS_AT_ONCE):
        row, column = part.to(logits.device).unbind(1)
        yield logits[row, column], targets.ids.to(logits.device)[row, column]


def _with_other_ends(tokens: Tensor, keep: Tensor) -> Tensor:
    """The same tokens but for the last one of each text, which is another."""
    columns = torch.arange(keep.shape[1], device=tokens.device)
    last = torch.where(keep.to(tokens.device), columns + 1, 0).amax(1, keepdim=True)
    old = tokens.gather(1, last)
    return tokens.scatter(1, last, torch.where(old == 0, 1, 0).to(tokens.dtype))


def _same_rows(one: Tensor, other: Tensor, keep: Tensor) -> bool:
    """Whether logits are equal, up to rounding, at the columns that count."""
    tolerance = min(0.05, 32 * torch.finfo(one.dtype).eps)
    for part in keep.nonzero().split(ROWS_AT_ONCE):
        row, column = part.to(one.device).unbind(1)
        before, after = one[row, column], other[row, column]
        if bool((before - after).abs().max() > tolerance * before.abs().max()):
            return False
    return True
