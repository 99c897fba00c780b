"""Attaching SAEs to models: the primitive ``attach`` and the verbs that are thin calls of it.

A block registers its hooks when it is entered, after everything that can be checked has been checked,
and removes exactly those hooks when it is left, however that happens.
"""

from saehooks.attachments.verbs import ablate, attach, clamp, read, scale, splice, steer

__all__ = ["ablate", "attach", "clamp", "read", "scale", "splice", "steer"]
