"""Pure functions that say how good codes and reconstructions are. Rows with NaN give NaN, never a silent zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saehooks.codes import Codes
from saehooks.errors import WidthError
from saehooks.precision import widened


def nmse(x: Tensor, recons: Tensor) -> float:
    """Normalised squared error: ``sum |recons - x|^2 / sum |x|^2`` over all rows, 0 is best.

    Args:
        x, recons: (*shape, d_in), of one shape.
    Raises:
        WidthError: shapes differ.
    """
    _same_shape(x, recons)
    x, recons = widened(x.detach()), widened(recons.detach())
    return float((recons - x).square().sum() / x.square().sum())


def token_nmse(x: Tensor, recons: Tensor) -> float:
    """Mean over rows of x and recons (*shape, d_in) of squared error over squared norm; 0 is best. Skips rows of zeros.

    `nmse` is one ratio of sums: where a few tokens have a hundred times the norm of the others, it is about those.
    """
    _same_shape(x, recons)
    x, recons = widened(x.detach()), widened(recons.detach())
    energy = x.square().sum(-1)
    return float(((recons - x).square().sum(-1) / energy)[energy != 0].mean())


def fvu(x: Tensor, recons: Tensor) -> float:
    """Fraction of variance unexplained by recons (*shape, d_in): squared error over the variance of x; 0 is best."""
    _same_shape(x, recons)
    x, recons = widened(x.detach()).flatten(0, -2), widened(recons.detach()).flatten(0, -2)
    return float((recons - x).square().sum() / (x - x.mean(0)).square().sum())


def explained_variance(x: Tensor, recons: Tensor) -> float:
    """``1 - fvu`` of x and recons (*shape, d_in); 1 is best."""
    return 1.0 - fvu(x, recons)


def cosine(x: Tensor, recons: Tensor) -> float:
    """Mean cosine of a row and its reconstruction, (*shape, d_in) each; 1 is best, 0 for a reconstruction of zeros.

    Source: ``cossim`` of SAEBench's core evaluation.
    """
    return float(F.cosine_similarity(*_flat(x, recons), dim=-1).mean())


def shrinkage(x: Tensor, recons: Tensor) -> float:
    """Mean ratio of the norms of reconstruction and row, (*shape, d_in) each; 1 is best, below 1 the SAE shrinks.

    Source: ``l2_ratio`` of SAEBench's core evaluation.
    """
    return float(_norm_ratios(*_flat(x, recons)).mean())


def reconstruction_bias(x: Tensor, recons: Tensor) -> float:
    """``sum |recons|^2 / sum x . recons``, (*shape, d_in) each: 1 where no common factor would improve recons.

    Source: ``relative_reconstruction_bias`` of SAEBench's core evaluation; gamma in Gated SAEs (arXiv 2404.16014).
    """
    x, recons = _flat(x, recons)
    return float(recons.square().sum() / (x * recons).sum())


class SupportSizes(NamedTuple):
    """How many latents tokens use."""

    mean: float
    """This is L0."""
    q05: float
    median: float
    q95: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.q05:.0f}/{self.median:.0f}/{self.q95:.0f})"


def l0(codes: Codes | Tensor) -> SupportSizes:
    """Mean support size with its 5, 50 and 95% quantiles, of codes or of support sizes of any shape."""
    sizes = (codes.sizes if isinstance(codes, Codes) else codes).flatten().cpu().double()
    if not sizes.numel():
        return SupportSizes(*[float("nan")] * 4)
    ordered = sizes.sort().values
    at = [float(ordered[round(q * (ordered.numel() - 1))]) for q in (0.05, 0.5, 0.95)]
    return SupportSizes(float(sizes.mean()), *at)


def density(codes: Codes) -> Tensor:
    """(d_sae,) float64, the share of rows in which each latent was selected."""
    return widened(codes.counts()) / max(1, codes.sizes.numel())


def dead_latents(codes: Codes) -> Tensor:
    """(n,) int64, the latents that no row selected."""
    return (codes.counts() == 0).nonzero()[:, 0]


def _same_shape(x: Tensor, recons: Tensor) -> None:
    if x.shape != recons.shape:
        raise WidthError(f"activations {tuple(x.shape)} and reconstructions {tuple(recons.shape)} must have one shape")


def _flat(x: Tensor, recons: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, d_in) both, in the widest type of their device."""
    _same_shape(x, recons)
    width = x.shape[-1]
    return widened(x.detach()).reshape(-1, width), widened(recons.detach()).reshape(-1, width)


def _norm_ratios(x: Tensor, recons: Tensor) -> Tensor:
    """(rows,) norm of the reconstruction over the row's; where the row is zeros, the reconstruction's own norm."""
    norms = x.norm(dim=-1)
    return recons.norm(dim=-1) / torch.where(norms == 0, 1.0, norms)


class ReconstructionMeter:
    """Errors, cosine, shrinkage, L0 and dead latents over a stream of batches, in memory of d_in + d_sae.

    >>> meter = ReconstructionMeter(d_in=2, d_sae=3)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> meter.update(x, x * 0.5, Codes.from_dense(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])))
    >>> meter.summary()["nmse"], meter.summary()["dead"]
    (0.25, 1)
    """

    def __init__(self, d_in: int, d_sae: int) -> None:
        self._sum = torch.zeros(d_in, dtype=torch.float64, device="cpu")
        self._counts = torch.zeros(d_sae, dtype=torch.int64, device="cpu")
        self._sizes = torch.zeros(d_sae + 1, dtype=torch.int64, device="cpu")
        self._sums = torch.zeros(
            6, dtype=torch.float64, device="cpu"
        )  # |error|^2, |x|^2, |recons|^2, x . recons, cosines, norm ratios
        self.rows = 0

    def update(self, x: Tensor, recons: Tensor, codes: Codes) -> None:
        """Add rows: x and recons (*shape, d_in), codes of the same rows."""
        flat, made = _flat(x, recons)
        squares = [(made - flat).square().sum(), flat.square().sum(), made.square().sum(), (flat * made).sum()]
        ratios = [F.cosine_similarity(flat, made, dim=-1).sum(), _norm_ratios(flat, made).sum()]
        self._sums += torch.stack([*squares, *ratios]).cpu()
        self._sum += flat.sum(0).cpu()
        self._counts += codes.counts().cpu()
        self._sizes += torch.bincount(codes.sizes.cpu(), minlength=self._sizes.numel())
        self.rows += flat.shape[0]

    @property
    def counts(self) -> Tensor:
        """(d_sae,) int64, in how many rows each latent was selected so far."""
        return self._counts

    @property
    def support_sizes(self) -> Tensor:
        """(d_sae + 1,) int64 histogram: how many rows used 0, 1, 2, ... latents."""
        return self._sizes

    def summary(self) -> dict[str, float]:
        """nmse, fvu, cosine, shrinkage, reconstruction_bias, l0, l0_q05, l0_median, l0_q95, dead (latents that never
        fired in these rows), rows; NaN where there was nothing to divide by."""
        error, energy, made, product, cosines, ratios = self._sums.tolist()
        rows, variance = self.rows, energy - float(self._sum.square().sum()) / max(1, self.rows)
        reached = self._sizes.cumsum(0).double() / max(1, rows)
        q05, median, q95 = (int((reached < q).sum()) if rows else float("nan") for q in (0.05, 0.5, 0.95))
        sizes = torch.arange(self._sizes.numel(), device="cpu") * self._sizes
        return {
            "nmse": _ratio(error, energy),
            "fvu": _ratio(error, max(0.0, variance)),
            "cosine": _ratio(cosines, rows),
            "shrinkage": _ratio(ratios, rows),
            "reconstruction_bias": _ratio(made, product),
            "l0": _ratio(float(sizes.sum()), rows),
            "l0_q05": q05,
            "l0_median": median,
            "l0_q95": q95,
            "dead": int((self._counts == 0).sum()),
            "rows": rows,
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
