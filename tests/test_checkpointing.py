"""Activation checkpointing runs modules again in the backward pass: the same forward, edited alike, recorded once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import saehooks as sh

TEXTS = torch.tensor([[0, 5, 6, 7, 8, 9]]), torch.tensor([[0, 40, 41, 42, 43, 44]])
WIDTH, VOCABULARY = 16, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Four blocks, checkpointed in one of several ways."""

    def __init__(self, way="plain", reentrant=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.way, self.reentrant = way, reentrant

    def forward(self, ids):
        return self.head(getattr(self, self.way)(self.embed(ids)))

    def again(self, function, *args):
        return checkpoint(function, *args, use_reentrant=self.reentrant)

    def plain(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def modules_of(self, x):
        for block in self.blocks:
            x = self.again(block, x)
        return x

    def functions(self, x):
        for block in self.blocks:
            x = self.again(lambda x, b=block: x + b.down(torch.tanh(b.up(b.norm(x)))), x)
        return x

    def closures(self, x):
        for block in self.blocks:
            x = checkpoint(lambda b=block, x=x: b(x), use_reentrant=False)
        return x

    def nested(self, x):
        for i in (0, 2):
            x = self.again(lambda x, i=i: self.again(self.blocks[i + 1], self.blocks[i](x)), x)
        return x

    def sequence(self, x):
        return checkpoint_sequential(list(self.blocks), 2, x, use_reentrant=self.reentrant)


WAYS = [
    *((way, kind) for way in ("modules_of", "functions", "nested", "sequence") for kind in (False, True)),
    ("closures", False),
]


def new_sae(width=WIDTH):
    torch.manual_seed(1)
    return sh.SAE(width, 48, "linear", "relu").eval()


def run(model, block, order=(1, 0)):
    """Forwards of both texts in a block, then their backward passes in an order: gradients, and what was recorded."""
    with block(model) as trace:
        losses = [model(TEXTS[0]).logsumexp(-1).sum(), model(TEXTS[1]).square().sum()]
        for i in order:
            losses[i].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), trace


@pytest.mark.parametrize(("way", "reentrant"), WAYS)
@pytest.mark.filterwarnings("error:a forward past")
@pytest.mark.parametrize("where", [sh.last, lambda tokens, codes: tokens % 3 == 0, ~sh.positions(-2)])
def test_gradients_and_traces_are_those_without_checkpoints(way, reentrant, where):
    """Steering and splicing give the gradients, the recorded codes and their gradients of the plain model."""
    sae = new_sae()
    steer = lambda model: sh.steer(model, sae, {7: 3.0}, at="blocks.1.up", where=where, keep_all=True)  # noqa: E731
    splice = lambda model: sh.splice(model, sae, at="blocks.1.up", where=where, keep_all=True, grads=True)  # noqa: E731
    for block in (steer, splice):
        right, plain = run(Model(), block)
        found, trace = run(Model(way, reentrant), block)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
        assert [one.codes.shape for one in trace.forwards] == [one.codes.shape for one in plain.forwards]
        for one, other in zip(trace.forwards, plain.forwards, strict=True):
            torch.testing.assert_close(one.codes.dense(), other.codes.dense())
            if block is splice:
                torch.testing.assert_close(one.grads.dense(), other.grads.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("error:a forward past")
def test_memory_that_is_used_again_is_no_earlier_forward(reentrant):
    """Inside another checkpoint the inner one's input is freed, and its address comes again, in another text."""
    sae = new_sae()
    texts = torch.randint(1, VOCABULARY, (80, 2, 1, 6), generator=torch.Generator().manual_seed(0))
    where = lambda tokens, codes: tokens % 3 == 0  # noqa: E731
    gradients = {}
    for way in ("plain", "nested"):
        model = Model(way, reentrant)
        with sh.steer(model, sae, {7: 3.0}, at="blocks.1.up", where=where, keep_all=True):
            gradients[way] = []
            for two in texts:
                model.zero_grad()
                losses = [model(text).logsumexp(-1).sum() for text in two]
                losses[1].backward()
                losses[0].backward()
                gradients[way].append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(torch.stack(gradients["nested"]), torch.stack(gradients["plain"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("way", "reentrant"), WAYS)
def test_what_is_computed_twice_is_trained_on_once(way, reentrant):
    """``train`` takes each row of each forward once."""
    model = Model(way, reentrant)
    with sh.train(model, new_sae(), at="blocks.1.up", where=sh.everywhere, batch_size=2) as trainer:
        for text in TEXTS:
            model(text).sum().backward()
    assert trainer.rows_seen == 12


def test_a_graph_that_is_walked_twice_is_one_forward():
    """With ``retain_graph=True`` a module runs a third time, and is still recorded once."""
    model = Model("modules_of")
    with sh.steer(model, new_sae(), {7: 3.0}, at="blocks.1.up", where=sh.last) as trace:
        loss = model(TEXTS[0]).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert trace.calls == 1


def test_backward_after_the_block_is_said():
    """With reentrant checkpoints, gradients computed after the block would be those of the model without the edits."""
    model = Model("modules_of", True)
    block = sh.steer(model, new_sae(), {7: 3.0}, at="blocks.1.up")
    with pytest.warns(UserWarning, match="call backward inside it"), block:
        model(TEXTS[0]).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sh.steer(model, new_sae(), {7: 3.0}, at="blocks.1.up"):
            model(TEXTS[0]).sum().backward()
