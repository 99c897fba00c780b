"""What splicing an SAE in costs the model, measured live on ordinary calls."""

from saehooks.measure.block import measure
from saehooks.measure.live import Live

__all__ = ["Live", "measure"]
