"""Which latents each row of a batch selected: compressed sparse rows, which know their entries by latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from saehooks.errors import LatentError, WidthError

Index = TypeVar("Index")


def offsets_of(sizes: Tensor) -> Tensor:
    """(rows + 1,) int64 offsets from (rows,) sizes."""
    return torch.cat([sizes.new_zeros(1, dtype=torch.int64), sizes.cumsum(0)])


def rows_of(offsets: Tensor, nnz: int) -> Tensor:
    """(nnz,) int64, the row of each entry of compressed rows; padding past the last row gets the number of rows."""
    sizes = torch.cat([offsets.diff(), nnz - offsets[-1:]])
    return torch.repeat_interleave(torch.arange(sizes.numel(), device=offsets.device), sizes, output_size=nnz)


def _no_threshold() -> Tensor:
    return torch.empty(0, dtype=torch.float32, device="cpu")


@dataclass(frozen=True, eq=False)
class Support:
    """Which latents each row selected, in compressed sparse rows; it owns the index of its entries by latent."""

    indices: Tensor
    """(nnz,) int64, ascending inside a row."""
    offsets: Tensor
    """(rows + 1,) int64."""
    threshold: Tensor = field(default_factory=_no_threshold)
    """(rows,) the score above which latents were selected (for top-k: the smallest selected score, or 0 if
    fewer than k are positive); empty for a support that was not selected by a rule."""
    scores: Tensor | None = None
    """(nnz,) the selected scores, where selection had them at hand: they need not be computed again."""
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What was worked out about indices and offsets, each with the versions of the two tensors it holds for."""

    @property
    def rows(self) -> Tensor:
        """(nnz,) int64, the row of each entry."""
        return rows_of(self.offsets, self.indices.numel())

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.offsets.numel() - 1

    def pattern(self) -> Support:
        """The same support without threshold and scores; both share the index by latent."""
        return Support(self.indices, self.offsets, _known=self._known)

    def keep(self, kept: Tensor) -> Support:
        """Only some of the entries: ``kept`` (nnz,) bool; the rows stay, and so do their thresholds."""
        sizes = torch.zeros_like(self.offsets[1:]).index_add_(0, self.rows[kept], kept[kept].long())
        scores = None if self.scores is None else self.scores[kept]
        narrow = replace(self, indices=self.indices[kept], offsets=offsets_of(sizes), scores=scores, _known={})
        known = self._recall("range")
        return narrow if known is None else narrow.trusted(known)

    def with_scores(self, scores: Tensor | None) -> Support:
        """The same support with other scores (nnz,), or none."""
        return replace(self, scores=scores)

    def with_threshold(self, threshold: Tensor) -> Support:
        """The same support with another threshold (rows,)."""
        return replace(self, threshold=threshold)

    def renamed(self, latents: Tensor, d_sae: int) -> Support:
        """The support in other latents: index ``i`` becomes ``latents[i]``, ``latents`` (n,) of ``0 .. d_sae - 1``."""
        return replace(self, indices=latents[self.indices], _known={}).trusted(d_sae)

    def by_latent(self, sort: Callable[[Tensor, Tensor, int], Index], d_sae: int) -> Index:
        """``sort(indices, offsets, d_sae)``, made once for as long as neither tensor is changed in place."""
        found = self._recall((sort, d_sae))
        if found is None:
            found = sort(self.indices, self.offsets, d_sae)
            if not (
                self.indices.is_inference() or self.offsets.is_inference()
            ):  # these do not say whether they changed
                self._remember((sort, d_sae), found)
        return found

    def shared(self, make: Callable[[], Index]) -> Index:
        """What ``make`` made when this support, or one of the same pattern, was first asked for it."""
        if make not in self._known:
            self._remember(make, make())
        return self._known[make][-1]

    def trusted(self, d_sae: int) -> Support:
        """The same support, marked as made by the kernels themselves, so that `check` need not wait for them."""
        self._remember("range", d_sae)
        return self

    def check(self, d_sae: int) -> None:
        """Check that the kernels may follow this support; on a GPU this waits, unless the kernels made it.

        Raises:
            LatentError: a latent outside ``0 .. d_sae - 1``.
            WidthError: offsets that do not start at 0, fall, or end beyond the entries.
        """
        if self._recall("range") == d_sae:
            return
        indices, offsets = self.indices, self.offsets
        if indices.dim() != 1 or offsets.dim() != 1 or not offsets.numel():
            raise WidthError(
                f"a support needs indices (nnz,) and offsets (rows + 1,), got {tuple(indices.shape)} and "
                f"{tuple(offsets.shape)}"
            )
        if indices.device.type == "meta" or offsets.device.type == "meta":
            return
        if int(offsets[0]) != 0 or int(offsets[-1]) > indices.numel() or bool((offsets.diff() < 0).any()):
            raise WidthError(
                f"the offsets of a support start at 0, never fall and end at most at its {indices.numel()} entries, "
                f"got {int(offsets[0])} to {int(offsets[-1])}"
            )
        if indices.numel():
            low, high = (int(end) for end in indices.aminmax())
            if low < 0 or high >= d_sae:
                wrong = low if low < 0 else high
                raise LatentError(f"latent {wrong} is out of range: this SAE has latents 0 to {d_sae - 1}")
        self.trusted(d_sae)

    def _remember(self, name: Any, found: Any) -> None:
        """Keep what was worked out about these two tensors as they are now."""
        self._known[name] = self.indices, self.offsets, self._versions(), found

    def _recall(self, name: Any) -> Any:
        """What was worked out, if it was about these very tensors and they have not been changed in place since."""
        indices, offsets, versions, found = self._known.get(name, (None,) * 4)
        same = indices is self.indices and offsets is self.offsets and versions == self._versions()
        return found if same else None

    def _versions(self) -> list[int]:
        return [-1 if tensor.is_inference() else tensor._version for tensor in (self.indices, self.offsets)]
