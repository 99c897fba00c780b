"""The usual dictionary: a linear encoder and a linear decoder."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from saehooks.dictionaries.base import Prepared, RowDecoder, unit_rows
from saehooks.errors import ConfigError

LAYER_NORM_EPS = 1e-5
ROW_NORMS = ("layer_norm", "constant_norm")


class LinearDictionary(RowDecoder):
    """``scores = (x - b_dec) @ W_enc + b_enc``; ``recons = values @ W_dec + b_dec``.

    W_enc (d_in, d_sae) is stored with a latent's weights contiguous, as the kernels read them. Rows of W_dec start
    at unit norm and W_enc as their transpose.

    Args:
        apply_b_dec_to_input: subtract b_dec before encoding.
        normalize: encode in units of the median norm of the first data (about b_dec), and decode back. Biases and
            thresholds then learn at the pace of the weights, and the supports of sparsemax do not depend on the scale
            of a model's activations.
        unit_norm_decoder: keep the rows of W_dec at norm 1, and their gradients orthogonal to them.
        row_norm: encode each row in units of its own, and decode back. ``"layer_norm"``: less its mean, divided by its
            standard deviation (unbiased, plus 1e-5), as OpenAI's and some SAEs of SAELens; ``"constant_norm"``: scaled
            to norm sqrt(d_in).
        d_out: width of what a transcoder writes, (d_sae, d_out) W_dec and (d_out,) b_dec; None for d_in. Where it is
            given, b_dec is never subtracted from the input.
        skip: a transcoder's linear path beside the latents, ``recons += x @ W_skip.T`` with W_skip (d_out, d_in).
    """

    name: ClassVar[str] = "linear"
    by_latent: ClassVar[Mapping[str, int]] = MappingProxyType({"W_enc": 1, "b_enc": 0, "W_dec": 0})
    unit: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        apply_b_dec_to_input: bool = True,
        normalize: bool = False,
        unit_norm_decoder: bool = False,
        row_norm: str | None = None,
        d_out: int | None = None,
        skip: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(d_in, d_sae, d_out)
        if row_norm is not None and (row_norm not in ROW_NORMS or normalize or d_out is not None):
            raise ConfigError(
                f"row_norm={row_norm!r}: one of {', '.join(map(repr, ROW_NORMS))}, without normalize= or d_out="
            )
        self.apply_b_dec_to_input = apply_b_dec_to_input and d_out is None
        self.unit_norm_decoder, self.row_norm, self.scales_offset = unit_norm_decoder, row_norm, row_norm is not None
        self.W_dec = nn.Parameter(unit_rows(d_sae, self.d_out, dtype))
        first = self.W_dec.detach().clone() if d_out is None else unit_rows(d_sae, d_in, dtype)
        self.W_enc = nn.Parameter(first.T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, dtype=dtype))
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in, dtype=dtype)) if skip else None
        self.normalize = normalize
        if normalize:
            self.register_buffer("unit", torch.ones((), dtype=dtype))

    def prepare(self, x: Tensor) -> Prepared:
        rows, scale, shift = self._normed(x) if self.row_norm else (x, None, None)
        if self.W_skip is not None:
            shift = x @ self.W_skip.T
        if self.apply_b_dec_to_input:
            rows = rows - self.b_dec
        if self.normalize:
            return Prepared(rows / self.unit, self.unit.expand(len(x)), shift)
        return Prepared(rows, scale, shift)

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows in units of their own, those units (rows,), and what was taken away (rows, 1)."""
        if self.row_norm == "constant_norm":
            scale = (x.norm(dim=1) / self.d_in**0.5).clamp(min=torch.finfo(x.dtype).tiny)
            return x / scale[:, None], scale, None
        mean = x.mean(1, keepdim=True)
        spread = (x - mean).std(1, keepdim=True)
        return (x - mean) / (spread + LAYER_NORM_EPS), spread[:, 0], mean

    def target(self, x: Tensor, prepared: Prepared) -> Tensor:
        if self.row_norm is None:
            return super().target(x, prepared)
        return prepared.queries if self.apply_b_dec_to_input else prepared.queries - self.b_dec

    @property
    def keys(self) -> Tensor:
        return self.W_enc.T

    @property
    def bias(self) -> Tensor:
        return self.b_enc

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        rows = self._normed(x)[0] if self.row_norm else x
        super().initialise(rows)
        if self.W_dec.shape[1] == self.d_in:
            for row, direction in self.rows_from_data(rows - self.b_dec if self.apply_b_dec_to_input else rows):
                self.W_dec[row] = direction
                self.W_enc[:, row] = direction
        if self.normalize and len(x):
            norm = (x - self.b_dec if self.apply_b_dec_to_input else x).norm(dim=1).median()
            self.unit.copy_(norm.clamp(min=torch.finfo(x.dtype).tiny))

    @property
    def adjusts_gradients(self) -> bool:
        return self.unit_norm_decoder

    @torch.no_grad()
    def after_backward(self) -> None:
        grad = self.W_dec.grad
        if self.unit_norm_decoder and grad is not None:
            grad -= (grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def after_step(self) -> None:
        if self.unit_norm_decoder:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=torch.finfo(self.W_dec.dtype).tiny))
