"""Attach sparse autoencoders to the hook points of transformer models."""

from saehooks.activations import sparsemax
from saehooks.codes import Codes
from saehooks.formats import load
from saehooks.sae import SAE, SAEConfig, SAEOutput

__all__ = ["SAE", "Codes", "SAEConfig", "SAEOutput", "load", "sparsemax"]
