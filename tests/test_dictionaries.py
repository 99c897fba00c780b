"""Dictionaries against dense formulations in float64, values and gradients; kron against its explicit form."""

from __future__ import annotations

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError
from saehooks.kernels import (
    BatchTopK,
    Entmax,
    FeatureChoice,
    Sparsemax,
    Step,
    Threshold,
    TopK,
    select_pairs,
    select_rows,
)


def dense_concepts(sae, x):
    """Scores, scale and decoder of a concept dictionary, keys and values written out."""
    d = sae.dictionary
    centred = x - d.b_dec if d.b_dec is not None else x
    norm = centred.norm(dim=1, keepdim=True)
    keys, values = d.C @ d.W_k, d.C @ d.W_v
    offset = 0.0 if d.b_dec is None else d.b_dec
    return centred / (norm + d.eps) @ keys.T, lambda codes: norm * (codes @ values) + offset


def dense_linear(sae, x):
    """Scores and decoder of a linear dictionary."""
    d = sae.dictionary
    return (x - d.b_dec) @ d.W_enc + d.b_enc, lambda codes: codes @ d.W_dec + d.b_dec


def dense_kron(sae, x):
    """Scores and decoder of a Kronecker dictionary, every product formed; finite gradients by a mask."""
    d = sae.dictionary
    p = ((x - d.b_dec) @ d.P.T).relu().view(-1, d.heads, d.m)
    q = ((x - d.b_dec) @ d.Q.T).relu().view(-1, d.heads, d.n)
    product = torch.einsum("rhm,rhn->rhmn", p, q).flatten(1)
    scores = torch.where(product > 0, product.where(product > 0, 1.0).sqrt(), 0.0)
    return scores, lambda codes: codes @ d.W_dec + d.b_dec


DENSE = {"concepts": dense_concepts, "linear": dense_linear, "kron": dense_kron}


def simplex(scores):
    """Sparsemax by sorting."""
    ordered = scores.sort(dim=1, descending=True).values
    rank = torch.arange(1, scores.shape[1] + 1)
    size = (1 + rank * ordered > ordered.cumsum(1)).sum(1, keepdim=True)
    tau = (ordered.cumsum(1).gather(1, size - 1) - 1) / size
    return (scores - tau).clamp(min=0)


CODES = {
    "relu": lambda scores: scores.relu(),
    "topk": lambda scores: scores.relu() * (scores >= scores.topk(4, dim=1).values[:, -1:]),
    "score": lambda scores: scores * (simplex(scores) > 0),
    "weight": simplex,
}


def sae_of(dictionary, codes, seed=0):
    """A float64 SAE of one cell with nothing at its starting value."""
    torch.manual_seed(seed)
    settings = {"relu": {}, "topk": {"k": 4}}.get(codes, {"values": codes})
    activation = codes if codes in ("relu", "topk") else "sparsemax"
    sae = sh.SAE(8, 48, dictionary, activation, dtype=torch.float64, **settings)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return sae


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dictionary", DENSE)
def test_against_the_dense_formulation(dictionary, codes):
    """Codes, reconstruction and all gradients are those of an independent dense SAE, in float64."""
    sae, x = sae_of(dictionary, codes), torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    direction, wanted = torch.randn(13, 8, dtype=torch.float64), [*sae.parameters(), x]
    out = sae(x)
    scores, decode = DENSE[dictionary](sae, x)
    expected = CODES[codes](scores)
    torch.testing.assert_close(out.codes.dense(), expected)
    torch.testing.assert_close(out.recons, decode(expected))
    mine = torch.autograd.grad((out.recons * direction).sum(), wanted, allow_unused=True)
    theirs = torch.autograd.grad((decode(expected) * direction).sum(), wanted, allow_unused=True)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dictionary", DENSE)
def test_gradcheck(dictionary):
    """The gradient with respect to the activations is the derivative of the reconstruction."""
    sae, x = sae_of(dictionary, "score"), torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sae(x).recons, x, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("dictionary", DENSE)
def test_decode_is_affine_and_directions_are_its_slopes(dictionary):
    """One more unit of a latent adds its direction, times the row's scale; the delta has no offset."""
    sae, x = sae_of(dictionary, "score"), torch.randn(5, 8, dtype=torch.float64)
    codes = sae.encode(x)
    more = codes.with_values(codes.values + 1)
    added = torch.zeros(5, 8, dtype=torch.float64).index_add(0, codes.rows, sae.directions(codes.indices))
    scale = 1.0 if codes.scale is None else codes.scale[:, None]
    torch.testing.assert_close(sae.decode(more) - sae.decode(codes), scale * added)
    offset = sae.dictionary.offset
    torch.testing.assert_close(sae.decode_delta(codes) + offset, sae.decode(codes))
    torch.testing.assert_close(sae.dictionary.direction_norms(), sae.directions(torch.arange(48)).norm(dim=1))


def test_concept_scores_ignore_the_size_of_activations():
    """Codes depend on the direction of x - b_dec, the reconstruction on its norm too; zero norm gives the offset."""
    sae = sae_of("concepts", "weight")
    offset = sae.dictionary.b_dec.detach()
    x = torch.randn(4, 8, dtype=torch.float64)
    one, ten = sae(offset + x), sae(offset + 10 * x)
    torch.testing.assert_close(one.codes.dense(), ten.codes.dense(), rtol=1e-4, atol=1e-5)
    still = sae(offset.expand(2, 8))
    torch.testing.assert_close(still.recons, offset.expand(2, 8))
    assert bool(still.codes.values.isfinite().all())


def test_starting_points():
    """Unit directions, tied encoders, keys at the concepts; initialise takes the mean of the data."""
    x = torch.randn(50, 8) + 3
    for dictionary in DENSE:
        sae = sh.SAE(8, 48, dictionary, "relu")
        torch.testing.assert_close(sae.dictionary.direction_norms(), torch.ones(48))
        sae.initialise(x)
        torch.testing.assert_close(sae.dictionary.b_dec, x.mean(0))
    linear = sh.SAE(8, 48, "linear", "relu").dictionary
    assert torch.equal(linear.W_enc, linear.W_dec.T)


def test_normalised_codes_do_not_depend_on_the_scale_of_activations():
    """With normalize, activations ten times as large have the same codes and a reconstruction ten times as large."""
    x = torch.randn(60, 8) + 2
    codes, recons = [], []
    for scale in (1.0, 10.0):
        torch.manual_seed(0)
        sae = sh.SAE(8, 40, "linear", "sparsemax", normalize=True)
        sae.initialise(scale * x)
        out = sae(scale * x)
        codes.append(out.codes.dense())
        recons.append(out.recons / scale)
    torch.testing.assert_close(*codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*recons, rtol=1e-4, atol=1e-5)
    centred = (10 * x - sae.dictionary.b_dec).detach() / sae.dictionary.unit
    assert float(centred.norm(dim=1).median()) == pytest.approx(1)


def test_unit_norm_decoder_is_kept():
    """Gradients lose their parallel part and rows return to norm 1; the dictionary says that it adjusts gradients."""
    assert not sh.SAE(8, 20, "linear", "relu").dictionary.adjusts_gradients
    sae = sh.SAE(8, 20, "linear", "relu", unit_norm_decoder=True)
    assert sae.dictionary.adjusts_gradients
    sae(torch.randn(30, 8)).recons.square().sum().backward()
    sae.dictionary.after_backward()
    W = sae.dictionary.W_dec
    assert float((W.grad * W.detach()).sum(1).abs().max()) < 1e-4
    with torch.no_grad():
        W.mul_(3)
    sae.dictionary.after_step()
    torch.testing.assert_close(W.norm(dim=1), torch.ones(20))


# ------------------------------------------------------------------ Kronecker


def kron(m, n, heads, seed=0, shift=0.0):
    """A Kronecker SAE and rows whose factors are often 0."""
    torch.manual_seed(seed)
    sae = sh.SAE(8, heads * m * n, "kron", "topk", k=1, m=m, n=n, dtype=torch.float64)
    x = torch.randn(17, 8, dtype=torch.float64) + shift
    scores, _ = dense_kron(sae, x)
    return sae.dictionary, sae.dictionary.prepare(x), scores.detach()


RULES = [
    TopK(1),
    TopK(5),
    TopK(30),
    TopK(64),
    Sparsemax(),
    Entmax(1.5),
    Threshold(0.0),
    Threshold(0.7),
    Threshold(-0.1),
    Threshold(torch.linspace(0.1, 2, 64, dtype=torch.float64)),
    Threshold(torch.linspace(-0.5, 2, 64, dtype=torch.float64)),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("m", "n", "heads"), [(8, 8, 1), (1, 1, 64), (4, 4, 4), (2, 1, 32), (1, 64, 1)])
def test_kron_selects_as_the_explicit_product(m, n, heads, rule):
    """Every row rule, every shape of heads: the support is that of all products formed and selected from."""
    dictionary, prepared, scores = kron(m, n, heads)
    found, expected = dictionary.select(prepared, rule), select_rows(scores, rule)
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.threshold, expected.threshold)


@pytest.mark.parametrize(("m", "n", "heads"), [(8, 8, 1), (4, 4, 4), (1, 2, 32)])
@pytest.mark.parametrize("k", [1, 6, 30])
def test_kron_batch_rules_match_the_explicit_product(m, n, heads, k):
    """BatchTopK and feature choice over pairs are those over the explicit scores, latents apart or silenced too."""
    dictionary, prepared, scores = kron(m, n, heads)

    def dense(support):
        rows = torch.repeat_interleave(torch.arange(17), support.offsets.diff())
        return torch.zeros(17, 64, dtype=torch.bool).index_put((rows, support.indices), torch.tensor(True))

    floor = scores.flatten().topk(17 * k).values.min()
    assert torch.equal(dense(dictionary.select(prepared, BatchTopK(k))), (scores >= floor) & (scores > 0))
    budgets = torch.arange(64) % 17
    best = scores.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    chosen = dense(dictionary.select(prepared, FeatureChoice(budgets)))
    assert torch.equal(chosen, (best < budgets) & (scores > 0))
    among = torch.arange(0, 64, 3)
    few = select_rows(scores[:, among], TopK(min(k, 20)))
    assert torch.equal(dictionary.select(prepared, TopK(min(k, 20)), among=among).indices, among[few.indices])
    silenced = scores.mean(0) > scores.mean()
    quiet = select_rows(scores.masked_fill(silenced, 0.0), TopK(k))
    assert torch.equal(dictionary.select(prepared, TopK(k), silenced=silenced).indices, quiet.indices)


def test_kron_gives_equal_scores_to_the_first_rows_and_latents():
    """Batch top-k over pairs breaks ties as it does over scores: by row, then by latent."""
    found = select_pairs(torch.ones(3, 1, 4), torch.ones(3, 1, 4), BatchTopK(7))
    assert found.offsets.tolist() == [0, 16, 21, 21]
    assert found.indices.tolist() == [*range(16), *range(5)]


def test_kron_forms_few_products(monkeypatch):
    """Of 4096 pairs a top-16 selection multiplies at most a sixteenth, beside one for each head."""
    from saehooks.kernels.reference import pairs

    sizes = []
    real = pairs.pairs_above
    monkeypatch.setattr(pairs, "pairs_above", lambda *given: sizes.append(real(*given)) or real(*given))
    for m, n in ((4, 4), (64, 64), (16, 16)):
        sae = sh.SAE(32, 4096, "kron", "topk", k=16, m=m, n=n)
        sae.encode(torch.randn(50, 32), step=Step(backend="reference"))
        assert sizes[-1].scores.numel() / 50 < 256


def test_kron_gradient_is_finite_at_zero():
    """The square root's gradient at a vanishing product is large but finite."""
    sae = sh.SAE(4, 4, "kron", "relu", m=2, n=2)
    with torch.no_grad():
        sae.dictionary.P.copy_(torch.eye(4)[:2])
        sae.dictionary.Q.copy_(torch.eye(4)[2:])
    x = torch.tensor([[1e-30, 1.0, 1.0, 1e-30], [0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    out = sae(x)
    out.recons.sum().backward()
    assert out.codes.of(2).tolist() == [1, 0, 0]
    for tensor in (x, *sae.parameters()):
        assert bool(tensor.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("p", "q"), [(1e-4, 1e-4), (300.0, 300.0), (1e-3, 1.0), (2e-7, 100.0)])
def test_kron_in_half_precision_has_the_scores_and_gradients_of_its_numbers(dtype, p, q):
    """Products of two factors that float16 cannot hold (1e-8, 90000) give the scores and gradients of the formula."""
    sae = sh.SAE(3, 16, "kron", "topk", k=4, m=2, n=2, dtype=dtype)
    with torch.no_grad():
        sae.dictionary.P.fill_(p)
        sae.dictionary.Q.fill_(q)
        sae.dictionary.P[2:].zero_()  # of four heads the first scores
        sae.dictionary.W_dec.fill_(0.01)
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    P, Q, there = (one.detach().double().requires_grad_() for one in (sae.dictionary.P[:2], sae.dictionary.Q[:2], x))
    scores = ((there @ P.T)[:, :, None] * (there @ Q.T)[:, None]).sqrt().flatten(1)
    expected = torch.autograd.grad(0.01 * 3 * scores.sum(), (there, P, Q))
    out = sae(x)
    out.recons.float().sum().backward()
    rounding = 4 * torch.finfo(dtype).eps
    assert out.codes.indices.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(out.codes.values.double(), scores[0], rtol=rounding, atol=0)
    found = x.grad, sae.dictionary.P.grad[:2], sae.dictionary.Q.grad[:2]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=rounding, atol=1e-7)


def test_kron_rows_that_are_not_finite_stay_visible():
    """NaN or infinity in an activation: one latent, a value that is not finite, other rows untouched."""
    sae = sh.SAE(8, 64, "kron", "sparsemax", m=4, n=4)
    x = torch.randn(4, 8)
    clean = sae(x).recons
    x[1, 2], x[2, 0] = float("nan"), float("inf")
    out = sae(x)
    assert out.codes.support_size.tolist()[1:3] == [1, 1]
    assert not bool(out.recons[1:3].isfinite().all(1).any())
    torch.testing.assert_close(out.recons[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("settings", [{"m": 3, "n": 4}, {"m": 0}, {"heads": 5}, {"heads": 0}, {"m": 16, "n": 16}])
def test_heads_that_do_not_factor_d_sae_are_refused(settings):
    """The error names the sizes and a d_sae that would do."""
    with pytest.raises(ConfigError, match="factor"):
        sh.SAE(8, 64, "kron", "relu", **settings)


def test_kron_encoder_is_small():
    """h (m + n) d_in parameters instead of d_sae d_in."""
    d = sh.SAE(32, 1024, "kron", "topk", m=4, n=4).dictionary
    assert d.P.numel() + d.Q.numel() == 64 * 8 * 32


def with_massive_rows(n=2000, d=16):
    """Ordinary rows, among them ten of a hundred times their norm along two directions, and those directions."""
    draw = torch.Generator().manual_seed(0)
    x, two = torch.randn(n, d, generator=draw), torch.linalg.qr(torch.randn(d, 2, generator=draw))[0].T
    x[5:45:5] = 400 * two[0] + x[5:45:5]
    x[100:102] = 300 * two[1] + x[100:102]
    return x, two


@pytest.mark.parametrize("dictionary", ["concepts", "linear"])
def test_massive_activations_get_latents_of_their_own(dictionary):
    """The first latents start along the directions of huge rows, one for each; ordinary data set none."""
    x, two = with_massive_rows()
    torch.manual_seed(0)
    sae = sh.SAE(16, 64, dictionary, "topk", k=4)
    before = sae.dictionary.table.detach().clone()
    sae.initialise(x)
    found = sae.dictionary.table.detach()[:2] @ two.T
    assert bool((found.diagonal().abs() > 0.98).all())
    assert torch.equal(sae.dictionary.table[2:], before[2:])
    if dictionary == "linear":
        assert torch.equal(sae.dictionary.W_enc.T[:2], sae.dictionary.W_dec[:2])
    ordinary = sh.SAE(16, 64, dictionary, "topk", k=4)
    before = ordinary.dictionary.table.detach().clone()
    ordinary.initialise(torch.randn(500, 16))
    assert torch.equal(ordinary.dictionary.table, before)


def test_massive_directions_of_degenerate_data():
    """Nothing, zeros and rows that are not finite give no direction; a part of a table takes the rows that are its."""
    from saehooks.dictionaries.base import massive_directions

    assert len(massive_directions(torch.zeros(0, 4))) == 0
    assert len(massive_directions(torch.zeros(8, 4))) == 0
    x, _ = with_massive_rows()
    x[7] = float("inf")
    assert len(massive_directions(x)) == 2
    part = sh.SAE(16, 64).dictionary
    part.first_latent = 1
    assert [row for row, _ in part.rows_from_data(x)] == [0]


@pytest.mark.parametrize("rank", [0, 1])
def test_massive_directions_of_a_split_table(rank):
    """Latents of their own are the first of the whole table, whichever process holds them."""
    from saehooks.ranks import Ranks, shard

    ranks = Ranks.__new__(Ranks)  # a place in a grid; nothing is exchanged here
    ranks.size, ranks.latents, ranks.data, ranks.rank, ranks.latent_rank, ranks.data_rank = 2, 2, 1, rank, rank, 0
    local = shard(sh.SAE(16, 64), ranks).dictionary
    assert [row for row, _ in local.rows_from_data(with_massive_rows()[0])] == ([0, 1] if rank == 0 else [])
