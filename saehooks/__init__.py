"""Attach sparse autoencoders to the hook points of transformer models."""
