"""Real models, texts and photos that need no model hub, and the demo that runs on them."""

from saehooks.demo.data import photos, text
from saehooks.demo.models import packaged_sae, small_clip, smollm2

__all__ = ["packaged_sae", "photos", "small_clip", "smollm2", "text"]
