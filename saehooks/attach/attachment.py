"""One SAE at one site: what the hook there does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saehooks import edits as edit
from saehooks.codes import Codes
from saehooks.edits import Context, EditFunction
from saehooks.errors import NeverFiredError, WhereError, WidthError
from saehooks.sae import SAE
from saehooks.sites.base import Host, Site
from saehooks.trace import Record, Trace
from saehooks.where import Cursor, View, Where, full_mask


@dataclass(frozen=True, eq=False)
class Attachment:
    """One SAE at one site: what the hook there does."""

    host: Host
    site: Site
    sae: SAE
    edits: tuple[EditFunction, ...]
    where: Where | None
    error: Literal["keep", "drop"]
    grads: bool
    trace: Trace
    cursor: Cursor

    def __call__(self, acts: Tensor) -> Tensor | None:
        """The hook: (batch, pos, d_in) in, its replacement out, or None to let the very same tensor flow."""
        if acts.shape[-1] != self.sae.d_in:
            raise WidthError(width_message(self.sae, self.site.name, acts.shape[-1]))
        changes = bool(self.edits) or self.error == "drop"
        with torch.set_grad_enabled(torch.is_grad_enabled() and (changes or self.grads)), self.sae.inference():
            codes = self.sae.encode(acts)
            view = self.cursor.look(codes.detach(), self.host.tokenizer)
            mask = full_mask(self.where, view)
            edited = codes
            if self.edits:
                edited = edit.run(self.edits, codes, Context(self.site.name, view.tokens, view.positions))
                edited = edited if mask is None else edit.merge_rows(codes, edited, mask)
            original = codes
            if self.grads and torch.is_grad_enabled():
                original, edited = (codes, edited) if changes else (codes.detach(), codes.detach())
                edited = _with_kept_grad(edited)
            self.trace.add(self._record(acts, codes, edited, view, mask))
            if self.error == "drop":
                return self._reconstructed(acts, edited, mask)
            return None if edited is original else self._moved(acts, original, edited, mask)

    def _record(self, acts: Tensor, codes: Codes, edited: Codes, view: View, mask: Tensor | None) -> Record:
        if not self.grads:
            codes, edited = codes.detach(), codes.detach() if edited is codes else edited.detach()
        tokenizer = self.host.tokenizer
        return Record(
            self.site.name, self.sae, codes, edited, acts.detach(), view.tokens, view.start, mask, tokenizer, self.grads
        )

    def _reconstructed(self, acts: Tensor, edited: Codes, mask: Tensor | None) -> Tensor:
        """The reconstruction, where ``mask`` holds."""
        if mask is None:
            return self.sae.decode(edited)
        rows = mask.reshape(-1).nonzero()[:, 0]
        return _put_rows(acts, rows, self.sae.decode(edited.select_rows(rows)))

    def _moved(self, acts: Tensor, original: Codes, edited: Codes, mask: Tensor | None) -> Tensor | None:
        """``acts + scale * (edited - original) @ W``, computed only for the rows that move."""
        if edited.scale is not original.scale:  # an edit of the user's own changed the rows' scale
            rows = torch.arange(edited.sizes.numel(), device=edited.indices.device)
            step = self.sae.decode_delta(edited) - self.sae.decode_delta(original)
            return _add_rows(acts, rows, step.reshape(len(rows), -1))
        delta = edit.difference(edited, original)
        if not delta.values.requires_grad:
            delta = edit.without_zeros(delta)
        moving = delta.sizes > 0
        rows = (moving if mask is None else moving & mask.reshape(-1)).nonzero()[:, 0]
        if not len(rows):
            return None
        return _add_rows(acts, rows, self.sae.decode_delta(delta.select_rows(rows)))

    def check_used(self) -> None:
        """Complain on leaving about a site that never fired, or a position that never came."""
        if not self.trace.calls:
            raise NeverFiredError(f"no forward went through '{self.site.name}' inside the block: {self._why()}")
        if self.where is not None and self.where.reach > self.cursor.highest:
            raise WhereError(
                f"position {self.where.reach} at '{self.site.name}' never came: the forwards of this block "
                f"had positions 0 to {self.cursor.highest}"
            )

    def _why(self) -> str:
        tower = self.host.tower(self.site)
        if not self.cursor.calls:
            return "the model was not called"
        if tower is not None:
            call = "encode_image" if tower == "visual" else "encode_text"
            return f"it lies in the {tower} tower, so call model.{call}(...)"
        return "the model was called, but it stopped before the site or takes a path without it"


# ------------------------------------------------------------ tensors of rows


def _add_rows(acts: Tensor, rows: Tensor, step: Tensor) -> Tensor:
    """A copy of acts with ``step`` (n, d_in) added to some rows, in the wider of the two dtypes."""
    wide = torch.promote_types(acts.dtype, step.dtype)
    before = acts.reshape(-1, acts.shape[-1])[rows.to(acts.device)]
    return _put_rows(acts, rows, before.to(wide) + step.to(acts.device, wide))


def _put_rows(acts: Tensor, rows: Tensor, new: Tensor) -> Tensor:
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


def width_message(sae: SAE, name: str, width: int) -> str:
    """Say that an SAE does not fit a site."""
    return f"the SAE has d_in={sae.d_in}, but '{name}' is {width} wide; sh.sites(model) lists all sites with widths"
