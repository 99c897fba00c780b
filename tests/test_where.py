"""Masks over positions: of each text, whatever a forward carries of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saehooks import where as w
from saehooks.attachments import attach
from saehooks.codes import Codes
from saehooks.errors import WhereError
from saehooks.hosts import host
from saehooks.hosts.sequences import Columns, Text
from saehooks.sae import SAE

TOKENS = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 1]])
MODEL = nn.Sequential(nn.Embedding(9, 3))
HOST = host(MODEL)
SITE = HOST.site("0")


def columns_of(tokens=TOKENS, start=0, prompt=None, **text) -> Columns:
    """One forward of tokens that begin at a column, with the prompt it belongs to."""
    shape = tuple(tokens.shape)
    prompt = start + shape[1] if prompt is None else prompt
    carried = Text(shape, tokens, start=start, prompt=prompt, **text)
    return Columns(shape, tokens.device, carried, 0, HOST, SITE)


def masks(rule, *forwards: Columns) -> list[list]:
    """The mask of each of several forwards."""
    rule, found = w.as_where(rule), []
    for columns in forwards:
        codes = Codes.from_dense(torch.ones(*columns.shape, 3))
        mask = w.full_mask(rule, w.View(columns, codes))
        found.append((torch.ones(columns.shape).bool() if mask is None else mask).int().tolist())
    return found


def one(rule, tokens=TOKENS, **text) -> list:
    return masks(rule, columns_of(tokens, **text))[0]


@pytest.mark.parametrize(
    ("rule", "row"),
    [
        (w.last, [0, 0, 0, 1]),
        (w.everywhere, [1, 1, 1, 1]),
        (w.past_first, [0, 1, 1, 1]),
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
        (~w.everywhere, [0, 0, 0, 0]),
        (w.last | 0, [1, 0, 0, 1]),
        (w.everywhere & 0, [1, 0, 0, 0]),
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
    unseen = Columns((1, 4), torch.device("cpu"), Text((1, 4), prompt=4), 0, HOST, SITE)
    with pytest.raises(WhereError, match="needs tokens"):
        masks(w.not_special([0]), unseen)
    with pytest.raises(WhereError, match=r"sh.not_special\(tokenizer\)"):
        one(w.not_special())


GROWING = [TOKENS[:1, :3], TOKENS[:1, :4], torch.cat([TOKENS[:1, :4], TOKENS[:1, :1]], 1)]
CACHED = [columns_of(GROWING[0]), columns_of(GROWING[1][:, 3:], 3, 3), columns_of(GROWING[2][:, 4:], 4, 3)]
RECOMPUTED = [columns_of(tokens, prompt=3) for tokens in GROWING]


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
def test_a_cache_changes_no_position(rule, final):
    """What each step adds under a KV cache is what the last recomputed forward sees as a whole."""
    cached = masks(rule, *CACHED)
    assert [column for mask in cached for column in mask[0]] == final
    assert masks(rule, *RECOMPUTED)[-1][0] == final


RIGHT, LEFT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool(), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("rule", "right", "left"),
    [
        (w.last, [0, 1, 0, 0], [0, 0, 0, 1]),
        (w.everywhere, [1, 1, 0, 0], [0, 0, 1, 1]),
        (w.past_first, [0, 1, 0, 0], [0, 0, 0, 1]),
        (0, [1, 0, 0, 0], [0, 0, 1, 0]),
        (-2, [1, 0, 0, 0], [0, 0, 1, 0]),
        (slice(None, -1), [1, 0, 0, 0], [0, 0, 1, 0]),
        (slice(-1, None), [0, 1, 0, 0], [0, 0, 0, 1]),
        (slice(-3, None, 2), [1, 0, 0, 0], [0, 0, 1, 0]),
        (~w.positions(0), [0, 1, 0, 0], [0, 0, 0, 1]),
        (torch.tensor([True, True, True, False]), [1, 1, 0, 0], [0, 0, 1, 0]),
        (lambda tokens, codes: tokens >= 0, [1, 1, 0, 0], [0, 0, 1, 1]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_padding_has_no_position(rule, right, left):
    """In a padded row positions count its text alone, and no rule holds at padding."""
    assert one(rule, mask=RIGHT)[1] == right
    assert one(rule, mask=LEFT)[1] == left


def test_edits_of_ones_own_see_no_position_at_padding(tiny_hf):
    """The positions that an edit is given count each text, and are -1 at padding, on either side."""
    seen, sae = [], SAE(32, 48, "linear", "relu").eval()
    ids = torch.tensor([[0, 5, 6, 7], [0, 8, 2, 2]])
    for mask, call in ((RIGHT, ids), (LEFT, torch.tensor([[0, 5, 6, 7], [2, 2, 0, 8]]))):
        with attach(tiny_hf, sae, at="model.layers.1", edits=lambda codes, context: (seen.append(context), codes)[1]):
            tiny_hf(call, attention_mask=mask.long())
    assert seen[0].positions.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    assert seen[1].positions.tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1]]


def test_a_new_turn_counts_from_its_own_end():
    """Where several columns continue a cache, negative positions and masks are of the turn, others of the text."""
    turn = columns_of(TOKENS[:1], 3, turn=3)
    assert masks(-1, turn) == [[[0, 0, 0, 1]]]
    assert masks(4, turn) == [[[0, 1, 0, 0]]]
    assert masks(torch.tensor([True, False, False, True]), turn) == [[[1, 0, 0, 1]]]
    assert masks(torch.arange(7) == 5, turn) == [[[0, 0, 1, 0]]]


def test_texts_that_share_a_row_count_each_their_own():
    """In a packed row, whose position ids begin again, first and last are those of each text."""
    packed = {"tokens": torch.arange(5)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    assert one(0, **packed) == [[1, 0, 0, 1, 0]]
    assert one(w.last, **packed) == [[0, 0, 1, 0, 1]]
    assert one(-2, **packed) == [[0, 1, 0, 1, 0]]


def test_an_unknown_start_is_an_error_and_never_0():
    """Where it is not known how much came before, positions are refused, and everywhere is not."""
    unknown = columns_of(start=None, prompt=0)
    assert masks(w.everywhere, unknown) == [[[1] * 4] * 2]
    for rule in (0, w.last, slice(1, None), w.past_first):
        with pytest.raises(WhereError, match="begin cannot be known"):
            masks(rule, unknown)


# ------------------------------------------------------------------ what never came


def came(rule, *forwards: Columns) -> w.Came:
    found = w.Came(w.as_where(rule))
    for columns in forwards:
        found.add(columns)
    return found


@pytest.mark.parametrize(
    ("rule", "missing"),
    [
        (9, 9),
        ([0, 9], 9),
        (-5, -5),
        (slice(9, None), 9),
        (w.positions(9) | 0, 9),
        (w.positions(9) & w.last, 9),
        ([1, 3], None),
        (-4, None),
        (slice(2, None), None),
        (~w.positions([9]), None),
        (w.LeftOut(w.as_where(9)), None),
        (slice(None, 9), None),
        ([False, True, True, True], None),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["full", "right", "left"])
def test_what_is_asked_for_must_come(rule, missing, mask):
    """A position given by number must come in one forward of the block; what is excluded or left out need not."""
    found = came(rule, columns_of(TOKENS[:, :2], mask=None if mask is None else mask[:, :2]), columns_of(mask=mask))
    if missing is None:
        found.check("site")
    else:
        with pytest.raises(WhereError, match=rf"position {missing} at 'site' never came: .* positions 0 to 3"):
            found.check("site")


def test_a_position_between_two_forwards_did_not_come():
    """A cache that was begun outside the block holds positions that no forward of the block had."""
    with pytest.raises(WhereError, match="position 1 at"):
        came([1], columns_of(TOKENS, 3)).check("site")


# ------------------------------------------------------------------ wrong ones


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (torch.ones(5, dtype=torch.bool), r"shape \(5,\); expected \(4,\) or \(2, 4\)"),
        (torch.ones(3, 4, dtype=torch.bool), r"shape \(3, 4\); expected \(4,\) or \(2, 4\)"),
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
        (True, "where=True: write sh.everywhere"),
        (None, "where=None is no rule"),
        (torch.ones(4), r"torch.float32 of shape \(4,\).*mask.bool\(\)"),
        (torch.ones(2, 4, dtype=torch.int64), r"mask.bool\(\)"),
        (torch.tensor([0, 0, 1, 1]), r"all 0 and 1; .*mask.bool\(\)"),
        (torch.ones(1, 2, 4, dtype=torch.bool), r"\(1, 2, 4\); expected \(pos,\) or \(batch, pos\)"),
        (slice(None, None, -1), "positive"),
        (slice(0.5, None), "whole numbers"),
        (lambda tokens: tokens != 0, "two arguments"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_no_where_at_all(rule, message):
    """Wrong types are found without any forward."""
    with pytest.raises(WhereError, match=message):
        w.as_where(rule)


# ------------------------------------------------------------------ left out


def trained(positions) -> SAE:
    sae = SAE(d_in=3, d_sae=6)
    sae.cfg.metadata["training"] = {"positions": positions}
    return sae


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        ("all but the first", "all but the first"),
        ("all", "sh.everywhere"),
        ("sh.positions([0, 3])", "sh.positions([0, 3])"),
        ("sh.positions(slice(1, None, 2))", "sh.positions(slice(1, None, 2))"),
        ("(sh.last | ~sh.pooled)", "(sh.last | ~sh.pooled)"),
        ("sh.not_special([0, 1])", "sh.not_special([0, 1])"),
        ("a mask of shape (4,)", "sh.everywhere"),
        ("the function <lambda>", "sh.everywhere"),
        ("__import__('os').getcwd()", "sh.everywhere"),
        (7, "sh.everywhere"),
    ],
)
def test_left_out_it_is_where_the_sae_was_trained(said, rule):
    """What the metadata of an SAE say; one that does not say acts everywhere."""
    assert repr(w.where_of(trained(said))) == rule


def test_left_out_of_training_it_is_all_but_the_first():
    """An SAE that does not say is trained on all but the first position."""
    assert repr(w.where_of(SAE(3, 6), training=True)) == "all but the first"
    assert repr(w.where_of(SAE(3, 6))) == "sh.everywhere"
    assert repr(w.where_of(trained("sh.last"), training=True)) == "sh.last"
    assert repr(w.where_of(trained("sh.last"), 0)) == "sh.positions([0])"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("positions [1:]", "sh.positions(slice(1, None))"),
        ("positions [2:-1]", "sh.positions(slice(2, -1))"),
        ("positions [:3]", "sh.positions(slice(None, 3))"),
        ("positions [0, 3]", "sh.positions([0, 3])"),
    ],
)
def test_older_metadata_are_understood(written, expected):
    """SAEs saved before rules had a repr of their own act where they were trained; the packaged one is of these."""
    from saehooks.where import parse

    assert repr(parse(written)) == repr(parse(expected)) != "None"


def test_the_packaged_sae_acts_where_it_was_trained():
    """All but the first position, as its training leaves out the attention sink."""
    from saehooks.demo import packaged_sae
    from saehooks.where import where_of

    assert repr(where_of(packaged_sae("smollm2"))) == "all but the first"
