"""Tokens, images and activations on their way into training: batches, early-stopped forwards, a shuffle buffer."""

from saehooks.streams.fingerprint import Fingerprint
from saehooks.streams.harvest import AFTER_FIRST, Tap, checked_batches, harvest
from saehooks.streams.shuffle_buffer import ShuffleBuffer
from saehooks.streams.tokens import TokenBatches, read_text

__all__ = ["AFTER_FIRST", "Fingerprint", "ShuffleBuffer", "Tap", "TokenBatches", "checked_batches", "harvest", "read_text"]
