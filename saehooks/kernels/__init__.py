"""Selection and sparse products: the kernels under every SAE.

`select` finds which latents each row uses without keeping the score matrix, `sddmm` recomputes the selected scores
with gradients, `spmm` decodes. `backend` says what each backend must have and which one serves; a `Step` carries what
a step knows beside its tensors.
"""

from saehooks.kernels.backend import BACKENDS, Backend, backend_for
from saehooks.kernels.ops import (
    entmax_weights,
    for_rows,
    is_differentiated,
    refine,
    sddmm,
    sddmm_spmm,
    select,
    select_pair_products,
    select_pairs,
    select_rows,
    simplex_thresholds,
    simplex_weights,
    spmm,
    squared_errors,
)
from saehooks.kernels.reference.across_rows import batch_topk
from saehooks.kernels.reference.select import score_chunks
from saehooks.kernels.rules import (
    BatchRule,
    BatchTopK,
    Entmax,
    FeatureChoice,
    RowRule,
    Sparsemax,
    Threshold,
    TopK,
)
from saehooks.kernels.step import DEFAULT, Capacity, Forecast, SparseGradients, Step
from saehooks.support import Support

__all__ = [
    "BACKENDS",
    "DEFAULT",
    "Backend",
    "BatchRule",
    "BatchTopK",
    "Capacity",
    "Entmax",
    "FeatureChoice",
    "Forecast",
    "RowRule",
    "SparseGradients",
    "Sparsemax",
    "Step",
    "Support",
    "Threshold",
    "TopK",
    "backend_for",
    "batch_topk",
    "entmax_weights",
    "for_rows",
    "is_differentiated",
    "refine",
    "score_chunks",
    "sddmm",
    "sddmm_spmm",
    "select",
    "select_pair_products",
    "select_pairs",
    "select_rows",
    "simplex_thresholds",
    "simplex_weights",
    "spmm",
    "squared_errors",
]
