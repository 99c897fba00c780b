"""The usual dictionary: a linear encoder and a linear decoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from saehooks.dictionaries.base import Prepared, RowDecoder, unit_rows


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
    """

    name: ClassVar[str] = "linear"
    unit: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        apply_b_dec_to_input: bool = True,
        normalize: bool = False,
        unit_norm_decoder: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(d_in, d_sae)
        self.apply_b_dec_to_input, self.unit_norm_decoder = apply_b_dec_to_input, unit_norm_decoder
        self.W_dec = nn.Parameter(unit_rows(d_sae, d_in, dtype))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype))
        self.normalize = normalize
        if normalize:
            self.register_buffer("unit", torch.ones((), dtype=dtype))

    def prepare(self, x: Tensor) -> Prepared:
        centred = x - self.b_dec if self.apply_b_dec_to_input else x
        return Prepared(centred / self.unit, self.unit.expand(len(x))) if self.normalize else Prepared(centred, None)

    @property
    def keys(self) -> Tensor:
        return self.W_enc.T

    @property
    def bias(self) -> Tensor:
        return self.b_enc

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        super().initialise(x)
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
