"""`Codes`, the sparse latent activations that every part exchanges: compressed sparse rows with a batch shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from saehooks.answers import no_attribute
from saehooks.errors import ConfigError, LatentError, WidthError
from saehooks.precision import widened
from saehooks.support import Support, offsets_of, rows_of


class Top(NamedTuple):
    """The strongest latents of each row."""

    latents: Tensor
    """(*shape, k) int64, strongest first, -1 where a row has fewer than k latents."""
    values: Tensor
    """(*shape, k), 0 where a row has fewer than k latents."""


ANSWERS = {
    "topk": "write codes.top(k)",
    **dict.fromkeys(("to_dense", "numpy", "tolist", "toarray", "todense"), "write codes.dense()"),
    **dict.fromkeys(
        ("sum", "mean", "max", "min", "abs", "norm", "nonzero", "argmax", "T"), "write codes.values, or codes.dense()"
    ),
    **dict.fromkeys(("latents", "acts", "activations"), "write codes.indices and codes.values, or codes.top(k)"),
    **dict.fromkeys(("l0", "nnz", "count_nonzero"), "write codes.support_size"),
    **dict.fromkeys(("float", "half", "bfloat16", "double"), "write codes.to(dtype)"),
    **dict.fromkeys(("size", "dim", "ndim", "numel"), "write codes.shape and codes.d_sae"),
}
"""What to write, by the names that tensors have."""


@dataclass(frozen=True, eq=False, repr=False)
class Codes:
    """Sparse latent activations of a batch of rows, in compressed sparse row form.

    The support is explicit: a latent that is listed was selected, whatever its value, so a selected
    latent can hold zero or a negative number.

    >>> codes = Codes.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, -3.0]]))
    >>> codes.support_size
    tensor([1, 2])
    >>> codes.top(1).latents
    tensor([[1],
            [0]])
    """

    indices: Tensor
    """(nnz,) int64, the selected latents of each row, ascending inside a row, none twice."""
    values: Tensor
    """(nnz,) floating, their activations."""
    offsets: Tensor
    """(rows + 1,) int64, where each row starts in ``indices``."""
    shape: tuple[int, ...]
    """Batch shape: ``(batch, pos)`` at a hook point; its product is the number of rows."""
    d_sae: int
    """Number of latents of the SAE."""
    scale: Tensor | None = None
    """(rows,) multiplier of each row's reconstruction, or None for 1."""
    support: Support | None = None
    """Where selection made these codes, its support, which keeps the index of the entries by latent; for the kernels.
    None for codes from elsewhere: it is dropped with the indices or offsets it was about."""
    shift: Tensor | None = None
    """(rows, 1) or (rows, d_out) what each row's reconstruction holds that no latent carries, such as the mean that a
    layer norm took away or a transcoder's skip connection; None for nothing."""

    def __post_init__(self) -> None:
        known = self.support
        if known is not None and (known.indices is not self.indices or known.offsets is not self.offsets):
            object.__setattr__(self, "support", None)
        rows = math.prod(self.shape)
        if self.offsets.shape != (rows + 1,):
            raise WidthError(
                f"Codes of shape {tuple(self.shape)} have {rows} rows and need {rows + 1} offsets, "
                f"got {tuple(self.offsets.shape)}"
            )
        if self.indices.shape != self.values.shape or self.indices.dim() != 1:
            raise WidthError(
                f"indices {tuple(self.indices.shape)} and values {tuple(self.values.shape)} must be one list each, "
                "equally long"
            )

    # ------------------------------------------------------------------ making

    @classmethod
    def from_dense(cls, dense: Tensor, support: Tensor | None = None, scale: Tensor | None = None) -> Codes:
        """Compress a dense (*shape, d_sae) tensor; ``support`` (bool, same shape) defaults to ``dense != 0``."""
        mask = (dense != 0) if support is None else support
        if mask.shape != dense.shape:
            raise WidthError(f"support {tuple(mask.shape)} must have the shape of the values {tuple(dense.shape)}")
        shape, d_sae = tuple(dense.shape[:-1]), dense.shape[-1]
        flat = mask.reshape(-1, d_sae)
        rows, indices = flat.nonzero(as_tuple=True)
        return cls(indices, dense.reshape(-1, d_sae)[rows, indices], offsets_of(flat.sum(-1)), shape, d_sae, scale)

    @classmethod
    def cat(cls, parts: Sequence[Codes]) -> Codes:
        """Join codes along their first batch axis."""
        if not parts:
            raise ConfigError("Codes.cat needs at least one Codes")
        first = parts[0]
        for part in parts[1:]:
            if (
                part.shape[1:] != first.shape[1:]
                or part.d_sae != first.d_sae
                or (part.scale is None) != (first.scale is None)
                or (part.shift is None) != (first.shift is None)
            ):
                raise WidthError(f"cannot join {first!r} and {part!r}: they differ in more than their first axis")
        sizes = torch.cat([part.sizes for part in parts])
        scale = None if first.scale is None else torch.cat([part.scale for part in parts if part.scale is not None])
        shift = None if first.shift is None else torch.cat([part.shift for part in parts if part.shift is not None])
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
        trimmed = [part.trimmed() for part in parts]
        indices, values = torch.cat([p.indices for p in trimmed]), torch.cat([p.values for p in trimmed])
        return cls(indices, values, offsets_of(sizes), shape, first.d_sae, scale, shift=shift)

    def with_values(self, values: Tensor) -> Codes:
        """The same support with other values, (nnz,)."""
        return replace(self, values=values)

    def __mul__(self, factor: float | Tensor) -> Codes:
        """Each value times a number, or times a tensor that broadcasts to the batch shape."""
        if not isinstance(factor, Tensor):
            return self.with_values(self.values * factor) if hasattr(factor, "__float__") else NotImplemented
        try:
            by_row = factor.to(self.values).expand(self.shape).reshape(-1)
        except RuntimeError:
            raise WidthError(
                f"a factor of shape {tuple(factor.shape)} does not broadcast to the batch shape {tuple(self.shape)}"
            ) from None
        codes = self.trimmed()
        return codes.with_values(codes.values * by_row[codes.rows])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Codes:
        """Each value over a number, or over a tensor that broadcasts to the batch shape."""
        return self * (1 / divisor)

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name, ANSWERS)

    def _no_tensor(self, other: Any) -> NoReturn:
        raise TypeError(
            "Codes are sparse, and no tensor: compare and add codes.values, or codes.dense(); sae.decode(codes) "
            "multiplies them with the decoder"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __matmul__ = __rmatmul__ = _no_tensor
    __lt__ = __le__ = __gt__ = __ge__ = _no_tensor

    def __eq__(self, other: object) -> bool:
        """Whether it is the same object; comparing with a number or a tensor is an error, not False."""
        return self._no_tensor(other) if isinstance(other, (int, float, Tensor)) else self is other

    __hash__ = object.__hash__

    def keep(self, kept: Tensor) -> Codes:
        """Only some of the entries: ``kept`` (nnz,) bool; rows and their scale stay."""
        codes = self.trimmed()
        kept = kept[: codes.indices.numel()]
        sizes = torch.zeros_like(codes.sizes).index_add_(0, codes.rows, kept.long())
        return replace(codes, indices=codes.indices[kept], values=codes.values[kept], offsets=offsets_of(sizes))

    def where(self, mask: Tensor | None) -> Codes:
        """The entries of the rows where ``mask`` (bool, batch shape) holds; the other rows are left empty.

        Args:
            mask: None for all rows.
        """
        return self if mask is None else self.keep(mask.reshape(-1).to(self.indices.device)[self.trimmed().rows])

    def detach(self) -> Codes:
        """The same codes, cut from the autograd graph."""
        scale = None if self.scale is None else self.scale.detach()
        shift = None if self.shift is None else self.shift.detach()
        return replace(self, values=self.values.detach(), scale=scale, shift=shift)

    def to(self, *args, **kwargs) -> Codes:
        """Move to a device, or cast values and scale to a dtype (arguments of ``Tensor.to``)."""
        values = self.values.to(*args, **kwargs)
        scale = None if self.scale is None else self.scale.to(*args, **kwargs)
        shift = None if self.shift is None else self.shift.to(*args, **kwargs)
        return replace(
            self,
            indices=self.indices.to(values.device),
            values=values,
            offsets=self.offsets.to(values.device),
            scale=scale,
            shift=shift,
        )

    def trimmed(self) -> Codes:
        """The same codes without the padding past the last row that a `saehooks.kernels.Capacity` leaves."""
        used = int(self.offsets[-1])
        if used == self.indices.numel():
            return self
        return replace(self, indices=self.indices[:used], values=self.values[:used])

    def cpu(self) -> Codes:
        """The same codes in CPU memory."""
        return self.to("cpu")

    # ----------------------------------------------------------------- reading

    @property
    def sizes(self) -> Tensor:
        """(rows,) int64, latents in each row."""
        return self.offsets.diff()

    @property
    def support_size(self) -> Tensor:
        """(*shape) int64, latents each token uses; at least 1 under sparsemax."""
        return self.sizes.reshape(self.shape)

    @property
    def rows(self) -> Tensor:
        """(nnz,) int64, the row of each entry."""
        return rows_of(self.offsets, self.indices.numel())

    def dense(self) -> Tensor:
        """(*shape, d_sae) tensor with zeros outside the support: for tests and small things."""
        out, codes = self.values.new_zeros(math.prod(self.shape), self.d_sae), self.trimmed()
        return out.index_put((codes.rows, codes.indices), codes.values).reshape(*self.shape, self.d_sae)

    def of(self, latent: int) -> Tensor:
        """(*shape) values of one latent, 0 where it was not selected."""
        if not hasattr(latent, "__index__"):
            raise LatentError(f"of(latent) gives one latent, by its number; got {latent!r}; dense() holds all of them")
        self.check_latents([latent])
        codes = self.trimmed()
        hit = codes.indices == latent
        out = self.values.new_zeros(math.prod(self.shape))
        return out.index_put((codes.rows[hit],), codes.values[hit]).reshape(self.shape)

    def counts(self) -> Tensor:
        """(d_sae,) int64, in how many rows each latent was selected."""
        # bincount would wait for a GPU. Counts are integers, so their order of addition does not matter.
        listed = torch.arange(self.indices.numel(), device=self.indices.device) < self.offsets[-1]
        return self.offsets.new_zeros(self.d_sae).index_add_(0, self.indices, listed.long())

    def top(self, k: int) -> Top:
        """The k largest latents of each row, padded with latent -1 and value 0."""
        if k < 1:
            raise ConfigError(f"top(k) needs k >= 1, got {k}")
        n_rows, width = math.prod(self.shape), max(int(self.sizes.max()) if self.sizes.numel() else 0, k)
        codes = self.trimmed()
        rows = codes.rows
        place = torch.arange(rows.numel(), device=rows.device) - self.offsets[rows]
        values = codes.values.new_full((n_rows, width), -math.inf).index_put((rows, place), codes.values)
        latents = codes.indices.new_full((n_rows, width), -1).index_put((rows, place), codes.indices)
        values, order = values.topk(k, dim=-1)
        latents = latents.gather(-1, order)
        values = torch.where(latents < 0, 0.0, values)
        return Top(latents.reshape(*self.shape, k), values.reshape(*self.shape, k))

    def check_latents(self, latents: Sequence[int]) -> None:
        """Raise LatentError unless every latent lies in ``0 .. d_sae - 1``."""
        for latent in latents:
            if not 0 <= latent < self.d_sae:
                raise LatentError(f"latent {latent} is out of range: this SAE has latents 0 to {self.d_sae - 1}")

    def select_rows(self, rows: Tensor, shape: tuple[int, ...] | None = None) -> Codes:
        """Codes of the given rows, in that order.

        Args:
            rows: (n,) int64 indices into the flattened batch; negative ones count from its end, as a tensor's do.
            shape: the batch shape of the result; (n,) when left out.
        """
        rows = torch.where(rows < 0, rows + self.sizes.numel(), rows)
        sizes = self.sizes[rows]
        offsets = offsets_of(sizes)
        entry = rows_of(offsets, int(offsets[-1]))
        source = torch.arange(entry.numel(), device=rows.device) - offsets[entry] + self.offsets[rows][entry]
        scale = None if self.scale is None else self.scale[rows]
        shift = None if self.shift is None else self.shift[rows]
        shape = (rows.numel(),) if shape is None else shape
        return Codes(self.indices[source], self.values[source], offsets, shape, self.d_sae, scale, shift=shift)

    def __getitem__(self, index) -> Codes:
        """Codes at some batch positions, with the indexing rules of a tensor of shape ``shape``."""
        if isinstance(index, tuple) and sum(one is not None and one is not Ellipsis for one in index) > len(self.shape):
            raise LatentError(
                f"codes are indexed by their batch shape {tuple(self.shape)}; for one latent write codes.of(latent), "
                "for all codes.dense()"
            )
        grid = torch.arange(math.prod(self.shape), device=self.indices.device).reshape(self.shape)[index]
        return self.select_rows(grid.reshape(-1), tuple(grid.shape))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("codes of a single row have no length")
        return self.shape[0]

    def __repr__(self) -> str:
        mean = float(widened(self.sizes).mean()) if self.sizes.numel() else 0.0
        device = "" if self.values.device.type == "cpu" else f", device={self.values.device}"
        dtype = str(self.values.dtype)[6:]
        return f"Codes(shape={tuple(self.shape)}, d_sae={self.d_sae}, l0={mean:.1f}, dtype={dtype}{device})"
