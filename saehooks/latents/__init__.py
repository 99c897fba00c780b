"""What every latent stands for: a survey of an SAE, the index it makes, and its page."""

from saehooks.latents.collect import survey
from saehooks.latents.index import LatentIndex
from saehooks.latents.latent import Context, Latent
from saehooks.latents.listing import Listing

__all__ = ["Context", "Latent", "LatentIndex", "Listing", "survey"]
