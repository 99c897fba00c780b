"""Data in, outputs out: batches of equal length, and a forward of any model family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saehooks.attachments.attachment import Attachment
from saehooks.attachments.request import check
from saehooks.attachments.resolve import find
from saehooks.attachments.transcoder import attachment_of
from saehooks.causal.metric import Metric
from saehooks.causal.words import Origin
from saehooks.codes import Codes
from saehooks.edits import EditFunction
from saehooks.errors import ConfigError, WhereError
from saehooks.evaluation.batches import rows_at_once
from saehooks.evaluation.embeddings import embedding_of
from saehooks.evaluation.objective import Objective
from saehooks.hosts import Host
from saehooks.hosts import host as host_of
from saehooks.hosts.sequences import SequenceWatch
from saehooks.hosts.torch_compile import uncompiled
from saehooks.hosts.towers import two_towers
from saehooks.sae import SparseCoder
from saehooks.streams import prompt_tokens
from saehooks.trace import Trace
from saehooks.where import Came, Mask, Where, where_of


class Inputs(NamedTuple):
    """Part of the data: sequences of one length, or images."""

    inputs: Tensor
    """(batch, pos) tokens, or (batch, 3, height, width) images."""
    rows: Tensor
    """(batch,) int64, their numbers in the data."""


class Data(NamedTuple):
    """All of the data, cut into batches."""

    batches: list[Inputs]
    total: int
    """Number of sequences or images."""


def as_data(host: Host, given: Any, batch_size: int | None = None) -> Data:
    """Cut data into batches of equal length.

    Args:
        given: (n, pos) tokens; (n, 3, height, width) images; a list of texts, which the model's own tokenizer reads
            and a BOS opens; a list of token lists; what a tokenizer returns, whose padding is left out; or batches of
            any of these, as a loader gives them.
        batch_size: sequences in a forward; by default as many as make about 1,024 tokens, or 64 images.
    Raises:
        ConfigError: there is nothing in it, or something else.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    pieces = list(_pieces(host, given))
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for row, piece in enumerate(pieces):
        by_shape.setdefault(tuple(piece.shape), []).append(row)
    if not pieces or any(not piece.numel() for piece in pieces):
        raise ConfigError("there is nothing to measure: the data holds no sequence, or an empty one")
    batches = []
    for shape, rows in by_shape.items():
        size = batch_size or rows_at_once(shape)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batches.append(Inputs(torch.stack([pieces[row] for row in part]), torch.tensor(part)))
    return Data(batches, len(pieces))


def _pieces(host: Host, given: Any) -> Iterator[Tensor]:
    """One tensor for each sequence (pos,) or image (3, height, width)."""
    if isinstance(given, Mapping):
        yield from _pieces_of_mapping(host, given)
    elif hasattr(given, "__array__"):
        yield from _rows_of_tensor(torch.as_tensor(given))
    elif isinstance(given, str):
        yield prompt_tokens(host.tokenizer, given)
    elif isinstance(given, Iterable):
        for one in given:
            yield from _pieces_of_item(host, one)
    else:
        raise ConfigError(f"data must be tokens, images, texts or batches of them, got {type(given).__name__}")


def _rows_of_tensor(given: Tensor) -> Iterator[Tensor]:
    if given.dim() not in (2, 4) or (given.dim() == 2) != _whole_numbers(given):
        raise ConfigError(
            f"data must be tokens (n, pos) or images (n, 3, height, width), got {given.dtype} of shape "
            f"{tuple(given.shape)}"
        )
    yield from given


def _pieces_of_item(host: Host, one: Any) -> Iterator[Tensor]:
    """The sequences of one item of an iterable: a text, a list of tokens, a batch, or a loader's (images, labels)."""
    if isinstance(one, (str, Mapping)):
        yield from _pieces(host, one)
    elif isinstance(one, (list, tuple)) and one and not isinstance(one[0], Tensor) and hasattr(one[0], "__index__"):
        yield torch.tensor([token.__index__() for token in one])
    elif isinstance(one, (list, tuple)) and one and isinstance(one[0], (Tensor, Mapping)):
        yield from _pieces_of_item(host, one[0])
    elif hasattr(one, "__array__"):
        tensor = torch.as_tensor(one)
        yield from [tensor] if tensor.dim() == 1 and _whole_numbers(tensor) else _rows_of_tensor(tensor)
    else:
        raise ConfigError(f"data must be tokens, images, texts or batches of them, got {type(one).__name__}")


NOT_GIVEN = ("special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length", "num_truncated_tokens")
"""What a tokenizer may return and no model is given."""


def _pieces_of_mapping(host: Host, given: Mapping[str, Any]) -> Iterator[Tensor]:
    """The sequences in what a tokenizer or an image processor returns, each without its padding."""
    found = {name: value for name, value in given.items() if name not in NOT_GIVEN and value is not None}
    if "pixel_values" in found and len(found) == 1:
        yield from _pieces(host, found["pixel_values"])
        return
    if "input_ids" not in found:
        raise ConfigError(f"data must hold input_ids or pixel_values, got a mapping of {', '.join(found) or 'nothing'}")
    rows = list(_token_rows(found.pop("input_ids")))
    masks = [row.bool() for row in _token_rows(found.pop("attention_mask", [torch.ones_like(row) for row in rows]))]
    if [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise ConfigError("input_ids and attention_mask must have one shape")
    for name, value in found.items():
        _refuse_unless_implied(name, list(_token_rows(value)), rows, masks)
    for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        real = mask.nonzero()[:, 0]
        if len(real) and int(real[-1] - real[0]) + 1 != len(real):
            raise ConfigError(f"the attention_mask of text {i} has a gap: padding must be on one side")
        yield row[mask]


def _token_rows(given: Any) -> Iterator[Tensor]:
    """(pos,) for each text, of a tensor or nested lists; one text alone may come without its batch axis."""
    rows = [torch.as_tensor(one) for one in given]
    if rows and all(row.dim() == 0 for row in rows):
        rows = [torch.stack(rows)]
    if any(row.dim() != 1 for row in rows):
        raise ConfigError(f"what a tokenizer returns must be (n, pos), got {tuple(rows[0].shape)} for one text")
    yield from rows


def _refuse_unless_implied(name: str, values: list[Tensor], rows: list[Tensor], masks: list[Tensor]) -> None:
    """Leave out what the model assumes without it; refuse what would change what it does."""
    implied = {
        "token_type_ids": lambda row, mask: torch.zeros_like(row),
        "position_ids": lambda row, mask: (mask.cumsum(0) - 1).clamp(min=0),
        "labels": lambda row, mask: row,
    }.get(name)
    same = implied is not None and [len(v) for v in values] == [len(row) for row in rows]
    if same and all(
        bool((value[mask] == implied(row, mask)[mask]).all())  # type: ignore[misc]
        for value, row, mask in zip(values, rows, masks, strict=True)
    ):
        return
    raise ConfigError(
        f"{name} in the data would be lost: each text is run by its tokens alone. Leave it out, or give tokens and "
        f"run=lambda tokens: model(tokens, {name}=...)"
    )


def _whole_numbers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


class Place:
    """Where latents are ablated: a site of a model, an SAE and a rule for positions, over many forwards.

    Args:
        where: as in `saehooks.attachments.attach`.
    """

    def __init__(self, model: Any, sae: SparseCoder, at: str | None, head: int | None, where: Any) -> None:
        self.host = host_of(model)
        self.sae, self.site = sae, find(self.host, sae, at, head)
        self.where = where_of(sae, where)
        self._came, self._calls = Came(self.where), 0
        self._last: Attachment | None = None

    @property
    def origin(self) -> Origin:
        """Which latents these are, to tell an index of others by."""
        return Origin(self.site.name, self.site.head, self.sae.fingerprint())

    @contextmanager
    def attached(
        self,
        edits: tuple[EditFunction, ...] = (),
        error: Literal["keep", "drop"] = "keep",
        grads: bool = False,
        known: tuple[Codes, Tensor | None] | None = None,
        rows: Tensor | None = None,
    ) -> Iterator[Trace]:
        """The SAE attached to every forward in the block, each time it fires recorded.

        Args:
            known: codes and mask of the first time it fires, where they are known.
            rows: (batch,) int64, which sequences of the data these are: a mask (n, pos) is of all of them.
        """
        watch, trace = SequenceWatch(self.host), Trace(self.site.name, keep_all=True)
        asked = (self._rule(rows), error, grads)
        attachment = attachment_of(self.host, self.site, self.sae, edits, *asked, trace, self._came, known)
        check([attachment])
        with uncompiled(), watch.watching(attachment.hooks(watch)):
            yield trace
        self._last, self._calls = attachment, self._calls + watch.calls

    def _rule(self, rows: Tensor | None) -> Where:
        """Where to act in some sequences of the data."""
        given = self.where.given if isinstance(self.where, Mask) else None
        if rows is None or given is None or given.dim() == 1 or len(given) == 1:
            return self.where
        if int(rows.max()) >= len(given):
            raise WhereError(f"where has shape {tuple(given.shape)}; expected a row for each sequence of the data")
        return Mask(given[rows.to(given.device)])

    def check_used(self) -> None:
        """Complain about a site that never fired, or a position that no forward of the data had."""
        if self._last is not None:
            self._last.check_used(self._calls)


Run = Callable[[Tensor], Tensor]
"""From inputs to the output that metrics see."""


def runner(host: Host, run: Callable[[Tensor], Any] | None = None) -> Run:
    """A function from inputs to the output that metrics see: logits (batch, pos, vocabulary), or embeddings of a
    CLIP."""
    model: Any = host.model
    if run is not None:
        call: Callable[[Tensor], Any] = run
    elif host.family == "transformer_lens":
        call = lambda inputs: model(inputs, return_type="logits")  # noqa: E731
    elif host.family == "open_clip" or two_towers(model) is not None:
        call = host.run
    else:
        options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        call = lambda inputs: model(inputs, **options)  # noqa: E731
    return lambda inputs: _tensor_of(call(host.to_device(inputs)))


def _tensor_of(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    candidates = found if isinstance(found, (tuple, list)) else (found,)
    tensor = next((one for one in candidates if isinstance(one, Tensor)), embedding_of(output))
    if tensor is None:
        raise ConfigError(
            f"the model returned {type(output).__name__} without a tensor; pass run=, a function from inputs to output"
        )
    return tensor


def check_metric(place: Place, metric: Metric) -> None:
    """Refuse the next token's cross-entropy of a model that does not predict the next token.

    Raises:
        ConfigError: its class says so.
    """
    why = Objective(place.host.model).why_labels
    if metric.next_token and why is not None:
        raise ConfigError(f"metric {metric.name} is of the next token, but {why}: give a metric of your own")
