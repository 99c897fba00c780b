"""Tokens, images and activations on their way into training: batches, early-stopped forwards, a shuffle buffer."""

from saehooks.streams.activations import Activations, harvest
from saehooks.streams.fingerprint import Fingerprint
from saehooks.streams.images import ImageBatches
from saehooks.streams.seen import Mark, identity_of, position_of, unseen
from saehooks.streams.shuffle_buffer import ShuffleBuffer
from saehooks.streams.tap import Tap, checked_batches, harvest_sites
from saehooks.streams.tokens import TokenBatches, prompt_tokens, read_text

__all__ = [
    "Activations",
    "Fingerprint",
    "ImageBatches",
    "Mark",
    "ShuffleBuffer",
    "Tap",
    "TokenBatches",
    "checked_batches",
    "harvest",
    "harvest_sites",
    "identity_of",
    "position_of",
    "prompt_tokens",
    "read_text",
    "unseen",
]
