"""Edits on codes small enough to write the answer by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saehooks import edits
from saehooks.codes import Codes
from saehooks.errors import ConfigError, LatentError, WidthError

DENSE = torch.tensor([[[0.0, 2.0, 0.0, 0.5], [1.0, 0.0, -3.0, 0.0]]])  # (batch 1, pos 2, d_sae 4)


@pytest.fixture
def codes() -> Codes:
    return Codes.from_dense(DENSE, scale=torch.tensor([1.0, 10.0]))


def well_formed(codes: Codes) -> bool:
    keys = codes.rows * codes.d_sae + codes.indices
    return bool((keys.diff() > 0).all()) and codes.offsets[-1] == codes.indices.numel()


def test_zero_keeps_the_support(codes):
    """A zeroed latent stays selected and holds 0; the others are the same bits."""
    edited = edits.zero([1, 2])(codes)
    assert edited.dense().tolist() == [[[0.0, 0.0, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0]]]
    assert edited.support_size.tolist() == [[2, 2]]


def test_keep_zeroes_the_others(codes):
    """``keep`` leaves only the given latents."""
    assert edits.keep([3])(codes).dense().tolist() == [[[0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]]]


def test_clamp_inserts_where_absent(codes):
    """``clamp`` sets the value in every row, selected there or not, in ascending order."""
    edited = edits.clamp({2: 7.0, 0: -1.0})(codes)
    assert edited.dense().tolist() == [[[-1.0, 2.0, 7.0, 0.5], [-1.0, 0.0, 7.0, 0.0]]]
    assert well_formed(edited)
    assert edited.scale is codes.scale
    assert edited.support_size.tolist() == [[4, 2]]


def test_clamp_takes_a_value_for_each_position(codes):
    """A tensor that broadcasts to (batch, pos) clamps each position to its own value."""
    edited = edits.clamp({2: torch.tensor([5.0, 6.0])})(codes)
    assert edited.dense()[..., 2].tolist() == [[5.0, 6.0]]
    with pytest.raises(WidthError, match=r"value of latent 2 has shape \(3,\).*\(1, 2\)"):
        edits.clamp({2: torch.zeros(3)})(codes)


def test_add_starts_from_zero_where_absent(codes):
    """``add`` inserts a latent that was not selected and adds to one that was."""
    edited = edits.add({1: 4.0})(codes)
    assert edited.dense()[..., 1].tolist() == [[6.0, 4.0]]
    assert well_formed(edited)


def test_scale_touches_selected_latents_only(codes):
    """``scale`` inserts nothing."""
    edited = edits.scale({1: 0.5, 2: torch.tensor([[9.0, 2.0]])})(codes)
    assert edited.dense().tolist() == [[[0.0, 1.0, 0.0, 0.5], [1.0, 0.0, -6.0, 0.0]]]
    assert torch.equal(edited.indices, codes.indices)


def test_compose_runs_in_order(codes):
    """Order matters: adding then zeroing leaves 0, zeroing then adding leaves the delta."""
    assert edits.compose(edits.add({1: 4.0}), edits.zero([1]))(codes).of(1).tolist() == [[0.0, 0.0]]
    assert edits.compose(edits.zero([1]), edits.add({1: 4.0}))(codes).of(1).tolist() == [[4.0, 4.0]]


@pytest.mark.parametrize(
    "edit",
    [edits.zero([]), edits.clamp({}), edits.add({}), edits.scale({}), edits.compose(), edits.scale({0: 1.0})],
    ids=repr,
)
def test_edits_that_do_nothing_change_no_bit(codes, edit):
    """An empty edit gives back the very same values."""
    edited = edit(codes)
    assert torch.equal(edited.values, codes.values)
    assert torch.equal(edited.indices, codes.indices)


@pytest.mark.parametrize("dense", [torch.zeros(0, 4), torch.zeros(2, 4)], ids=["no rows", "empty rows"])
@pytest.mark.parametrize(
    "edit", [edits.zero(1), edits.keep(1), edits.clamp({1: 2.0}), edits.add({1: 2.0}), edits.scale({1: 2.0})], ids=repr
)
def test_edits_of_codes_without_entries(dense, edit):
    """Codes with no rows, or with nothing selected, are edited too."""
    edited = edit(Codes.from_dense(dense))
    assert edited.shape == tuple(dense.shape[:-1])
    assert edited.of(1).tolist() == [2.0 if edit.name in ("clamp", "add") else 0.0] * dense.shape[0]


def test_gradients_in_float64():
    """Edits are differentiable in the values and in what they are given."""
    values = torch.tensor([2.0, 0.5, 1.0, -3.0], dtype=torch.float64, requires_grad=True)
    amount = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    codes = Codes.from_dense(DENSE.double())

    def edited(values, amount):
        chain = edits.compose(edits.scale({1: amount}), edits.add({0: amount}), edits.clamp({2: amount}), edits.zero(3))
        return chain(codes.with_values(values)).values

    assert torch.autograd.gradcheck(edited, (values, amount))


@pytest.mark.parametrize("latents", [3, [3], (3,), torch.tensor([3]), torch.tensor(3), range(3, 4), {3}], ids=repr)
def test_latents_come_in_any_list(latents):
    """One latent, a list, a tensor, a range: all name the same latents."""
    assert edits.zero(latents).latents == (3,)


@pytest.mark.parametrize("latents", ["3", [1.5], None, [[1]]], ids=repr)
def test_latents_must_be_whole_numbers(latents):
    """Anything else is told what a list of latents looks like."""
    with pytest.raises(LatentError, match="whole numbers"):
        edits.zero(latents)


def test_clamp_wants_a_mapping():
    """A list where a mapping is needed shows the mapping."""
    with pytest.raises(LatentError, match=r"clamp\(\{901: 8.0\}\)"):
        edits.clamp([901])


@pytest.mark.parametrize("edit", [edits.clamp, edits.add, edits.scale])
def test_values_must_be_numbers(edit):
    """A value that is neither number nor tensor is named before any forward."""
    with pytest.raises(LatentError, match=r"number or a tensor for latent 901, as in .*; got '8'"):
        edit({3: 1, 901: "8"})


@pytest.mark.parametrize("latent", [4, -1])
def test_latent_out_of_range(codes, latent):
    """The error names the edit, the latent and the range."""
    with pytest.raises(LatentError, match=rf"zero\(\[{latent}\]\): latent {latent} is out of range.*0 to 3"):
        edits.zero(latent)(codes)


def test_custom_edits_may_take_the_context(codes):
    """A function of two arguments is given site, tokens and positions; a default value is left alone."""
    context = edits.Context("site", None, torch.arange(2))
    seen = []

    def with_context(codes, context):
        seen.append(context.site)
        return codes

    def with_default(codes, factor=2.0):
        return codes.with_values(codes.values * factor)

    edited = edits.run([with_context, with_default], codes, context)
    assert seen == ["site"]
    assert torch.equal(edited.values, codes.values * 2)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda c: c.values, ConfigError, "returned Tensor"),
        (lambda c: None, ConfigError, "returned NoneType"),
        (lambda c: c[:, :1], ConfigError, "shape and d_sae"),
        (lambda c: Codes.from_dense(c.dense()), ConfigError, "scale=codes.scale"),
        (lambda c: replace(c, indices=c.indices.flip(0)), ConfigError, "ascend"),
        (lambda c: replace(c, indices=c.indices + 9), LatentError, "latent 12"),
    ],
)
def test_custom_edits_are_checked(codes, bad, error, message):
    """What a custom edit returns must be codes of the same batch, in order, with the scale."""
    with pytest.raises(error, match=message):
        edits.run([bad], codes)


def test_as_edits_refuses_what_is_no_function():
    """A list of latents in place of edits is told how to write it."""
    with pytest.raises(ConfigError, match=r"edits.zero\(\[3\]\)"):
        edits.as_edits([3])


def test_difference_and_merge_by_hand(codes):
    """The difference covers both supports and is exactly 0 where nothing changed; merging takes rows."""
    edited = edits.compose(edits.add({0: 0.25}), edits.zero(3))(codes)
    delta = edits.difference(edited, codes)
    assert delta.dense().tolist() == [[[0.25, 0.0, 0.0, -0.5], [0.25, 0.0, 0.0, 0.0]]]
    assert edits.without_zeros(delta).support_size.tolist() == [[2, 1]]
    merged = edits.merge_rows(codes, edited, torch.tensor([[False, True]]))
    assert merged.dense().tolist() == [[[0.0, 2.0, 0.0, 0.5], [1.25, 0.0, -3.0, 0.0]]]
    assert merged.scale is codes.scale
    assert well_formed(merged)


def test_merging_random_codes_agrees_with_dense():
    """Rows are taken whole from one side or the other, whatever their supports."""
    torch.manual_seed(0)
    one, other = (torch.randn(4, 5, 7).relu() for _ in range(2))
    mask = torch.rand(4, 5) < 0.5
    merged = edits.merge_rows(Codes.from_dense(one), Codes.from_dense(other), mask)
    assert torch.equal(merged.dense(), torch.where(mask[..., None], other, one))


def test_keep_top_keeps_the_largest_of_each_row(codes):
    """``keep_top(k)`` zeroes all but the k largest values of each row; ties go to the lower latent."""
    assert edits.strongest is edits.keep_top
    assert repr(edits.keep_top(3)) == "keep_top(3)"
    assert edits.keep_top(1)(codes).dense().tolist() == [[[0.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]]
    assert edits.keep_top(9)(codes).dense().tolist() == DENSE.tolist()
    level = Codes.from_dense(torch.tensor([[1.0, 1.0, 1.0]]))
    assert edits.keep_top(2)(level).dense().tolist() == [[1.0, 1.0, 0.0]]
    for wrong in (-1, 1.5, True):
        with pytest.raises(ConfigError, match="whole number"):
            edits.keep_top(wrong)


def test_an_edit_that_writes_in_place_works_on_a_copy(codes):
    """What a user's edit writes into its codes takes effect, and the codes it was given stay as they were."""

    def zero(codes):
        codes.values[codes.indices == 1] = 0
        return codes

    def swap(codes):
        codes.indices[0] = 0
        return codes

    def stretch(codes):
        codes.scale.mul_(2)
        return codes

    assert edits.run([zero], codes).dense().tolist() == [[[0.0, 0.0, 0.0, 0.5], [1.0, 0.0, -3.0, 0.0]]]
    assert edits.run([swap], codes).dense().tolist() == [[[2.0, 0.0, 0.0, 0.5], [1.0, 0.0, -3.0, 0.0]]]
    assert edits.run([stretch], codes).scale.tolist() == [2.0, 20.0]
    assert codes.dense().tolist() == DENSE.tolist()
    assert codes.scale.tolist() == [1.0, 10.0]
    with torch.inference_mode():
        assert edits.run([zero], Codes.from_dense(DENSE)).dense()[0, 0].tolist() == [0.0, 0.0, 0.0, 0.5]


def test_an_edit_that_changes_values_alone_keeps_the_support_object(codes):
    """A support that was not written into is the original's: then nothing has to be matched."""
    edited = edits.run([lambda codes: codes.with_values(codes.values * 2)], codes)
    assert edited.indices is codes.indices
    assert edited.scale is codes.scale
