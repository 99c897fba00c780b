"""What an effect is measured on: one number for each sequence or image, from the output of a forward.

A metric is any function ``(output) -> values`` or ``(output, batch) -> values``, where output is (batch, pos,
vocabulary) logits, or (batch, embed_dim) embeddings of a CLIP, and values is (batch,). The usual ones are here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saehooks.errors import ConfigError, NotFiniteError


@dataclass(frozen=True, eq=False)
class Batch:
    """The inputs of one forward, as a metric sees them."""

    inputs: Tensor
    """(batch, pos) tokens, or (batch, 3, height, width) images."""
    rows: Tensor
    """(batch,) int64, which sequence of the data each one is: what per-sequence answers are looked up by."""
    total: int
    """How many sequences the data has."""
    clean_output: Tensor
    """Output of the unedited forward; `clean` picks the sequences of this batch from it."""
    picked: Tensor | None = None
    """(batch,) int64 places in ``clean_output``; None where it is in the order of this batch."""

    @property
    def clean(self) -> Tensor:
        """(batch, ...), detached: what the unedited model put out for the same inputs."""
        return self.clean_output if self.picked is None else self.clean_output[self.picked]


@dataclass(frozen=True, eq=False)
class Metric:
    """A named metric."""

    name: str
    function: Callable[[Tensor, Batch], Tensor]
    flat: bool = False
    """Whether its gradient is zero at the clean run, as that of a divergence is: then only integrated gradients see
    anything."""
    next_token: bool = False
    """Whether it compares each logit with the token after it."""

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        """(batch,) values.

        Raises:
            ConfigError: another shape came out.
            NotFiniteError: NaN or infinity came out.
        """
        values, n = self.function(output, batch), len(batch.rows)
        if not isinstance(values, Tensor) or values.shape != (n,):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            hint = "; leave out the .mean() or .sum() over sequences" if got == "shape ()" else ""
            raise ConfigError(
                f"metric {self.name} returned {got}; expected one number per sequence, shape ({n},){hint}"
            )
        finite = values.detach().isfinite()
        if not bool(finite.all()):
            bad = sorted(set(batch.rows[~finite.to(batch.rows.device)].tolist()))
            shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            raise NotFiniteError(f"metric {self.name} is NaN or infinite for {len(bad)} sequences (rows {shown})")
        return values


def as_metric(metric: Any) -> Metric:
    """The metric for a name (``"ce"``, ``"kl"``, ``"cosine"``), a `Metric`, or a function.

    Raises:
        ConfigError: an unknown name, or something that cannot be called.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        named = {"ce": ce, "kl": kl, "cosine": embedding_cosine}
        if metric not in named:
            raise ConfigError(f"no metric {metric!r}; write one of {', '.join(map(repr, named))}, or a function")
        return named[metric]()
    if not callable(metric):
        raise ConfigError(f"a metric is a name or a function (output, batch) -> (batch,) values, got {metric!r}")
    name = getattr(metric, "__name__", type(metric).__name__)
    try:
        inspect.signature(metric).bind(None, None)
    except TypeError:
        return Metric(name, lambda output, batch: metric(output))
    except ValueError:  # a builtin without a signature
        pass
    return Metric(name, metric)


# ------------------------------------------------------------- language models


def ce() -> Metric:
    """Cross-entropy of the next token in nats, the mean over a sequence's positions."""

    def function(logits: Tensor, batch: Batch) -> Tensor:
        tokens = _tokens(batch, logits)
        # Row by row: no copy of all logits, and one row's log-probabilities in memory at a time.
        return torch.stack(
            [F.cross_entropy(row[:-1].float(), ids[1:]) for row, ids in zip(logits, tokens, strict=True)]
        )

    return Metric("ce", function, next_token=True)


def logit_difference(answers: Any, others: Any, *, position: int = -1) -> Metric:
    """Logit of the answer minus that of another token, at one position.

    Args:
        answers: (n,) token ids, one for each sequence of the data.
        others: the same, or (n, k): then minus the mean of their logits.
        position: where the answer is predicted; the last position by default.
    """
    answers, others = torch.as_tensor(answers), torch.as_tensor(others)

    def function(logits: Tensor, batch: Batch) -> Tensor:
        last = logits[:, position].float()
        right, wrong = (_per_row(one, batch, last.device) for one in (answers, others))
        right = right[:, None] if right.dim() == 1 else right
        wrong = wrong[:, None] if wrong.dim() == 1 else wrong
        return last.gather(-1, right).mean(-1) - last.gather(-1, wrong).mean(-1)

    return Metric("logit difference", function)


def log_prob(answers: Any, *, position: int = -1) -> Metric:
    """Log-probability of the answer at one position, in nats.

    Args:
        answers: (n,) token ids, one for each sequence of the data.
        position: where the answer is predicted; the last position by default.
    """
    answers = torch.as_tensor(answers)

    def function(logits: Tensor, batch: Batch) -> Tensor:
        last = logits[:, position].float().log_softmax(-1)
        return last.gather(-1, _per_row(answers, batch, last.device)[:, None])[:, 0]

    return Metric("log-probability", function)


def kl() -> Metric:
    """KL divergence in nats of the next-token distributions, clean || edited, the mean over positions.

    Its gradient at the clean run is zero, so attribution takes integrated gradients.
    """

    def function(logits: Tensor, batch: Batch) -> Tensor:
        rows = range(len(logits)) if batch.picked is None else batch.picked.tolist()
        pairs = [(now.float(), batch.clean_output[i].float()) for now, i in zip(logits, rows, strict=True)]
        divergences = [
            F.kl_div(now.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
            for now, clean in pairs
        ]
        return torch.stack(divergences)

    return Metric("kl", function, flat=True)


# ------------------------------------------------------------------------ CLIP


def class_logit(classes: Tensor, labels: Any, others: Any = None, *, scale: float = 100.0) -> Metric:
    """Zero-shot logit of a class, for images; or its difference with another class.

    Args:
        classes: (classes, embed_dim) embeddings, one for each class.
        labels: (n,) class of each image, or one class for all.
        others: the same, for the class to compare with; None for the logit itself.
        scale: of the cosine; CLIP's ``logit_scale.exp()``.
    """
    unit = F.normalize(classes.detach().float(), dim=-1)
    labels, others = torch.as_tensor(labels), None if others is None else torch.as_tensor(others)

    def function(embedding: Tensor, batch: Batch) -> Tensor:
        logits = scale * F.normalize(embedding.float(), dim=-1) @ unit.to(embedding.device).T
        chosen = logits.gather(-1, _per_row(labels, batch, logits.device)[:, None])[:, 0]
        if others is None:
            return chosen
        return chosen - logits.gather(-1, _per_row(others, batch, logits.device)[:, None])[:, 0]

    return Metric("class logit", function)


def embedding_cosine(target: Tensor | None = None) -> Metric:
    """Cosine of the embedding with a target (embed_dim,), or with the clean embedding of the same input.

    With the clean embedding its gradient at the clean run is zero, so attribution takes integrated gradients.
    """

    def function(embedding: Tensor, batch: Batch) -> Tensor:
        other = batch.clean if target is None else target.to(embedding.device).expand_as(embedding)
        return F.cosine_similarity(embedding.float(), other.float(), dim=-1)

    return Metric("cosine", function, flat=target is None)


def _tokens(batch: Batch, logits: Tensor) -> Tensor:
    tokens = batch.inputs
    if logits.dim() != 3 or tokens.shape != logits.shape[:2]:
        raise ConfigError(
            f"this metric needs logits of every token; got an output of shape {tuple(logits.shape)} "
            f"for inputs of shape {tuple(tokens.shape)}"
        )
    if tokens.shape[1] < 2:
        raise ConfigError("cross-entropy needs a next token: give sequences of at least 2 tokens, got 1")
    return tokens.to(logits.device)


def _per_row(values: Tensor, batch: Batch, device: torch.device) -> Tensor:
    """The values of this batch's sequences, out of one for each sequence of the data."""
    if values.dim() == 0:
        return values.to(device).expand(len(batch.rows))
    if len(values) != batch.total:
        raise ConfigError(f"one answer per sequence: got {len(values)} for {batch.total} sequences")
    return values.to(device)[batch.rows.to(device)]


def token_ids(tokenizer: Any, words: Sequence[str]) -> Tensor:
    """(n,) int64: the one token of each word, which must be one token as written, leading space included.

    Raises:
        ConfigError: a word takes several tokens.
    """
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    long = [word for word, one in zip(words, ids, strict=True) if len(one) != 1]
    if long:
        raise ConfigError(f"{long[0]!r} is not one token ({len(long)} such words); give words that are, like ' Paris'")
    return torch.tensor([one[0] for one in ids])
