"""Selection and sparse products: the kernels under every SAE.

`select` finds which latents each row uses without keeping the score matrix, `sddmm` recomputes the selected scores
with gradients, `spmm` decodes. Each has a plain-torch reference and faster paths; `dispatch` chooses.
"""

from saehooks.kernels.batch import batch_topk
from saehooks.kernels.capacity import Capacity, active, capacity, exactly
from saehooks.kernels.dispatch import PATHS, force, path, path_name, select_rows
from saehooks.kernels.products import sddmm, spmm
from saehooks.kernels.rules import (
    BatchRule,
    BatchTopK,
    Entmax,
    FeatureChoice,
    RowRule,
    Sparsemax,
    Support,
    Threshold,
    TopK,
)
from saehooks.kernels.scores import score_chunks, select

__all__ = [
    "PATHS",
    "BatchRule",
    "BatchTopK",
    "Capacity",
    "Entmax",
    "FeatureChoice",
    "RowRule",
    "Sparsemax",
    "Support",
    "Threshold",
    "TopK",
    "active",
    "batch_topk",
    "capacity",
    "exactly",
    "force",
    "path",
    "path_name",
    "score_chunks",
    "sddmm",
    "select",
    "select_rows",
    "spmm",
]
