"""Methods that several blocks replace at once, and that end in any order."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from saehooks.hosts.method_wrapper import replaced_method


class Text(nn.Module):
    def forward(self, text):
        return text


def adding(letter):
    return lambda forward: lambda text: letter + forward(text)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_three_blocks_end_in_any_order(order):
    """Whichever ends, the others stay around the method, the later ones outside; at last the method is its own."""
    model, letters = Text(), ["a", "b", "c"]
    blocks = [replaced_method(model, "forward", adding(letter)) for letter in letters]
    for block in blocks:
        block.__enter__()
    assert model("x") == "cbax"
    left = dict(enumerate(letters))
    for i in order:
        blocks[i].__exit__(None, None, None)
        del left[i]
        assert model("x") == "".join(reversed(left.values())) + "x"
    assert "forward" not in vars(model)
