"""Codes: compressed sparse rows with a batch shape."""

from __future__ import annotations

import pytest
import torch

from saehooks import Codes
from saehooks.errors import ConfigError, LatentError, WidthError

DENSE = torch.tensor([[[0.0, 2.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]], [[5.0, 1.0, 4.0, 0.0], [0.0, 0.0, 3.0, 0.0]]])


@pytest.fixture
def codes():
    """Two sequences of two positions over four latents."""
    return Codes.from_dense(DENSE)


def test_compressed_rows_by_hand(codes):
    """Indices ascend inside a row, offsets say where each row starts."""
    assert codes.indices.tolist() == [1, 3, 0, 1, 2, 2]
    assert codes.values.tolist() == [2, -1, 5, 1, 4, 3]
    assert codes.offsets.tolist() == [0, 2, 2, 5, 6]
    assert codes.rows.tolist() == [0, 0, 2, 2, 2, 3]
    assert codes.shape == (2, 2)
    assert len(codes) == 2


def test_dense_undoes_from_dense(codes):
    """Compressing and spreading out again changes nothing."""
    assert torch.equal(codes.dense(), DENSE)


def test_support_is_explicit():
    """A selected latent can hold zero: it counts, and comes back as zero."""
    support = torch.tensor([[True, False, True]])
    codes = Codes.from_dense(torch.tensor([[0.0, 0.0, 7.0]]), support)
    assert codes.support_size.tolist() == [2]
    assert codes.dense().tolist() == [[0, 0, 7]]


def test_reading(codes):
    """Support sizes, values of one latent and firing counts, by hand."""
    assert codes.support_size.tolist() == [[2, 0], [3, 1]]
    assert codes.of(1).tolist() == [[2, 0], [1, 0]]
    assert codes.counts().tolist() == [1, 2, 2, 1]


def test_top_pads_short_rows(codes):
    """Strongest first; latent -1 and value 0 where a row has fewer, also for k beyond every row."""
    top = codes.top(2)
    assert top.latents.tolist() == [[[1, 3], [-1, -1]], [[0, 2], [2, -1]]]
    assert top.values.tolist() == [[[2, -1], [0, 0]], [[5, 4], [3, 0]]]
    assert codes.top(6).latents.shape == (2, 2, 6)
    with pytest.raises(ConfigError, match="k >= 1"):
        codes.top(0)


def test_latents_out_of_range_are_named(codes):
    """Asking for a latent that does not exist says which ones do."""
    with pytest.raises(LatentError, match="latents 0 to 3"):
        codes.of(4)
    with pytest.raises(LatentError):
        codes.of(-1)


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(0, 1),
        (slice(None), 1),
        (1, 0),
        torch.tensor([1, 0, 1]),
        torch.tensor([[True, False], [True, True]]),
    ],
)
def test_indexing_follows_tensors(codes, index):
    """Codes at batch positions are what the dense tensor holds there."""
    picked = codes[index]
    assert torch.equal(picked.dense(), DENSE[index])
    assert picked.shape == tuple(DENSE[index].shape[:-1])


def test_scale_follows_its_rows(codes):
    """The multiplier of a row stays with it through indexing, joining and casting."""
    scaled = Codes(codes.indices, codes.values, codes.offsets, codes.shape, 4, torch.tensor([1.0, 2, 3, 4]))
    assert scaled[1].scale.tolist() == [3, 4]
    assert Codes.cat([scaled, scaled[:1]]).scale.tolist() == [1, 2, 3, 4, 1, 2]
    assert scaled.to(torch.float64).scale.dtype == torch.float64
    assert scaled.detach().scale.tolist() == [1, 2, 3, 4]


def test_cat_joins_the_first_axis(codes):
    """Joined codes are the joined dense tensors; unlike codes are refused."""
    joined = Codes.cat([codes, codes[:1]])
    assert torch.equal(joined.dense(), torch.cat([DENSE, DENSE[:1]]))
    with pytest.raises(WidthError):
        Codes.cat([codes, Codes.from_dense(torch.ones(1, 2, 5))])
    with pytest.raises(ConfigError):
        Codes.cat([])


def test_keep_drops_entries(codes):
    """Keeping some entries leaves rows where they are."""
    kept = codes.keep(codes.values > 1.5)
    assert torch.equal(kept.dense(), DENSE.where(DENSE > 1.5, 0.0))
    assert kept.support_size.tolist() == [[1, 0], [2, 1]]


def test_values_carry_gradients(codes):
    """A gradient reaches the values through dense() and of()."""
    values = codes.values.clone().requires_grad_()
    live = codes.with_values(values)
    (live.dense().sum() + 10 * live.of(1).sum()).backward()
    assert values.grad.tolist() == [11, 1, 1, 11, 1, 1]


def test_empty_batches():
    """No rows, or rows without latents, are codes too."""
    none = Codes.from_dense(torch.zeros(0, 3, 4))
    assert none.support_size.shape == (0, 3)
    assert none.top(2).latents.shape == (0, 3, 2)
    assert Codes.from_dense(torch.zeros(2, 4)).top(1).latents.tolist() == [[-1], [-1]]


def test_wrong_offsets_and_lengths_are_refused():
    """Codes whose parts do not fit each other cannot be made."""
    with pytest.raises(WidthError, match="offsets"):
        Codes(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(2, dtype=torch.int64), (3,), 4)
    with pytest.raises(WidthError, match="equally long"):
        Codes(torch.zeros(2, dtype=torch.int64), torch.zeros(1), torch.tensor([0, 2]), (1,), 4)


def test_repr_says_what_matters(codes):
    """Shape, width and L0 at a glance."""
    assert repr(codes) == "Codes(shape=(2, 2), d_sae=4, l0=1.5, dtype=float32)"


def test_select_rows_counts_negative_rows_from_the_end():
    """Negative rows are those that a tensor's indexing gives, not the entries of some other row."""
    dense = torch.tensor([[1.0, 0, 2], [0, 3, 0], [4, 5, 6], [0, 0, 7]])
    codes, rows = Codes.from_dense(dense, scale=torch.arange(4.0)), torch.tensor([-2, 0, -4, 3, -1])
    found = codes.select_rows(rows)
    assert torch.equal(found.dense(), dense[rows])
    assert torch.equal(found.scale, torch.arange(4.0)[rows])


def test_codes_times_a_number_or_a_tensor():
    """``codes * 2`` and ``codes / 2`` scale the values; a tensor of the batch shape scales each row by its own."""
    codes = Codes.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    assert (codes * 2).dense().tolist() == (2 * codes).dense().tolist() == [[0.0, 4.0], [2.0, 0.0]]
    assert (codes / 2).dense().tolist() == [[0.0, 1.0], [0.5, 0.0]]
    assert (codes * torch.tensor([3.0, 5.0])).dense().tolist() == [[0.0, 6.0], [5.0, 0.0]]
    with pytest.raises(WidthError, match="does not broadcast"):
        codes * torch.ones(3)
    with pytest.raises(TypeError):
        codes * "two"
