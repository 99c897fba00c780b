"""What a block recorded: the codes of each forward, and what is computed from them."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from saehooks import metrics
from saehooks.answers import no_attribute
from saehooks.codes import Codes, Top
from saehooks.errors import ConfigError, NeverFiredError
from saehooks.hosts.sequences import Columns
from saehooks.precision import widened
from saehooks.sparse_coder import SparseCoder
from saehooks.where import Where

ROWS_SHOWN = 12
"""Tokens in a terminal repr."""

TEXTS_SHOWN = 4
"""Rows of a batch in a notebook repr."""


ANSWERS = {
    **dict.fromkeys(
        ("feature_acts", "latents", "features", "activations", "sae_acts", "hook_sae_acts_post", "latent_acts", "z"),
        "write trace.codes, trace.codes.dense() or trace.top(k)",
    ),
    **dict.fromkeys(("values", "indices", "topk"), "write trace.top(k), or trace.codes.values"),
    **dict.fromkeys(("sae_out", "x_hat", "reconstruction", "recon", "hook_sae_output"), "write trace.recons"),
    **dict.fromkeys(("sae_error", "hook_sae_error", "residual"), "write trace.error"),
    **dict.fromkeys(("input", "sae_in", "x", "hidden_states", "resid"), "write trace.acts"),
    **dict.fromkeys(("output", "logits", "out"), "the model returns them: logits = model(tokens), inside the block"),
    **dict.fromkeys(("dense", "of", "counts"), "write trace.codes.dense(), .of(latent), .counts()"),
    **dict.fromkeys(
        ("value", "save"), "results are tensors when the call of the model returns: nothing is to be saved"
    ),
}
"""What to write, by the names of other libraries."""


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """The raw facts of one forward at one site."""

    site: str
    """Name of the site."""
    head: int | None
    """The one attention head, or None for all of them joined."""
    sae: SparseCoder
    """The SAE, which decodes ``codes``."""
    codes: Codes
    """(batch, pos) codes as the SAE reads them; detached unless ``grads``."""
    edited: Codes
    """(batch, pos) codes after the edits; detached unless ``grads``."""
    acts: Tensor
    """(batch, pos, d_in), the model's own tensor, detached and not copied."""
    columns: Columns
    """Which texts the (batch, pos) columns belong to, and their positions in them."""
    where: Where
    """The rule for positions."""
    mask: Tensor | None
    """(batch, pos) bool, where the attachment acts; None for everywhere."""
    tokenizer: Any
    """Turns tokens into text; None if the model has none."""
    grads: bool
    """Whether gradients at the latents are kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_stamp", _stamp(self.acts))

    @property
    def untouched_acts(self) -> Tensor:
        """The activations (batch, pos, d_in), unless the model has written over them since."""
        if not torch.equal(_stamp(self.acts), self._stamp):  # type: ignore[attr-defined]
            raise ConfigError(
                f"the model wrote over the activations of '{self.site}' after the site, so recons and error are lost; "
                "attach at the input of the next module, or use trace.codes"
            )
        return self.acts


class Forward:
    """One forward pass, as one site saw it. Reconstructions are decoded when they are asked for, and not kept."""

    def __init__(self, record: Record):
        self._kept = record

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name, ANSWERS)

    def __getitem__(self, name: Any) -> Any:
        raise ConfigError(
            f"this is the trace of one SAE, not a cache: write trace.codes, .recons, .error or .acts; got [{name!r}]"
        )

    __iter__ = None

    @property
    def _record(self) -> Record:
        return self._kept

    @property
    def site(self) -> str:
        """Name of the site."""
        return self._record.site

    @property
    def head(self) -> int | None:
        """The one attention head that the SAE reads, or None for all of them joined."""
        return self._record.head

    @property
    def sae(self) -> SparseCoder:
        """The SAE that made the codes."""
        return self._record.sae

    @property
    def codes(self) -> Codes:
        """Codes of shape (batch, pos): what the SAE reads, before any edit; detached unless ``grads=True``."""
        return self._record.codes.trimmed()

    @property
    def edited(self) -> Codes:
        """Codes after the edits, made where ``where`` holds; elsewhere the same as ``codes``."""
        return self._record.edited.trimmed()

    @property
    def grads(self) -> Codes:
        """Gradient of what ``backward`` was called on, at each value of ``edited``: Codes of the same support.

        Raises: ConfigError when the block has no ``grads=True``, or before ``backward``.
        """
        if not self._record.grads:
            raise ConfigError("no gradients were kept: attach with grads=True, as in sh.read(model, sae, grads=True)")
        grad = self.edited.values.grad
        if grad is None:
            raise ConfigError(
                "no gradient has reached these latents: call .backward() on a quantity that was computed "
                "after the site, with gradients enabled (not under torch.no_grad)"
            )
        return self.edited.with_values(grad).detach()

    @property
    def support_size(self) -> Tensor:
        """(batch, pos) int64, how many latents each token uses."""
        return self.codes.support_size

    @property
    def l0(self) -> float:
        """Mean number of latents at the positions where the attachment acts; NaN where there are none."""
        sizes = self.support_size if self.mask is None else self.support_size[self.mask]
        return float(widened(sizes).mean())

    @overload
    def top(self, k: int) -> Top: ...
    @overload
    def top(self, k: int, index: Any) -> Any: ...
    def top(self, k: int, index: Any = None) -> Any:
        """The k strongest latents of each token, ``(latents, values)`` of shape (batch, pos, k).

        Args:
            k: how many.
            index: a `saehooks.LatentIndex`: then a table that shows what the latents stand for.
        Raises:
            ConfigError: an index of another SAE or site.
        """
        return self.codes.top(k) if index is None else index.of_trace(self, k)

    @property
    def acts(self) -> Tensor:
        """(batch, pos, d_in), the site's activations as the model made them, detached."""
        return self._record.untouched_acts

    @property
    def recons(self) -> Tensor:
        """(batch, pos, d_in), the reconstruction by the unedited codes, in the SAE's dtype."""
        with torch.no_grad():
            return self._record.sae.frozen().decode(self.codes)

    @property
    def error(self) -> Tensor:
        """(batch, pos, d_in), ``acts - recons``: what the SAE misses."""
        recons = self.recons
        return self.acts.to(recons) - recons

    @property
    def nmse(self) -> float:
        """Squared error over squared norm, of the positions where the attachment acts; 0 is best."""
        recons = self.recons
        acts = self.acts.to(recons)
        if self.mask is not None:
            acts, recons = acts[self.mask.to(acts.device)], recons[self.mask.to(acts.device)]
        return metrics.nmse(acts, recons)

    @property
    def tokens(self) -> Tensor | None:
        """(batch, pos) int64, None for images and embeddings."""
        return self._record.columns.tokens

    @property
    def columns(self) -> Columns:
        """The columns of this forward: which texts they belong to, and where in them they are."""
        return self._record.columns

    @property
    def start(self) -> int | None:
        """Absolute column of the first one: not 0 under a KV cache; None where it cannot be known."""
        return self._record.columns.start

    @property
    def mask(self) -> Tensor | None:
        """(batch, pos) bool, where the attachment acted; None for everywhere. Padding is always False."""
        return self._record.mask

    def token_strings(self, row: int = 0) -> list[str]:
        """The tokens of one row as text; their positions where there are none."""
        record = self._record
        tokens = record.columns.tokens
        if tokens is None:
            return [str((record.columns.start or 0) + i) for i in range(record.codes.shape[1])]
        ids = tokens[row].tolist()
        return [str(i) if record.tokenizer is None else record.tokenizer.decode([i]) for i in ids]

    def __repr__(self) -> str:
        codes = self.codes
        sizes = codes.support_size if self.mask is None else codes.support_size[self.mask]
        mean = float(widened(sizes).mean()) if sizes.numel() else 0.0
        batch, pos = codes.shape
        head = (
            f"{type(self).__name__}('{self.site}', batch={batch}, pos={pos}, d_sae={codes.d_sae}, l0={mean:.1f}, "
            f"where={self._record.where!r})"
        )
        return head + (_table(self) if batch and pos else "")

    def _repr_html_(self) -> str:
        if not self.codes.sizes.numel():
            return html.escape(repr(self))
        from saehooks.show.html import tokens_html

        shown = []
        for row in range(min(len(self.codes), TEXTS_SHOWN)):
            top = self.codes[row].top(5)
            pairs = [
                [(latent, value) for latent, value in zip(*both, strict=True) if latent >= 0]
                for both in zip(top.latents.tolist(), top.values.tolist(), strict=True)
            ]
            caption = f"{self.site}: how many latents each token uses"
            shown.append(tokens_html(self.token_strings(row), self.support_size[row], top=pairs, caption=caption))
        return "".join(shown)


class Trace(Forward):
    """What a block records at one site: of the last forward, and of all in ``forwards`` under ``keep_all=True``.

    It holds the codes and a reference to the site's activations, so one (batch, pos, d_in) tensor stays
    in memory for the last forward, and one for each forward under ``keep_all=True``.
    """

    def __init__(self, site: str, keep_all: bool = False):
        self._site = site
        self.keep_all = keep_all
        """Whether every forward is kept, not the last alone."""
        self._records: list[Record] = []
        self.calls = 0
        """How many forwards went through the site."""

    def add(self, record: Record) -> None:
        """Record one forward."""
        self.calls += 1
        if not self.keep_all:
            self._records.clear()
        self._records.append(record)

    def run_again(self, columns: Columns, edited: Codes) -> None:
        """A recorded forward ran again to compute gradients: they reach these values where its own had no graph."""
        for i, record in enumerate(self._records):
            same = record.columns.text is columns.text and record.columns.number == columns.number
            if same and not record.edited.values.requires_grad:
                self._records[i] = replace(record, edited=edited)

    @property
    def site(self) -> str:
        return self._site

    @property
    def _record(self) -> Record:
        if not self._records:
            raise NeverFiredError(f"no forward has gone through '{self._site}' yet: call the model inside the block")
        return self._records[-1]

    @property
    def forwards(self) -> list[Forward]:
        """Every forward of the block, in order.

        Raises: ConfigError unless the block has ``keep_all=True``.
        """
        if not self.keep_all:
            raise ConfigError("only the last forward is kept: attach with keep_all=True to keep them all")
        return [Forward(record) for record in self._records]

    def __repr__(self) -> str:
        return super().__repr__() if self._records else f"Trace('{self._site}', no forward yet)"

    def _repr_html_(self) -> str:
        return super()._repr_html_() if self._records else html.escape(repr(self))


class Traces(Mapping[str, Trace]):
    """The traces of several sites, by the names they were attached under or by the sites' own names."""

    def __init__(self, traces: Mapping[Any, Trace]):
        self._traces = dict(traces)

    def __getitem__(self, name: Any) -> Trace:
        if name in self._traces:
            return self._traces[name]
        found = [trace for trace in self._traces.values() if trace.site == name]
        if len(found) != 1:
            raise KeyError(f"no trace of {name!r}; this block has {', '.join(map(repr, self._traces))}")
        return found[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._traces)

    def __len__(self) -> int:
        return len(self._traces)

    def __getattr__(self, name: str) -> Any:
        if hasattr(Trace, name) and not name.startswith("_"):
            first = next(iter(self.__dict__.get("_traces", {})), "site")
            raise no_attribute(self, name, {name: f"each site has its own: write traces[{first!r}].{name}"})
        raise no_attribute(self, name, {})

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self._traces.values())) or "Traces()"

    def _repr_html_(self) -> str:
        return "".join(trace._repr_html_() for trace in self._traces.values())


def _stamp(tensor: Tensor) -> Tensor:
    """A number that another one replaces when the tensor is written in place."""
    if not tensor.is_inference():
        return torch.tensor(tensor._version)
    # Under inference mode torch counts no writes: the bits of the values are summed, each with a weight of its place.
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()]).reshape(-1)
    return (bits * torch.arange(1, 2 * bits.numel(), 2, device=bits.device)).sum()


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _table(forward: Forward) -> str:
    """The first tokens of the first row, with their support size and strongest latents."""
    top, sizes = forward.codes[:1, :ROWS_SHOWN].top(3), forward.support_size[0].tolist()
    lines = ["", f"  {'pos':>5}  {'token':<14} {'support':>7}  strongest latents"]
    for i, token in enumerate(forward.token_strings()[:ROWS_SHOWN]):
        pairs = zip(top.latents[0, i].tolist(), top.values[0, i].tolist(), strict=True)
        strongest = "  ".join(f"{latent} ({value:.3g})" for latent, value in pairs if latent >= 0)
        lines.append(f"  {(forward.start or 0) + i:>5}  {repr(token)[1:-1][:14]:<14} {sizes[i]:>7}  {strongest}")
    if len(sizes) > ROWS_SHOWN:
        lines.append(f"  {'...':>5}  {len(sizes) - ROWS_SHOWN} more")
    return "\n".join(lines)
