"""What splicing an SAE in costs the model, measured on ordinary calls of it."""

from saehooks.evaluation.block import measure
from saehooks.evaluation.measurement import Measurement

__all__ = ["Measurement", "measure"]
