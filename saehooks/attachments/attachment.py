"""One SAE at one site: what the hook there does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from saehooks import edits as edit
from saehooks import kernels
from saehooks.attachments.resolve import check_width
from saehooks.codes import Codes
from saehooks.edits import Context, EditFunction
from saehooks.errors import NeverFiredError
from saehooks.hosts.base import Host
from saehooks.hosts.sequences import Columns, SequenceWatch
from saehooks.hosts.site import Site
from saehooks.sae import SparseCoder, autocast_off
from saehooks.trace import Record, Trace
from saehooks.where import Came, View, Where, full_mask

FEW_SCORES = 2**19
"""Scores (tokens x d_sae) up to which codes may have room for every latent: 8 MB."""


class Coded(NamedTuple):
    """What the SAE made of the activations of one forward."""

    sae: SparseCoder
    """The SAE, frozen."""
    codes: Codes
    """(batch, pos) codes as the SAE reads them."""
    original: Codes
    """(batch, pos) codes that the edited ones are compared with."""
    edited: Codes
    """(batch, pos) codes after the edits."""
    view: View
    """The forward, as rules for positions see it."""
    mask: Tensor | None
    """(batch, pos) bool, where the attachment acts; None for everywhere."""


@dataclass(frozen=True, eq=False)
class Attachment:
    """One SAE at one site: what the hook there does."""

    host: Host
    """The model."""
    site: Site
    """Where the SAE reads, activations (batch, pos, d_in)."""
    sae: SparseCoder
    """The SAE, as the user gave it."""
    edits: tuple[EditFunction, ...]
    """Functions from Codes (batch, pos) to Codes of the same shape, run in order."""
    where: Where
    """The rule for positions: a bool mask (batch, pos) for each forward."""
    error: Literal["keep", "drop"]
    """``"keep"`` adds what the edits change, (batch, pos, d_in), to the activations; ``"drop"`` replaces them."""
    grads: bool
    """Whether the gradient at each latent is kept, Codes (batch, pos)."""
    trace: Trace
    """Records each forward."""
    came: Came
    """Which of the positions that ``where`` asks for came."""
    known: tuple[Codes, Tensor | None] | None = None
    """What the SAE gives the first time it fires and where it acts then, for a caller who knows both."""

    def hooks(self, watch: SequenceWatch) -> list[tuple[Site, Callable[[Tensor], Tensor | None]]]:
        """The hooks: each site, and the function that is called on its activations (batch, pos, width)."""
        return [(self.site, partial(self, watch))]

    @property
    def places(self) -> list[tuple[Site, int]]:
        """The sites that it writes to, which no other SAE of the block may, with the width that must fit."""
        return [(self.site, self.sae.d_in)]

    @property
    def changes(self) -> bool:
        """Whether the site may carry something else than the model put there."""
        return bool(self.edits) or self.error == "drop"

    def __call__(self, watch: SequenceWatch, acts: Tensor) -> Tensor | None:
        """The hook: takes what the site carries, (batch, pos, width); returns what replaces it, or None."""
        check_width(self.sae, self.site, acts.shape[-1])
        columns = watch.look(self.site, acts)
        if columns.again and not self.changes and not self.grads:
            return None
        new = self._replaced(columns, columns.arrange(acts))
        return None if new is None else columns.restore(new, acts)

    def _replaced(self, columns: Columns, acts: Tensor) -> Tensor | None:
        """What takes the place of ``acts``, (batch, pos, d_in)."""
        with self._computing(acts):
            coded = self._coded(columns, acts)
            self._record(acts, coded)
            return self._written(acts, coded)

    @contextmanager
    def _computing(self, acts: Tensor) -> Iterator[None]:
        """Inside the block the SAE computes in its own dtype, with an autograd graph where one is needed."""
        graph = torch.is_grad_enabled() and (self.changes or self.grads)
        with torch.set_grad_enabled(graph), autocast_off(acts.device):
            yield

    def _coded(self, columns: Columns, acts: Tensor) -> Coded:
        """Codes of activations (batch, pos, d_in), before and after the edits."""
        sae = self.sae.frozen()
        known = self.known if not self.trace.calls else None
        codes = sae.encode(acts, step=self._step(acts)) if known is None else known[0]
        view = View(columns, codes.detach(), self.host.tokenizer)
        mask = full_mask(self.where, view) if known is None else known[1]
        original, edited = codes, self._edit(codes, view, mask)
        if torch.is_grad_enabled() and self.grads:
            # Nothing edited: cut from the inputs, so that their gradient is the model's own to the last bit.
            original, edited = (codes, edited) if self.changes else (codes.detach(),) * 2
            edited = _with_kept_grad(edited)
        return Coded(sae, codes, original, edited, view, mask)

    def _written(self, acts: Tensor, coded: Coded) -> Tensor | None:
        """What takes the place of the activations (batch, pos, d_out) that the SAE writes to; None for the same."""
        if self.error == "drop":
            return self._reconstructed(coded.sae, acts, coded.edited, coded.mask)
        if coded.edited is coded.original:
            return None
        return self._moved(coded.sae, acts, coded.original, coded.edited, coded.mask)

    def _step(self, acts: Tensor) -> kernels.Step:
        """How the codes are laid out. Edits and gradients, which users see, and traces that pile up take no padding.

        On a GPU a forward of few tokens gives its codes room for every latent, so that it need not wait for their
        number: while a model generates, the host stays ahead of the GPU.
        """
        if self.edits or self.grads or self.trace.keep_all:
            return kernels.DEFAULT
        scores = acts.numel() // max(1, acts.shape[-1]) * self.sae.d_sae
        few = 0 < scores <= FEW_SCORES and self._asynchronous
        return kernels.Step(capacity=kernels.Capacity(scores)) if few else kernels.DEFAULT

    @property
    def _asynchronous(self) -> bool:
        return kernels.backend_for(next(self.sae.parameters())).ASYNCHRONOUS

    def _edit(self, codes: Codes, view: View, mask: Tensor | None) -> Codes:
        """The codes after the edits, where ``mask`` holds."""
        if not self.edits:
            return codes
        place = view.columns.place if view.columns.is_known else None
        edited = edit.run(self.edits, codes, Context(self.site.name, view.tokens, place))
        return edited if mask is None else edit.merge_rows(codes, edited, mask)

    def _record(self, acts: Tensor, coded: Coded) -> None:
        codes, edited, view = coded.codes, coded.edited, coded.view
        if view.columns.again:
            if self.grads:
                self.trace.run_again(view.columns, edited)
            return
        self.came.add(view.columns)
        if not self.grads:
            codes, edited = codes.detach(), codes.detach() if edited is codes else edited.detach()
        self.trace.add(
            Record(
                site=self.site.name,
                head=self.site.head,
                sae=self.sae,
                codes=codes,
                edited=edited,
                acts=acts.detach(),
                columns=view.columns,
                where=self.where,
                mask=coded.mask,
                tokenizer=view.tokenizer,
                grads=self.grads,
            )
        )

    def _reconstructed(self, sae: SparseCoder, acts: Tensor, edited: Codes, mask: Tensor | None) -> Tensor | None:
        """The reconstruction, where ``mask`` holds."""
        if mask is None:
            return sae.decode(edited)
        if self._asynchronous:  # rows that are not wanted are decoded too: cheaper than to wait for how many are
            return torch.where(mask[..., None].to(acts.device), sae.decode(edited).to(acts), acts)
        rows = mask.reshape(-1).nonzero()[:, 0]
        return put_rows(acts, rows, sae.decode(edited.select_rows(rows))) if len(rows) else None

    def _moved(
        self, sae: SparseCoder, acts: Tensor, original: Codes, edited: Codes, mask: Tensor | None
    ) -> Tensor | None:
        """``acts + scale * (edited - original) @ W``, computed for the rows that move and exact in the others."""
        if not edit.same_scale(edited, original):  # an edit of the user's own: then no latent-wise difference exists
            moving = torch.ones_like(edited.sizes, dtype=torch.bool)
            parts: tuple[Codes, ...] = (edited, original)
        else:
            delta = edit.difference(edited, original)
            if not delta.values.requires_grad:
                delta = edit.without_zeros(delta)
            moving, parts = delta.sizes > 0, (delta,)
        rows = (moving if mask is None else moving & mask.reshape(-1)).nonzero()[:, 0]
        if not len(rows):
            return None
        steps = [sae.decode_delta(part.select_rows(rows)) for part in parts]
        return _add_rows(acts, rows, steps[0] if len(steps) == 1 else steps[0] - steps[1])

    def check_used(self, calls: int) -> None:
        """Complain on leaving about a site that never fired, or a position that never came.

        Args:
            calls: how often the model was called.
        """
        if not self.trace.calls:
            raise NeverFiredError(f"no forward went through '{self.site.name}' inside the block: {self._why(calls)}")
        self.came.check(self.site.name)

    def _why(self, calls: int) -> str:
        tower = self.host.tower(self.site)
        if tower is not None:
            call = "encode_image" if tower == "visual" else "encode_text"
            said = "" if calls else "the model was not called, or only its other tower: "
            return f"{said}it lies in the {tower} tower, so call model.{call}(...)"
        if not calls:
            return "the model was not called"
        return "the model was called, but it stopped before the site or takes a path without it"


# ------------------------------------------------------------ tensors of rows


def _add_rows(acts: Tensor, rows: Tensor, step: Tensor) -> Tensor:
    """A copy of acts with ``step`` (n, d_in) added to some rows, in the wider of the two dtypes."""
    wide = torch.promote_types(acts.dtype, step.dtype)
    before = acts.reshape(-1, acts.shape[-1])[rows.to(acts.device)]
    return put_rows(acts, rows, before.to(wide) + step.to(acts.device, wide))


def put_rows(acts: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """A copy of acts with some rows (int64, of the flattened batch) replaced by ``new`` (n, d_in)."""
    flat = acts.reshape(-1, acts.shape[-1])
    return flat.index_copy(0, rows.to(acts.device), new.to(acts)).reshape(acts.shape)


def _with_kept_grad(codes: Codes) -> Codes:
    """The same codes, whose values keep the gradient that reaches them."""
    values = codes.values.clone()
    if not values.requires_grad:
        values.requires_grad_()
    values.retain_grad()
    return codes.with_values(values)
