"""What splicing an SAE in costs the model, measured live on ordinary calls."""

from saehooks.evaluation.block import measure
from saehooks.evaluation.live import Live

__all__ = ["Live", "measure"]
