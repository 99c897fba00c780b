"""What every latent stands for: a survey of an SAE, the index it makes, and its page."""

from saehooks.latents.collect import survey
from saehooks.latents.index import LatentIndex
from saehooks.latents.latent import Latent
from saehooks.latents.listing import Listing
from saehooks.latents.result import Context, SurveyResult

__all__ = ["Context", "Latent", "LatentIndex", "Listing", "SurveyResult", "survey"]
