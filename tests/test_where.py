"""Masks over positions, absolute also when forwards continue one another."""

from __future__ import annotations

import pytest
import torch

from saehooks import where as w
from saehooks.codes import Codes
from saehooks.errors import WhereError
from saehooks.hosts.base import ForwardCall

TOKENS = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 1]])


def codes_for(batch: int, pos: int) -> Codes:
    return Codes.from_dense(torch.ones(batch, pos, 3))


def masks(rule, *calls: ForwardCall, pos=None) -> list[list]:
    """The mask of each of several forwards in one block."""
    cursor, rule, found = w.Cursor(), w.as_where(rule), []
    for call in calls:
        cursor.begin(call)
        shape = tuple(call.tokens.shape) if call.tokens is not None else pos
        found.append(w.full_mask(rule, cursor.look(codes_for(*shape))).int().tolist())
    return found


def one(rule, tokens=TOKENS, **call) -> list:
    return masks(rule, ForwardCall(tokens, **call))[0]


@pytest.mark.parametrize(
    ("rule", "row"),
    [
        (w.last, [0, 0, 0, 1]),
        (0, [1, 0, 0, 0]),
        (-1, [0, 0, 0, 1]),
        ([0, -2], [1, 0, 1, 0]),
        (torch.tensor([0, 3]), [1, 0, 0, 1]),
        (slice(1, None), [0, 1, 1, 1]),
        (slice(None, -1), [1, 1, 1, 0]),
        (slice(-2, None), [0, 0, 1, 1]),
        (slice(0, None, 2), [1, 0, 1, 0]),
        (range(1, 3), [0, 1, 1, 0]),
        (w.positions([1, 2]), [0, 1, 1, 0]),
        (~w.last, [1, 1, 1, 0]),
        (w.last | 0, [1, 0, 0, 1]),
        (w.positions(slice(1, None)) & ~w.last, [0, 1, 1, 0]),
        (torch.tensor([True, False, False, True]), [1, 0, 0, 1]),
        ([True, False, False, True], [1, 0, 0, 1]),
        (torch.tensor([True, False, False, True]).numpy(), [1, 0, 0, 1]),
        ([], [0, 0, 0, 0]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_positions_of_one_forward(rule, row):
    """Ints, lists, slices and masks choose the same columns in every row."""
    assert one(rule) == [row, row]


def test_masks_by_row_and_functions():
    """A (batch, pos) mask and a function of tokens and codes choose by row."""
    mask = torch.tensor([[True, False, False, False], [False, True, True, True]])
    assert one(mask) == mask.int().tolist()
    assert one(lambda tokens, codes: tokens != 0) == [[0, 1, 1, 1], [0, 1, 1, 1]]
    assert one(lambda tokens, codes: codes.of(1) > 0) == [[1] * 4, [1] * 4]


def test_special_tokens_are_skipped():
    """Ids of a tokenizer, or given ones; CLIP's padding after the end of the text goes too."""

    class Tokenizer:
        all_special_ids = (0, 1)

    class ClipTokenizer(Tokenizer):
        eot_token_id = 6

    assert one(w.not_special(Tokenizer())) == [[0, 1, 1, 1], [0, 1, 1, 0]]
    assert one(w.not_special([7])) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert one(w.not_special(ClipTokenizer())) == [[0, 1, 0, 0], [0, 1, 1, 0]]


def test_special_tokens_need_tokens_and_a_tokenizer():
    """Without tokens (images), or without any tokenizer, the error says so."""
    with pytest.raises(WhereError, match="needs tokens"):
        masks(w.not_special([0]), ForwardCall(None), pos=(1, 4))
    with pytest.raises(WhereError, match=r"sh.not_special\(tokenizer\)"):
        one(w.not_special())


GROWING = [TOKENS[:1, :3], TOKENS[:1, :4], torch.cat([TOKENS[:1, :4], TOKENS[:1, :1]], 1)]
CACHED = [ForwardCall(GROWING[0]), ForwardCall(GROWING[1][:, 3:], 3), ForwardCall(GROWING[2][:, 4:], 4)]
RECOMPUTED = [ForwardCall(tokens) for tokens in GROWING]


@pytest.mark.parametrize(
    ("rule", "final"),
    [
        (w.last, [0, 0, 1, 1, 1]),
        (-1, [0, 0, 1, 0, 0]),
        ([1, 4], [0, 1, 0, 0, 1]),
        (slice(2, None), [0, 0, 1, 1, 1]),
        (slice(None, -1), [1, 1, 0, 0, 0]),
        ([False, True, True], [0, 1, 1, 0, 0]),
        (torch.tensor([[True, False, True]]), [1, 0, 1, 0, 0]),
        (lambda tokens, codes: tokens != 0, [0, 1, 1, 1, 0]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_generating_with_and_without_cache_chooses_the_same_positions(rule, final):
    """What each step adds under a KV cache is what the last recomputed forward sees as a whole."""
    cached = masks(rule, *CACHED)
    assert [column for mask in cached for column in mask[0]] == final
    assert masks(rule, *RECOMPUTED)[-1][0] == final


def test_a_fresh_prompt_begins_a_new_sequence():
    """A forward that does not continue the one before it has a prompt of its own."""
    other = torch.tensor([[9, 9, 9, 9, 9, 9]])
    assert masks(w.last, *CACHED, ForwardCall(other))[-1] == [[0, 0, 0, 0, 0, 1]]
    assert masks(w.last, *RECOMPUTED, ForwardCall(other))[-1] == [[0, 0, 0, 0, 0, 1]]
    assert masks(w.last, ForwardCall(TOKENS), ForwardCall(TOKENS))[-1] == [[0, 0, 0, 1]] * 2


def test_last_follows_the_attention_mask():
    """With rows padded on the right, ``last`` is each row's last real token."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert one(w.last, attention_mask=mask) == [[0, 0, 0, 1], [0, 1, 0, 0]]
    left = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert one(w.last, attention_mask=left) == [[0, 0, 0, 1], [0, 0, 0, 1]]


def test_tokens_of_another_shape_are_not_shown():
    """Where columns are not tokens (image patches beside text), tokens are None."""
    cursor = w.Cursor()
    cursor.begin(ForwardCall(TOKENS))
    assert cursor.look(codes_for(2, 17)).tokens is None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (torch.ones(5, dtype=torch.bool), r"shape \(5,\); expected \(4,\) or \(2, 4\)"),
        (torch.ones(3, 4, dtype=torch.bool), r"shape \(3, 4\); expected \(4,\) or \(2, 4\)"),
        (-5, "position -5 is before the first"),
        (lambda tokens, codes: tokens[:, :2] > 0, r"shape \(2, 2\); expected torch.bool of shape \(2, 4\)"),
        (lambda tokens, codes: tokens, "torch.int64"),
        (lambda tokens, codes: True, "returned True"),
    ],
)
def test_wrong_shapes_at_the_first_forward(rule, message):
    """The error names the shape that was given and the one that was expected."""
    with pytest.raises(WhereError, match=message):
        one(rule)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("last", r"'last' is a text; write where=sh\.last"),
        (1.5, "whole numbers or a slice"),
        (torch.ones(4), r"torch.float32 of shape \(4,\).*mask.bool\(\)"),
        (torch.ones(2, 4, dtype=torch.int64), r"mask.bool\(\)"),
        (torch.ones(1, 2, 4, dtype=torch.bool), r"\(1, 2, 4\); expected \(pos,\) or \(batch, pos\)"),
        (slice(None, None, -1), "positive"),
        (lambda tokens: tokens != 0, "two arguments"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_no_where_at_all(rule, message):
    """Wrong types are found without any forward."""
    with pytest.raises(WhereError, match=message):
        w.as_where(rule)
