"""The bfloat16 screen of the CPU backend: what it selects is what float32 products select, and its bound holds."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from forced import forced
from hard_scores import sparsemax_by_sorting, weights

from saehooks import SAE, kernels
from saehooks.errors import InexactError
from saehooks.kernels import BatchTopK, Entmax, Sparsemax, Step, Threshold, TopK
from saehooks.kernels.step import ScreenTables

pytest.importorskip("numba")
from saehooks.kernels.cpu import screen

nan, inf = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _cpu():
    with forced("cpu"):
        yield


@pytest.fixture
def both(monkeypatch):
    """Selects through the screen and without it."""

    def run(*given, **settings):
        found = []
        for mode in ("on", "off"):
            monkeypatch.setattr(screen, "MODE", mode)
            found.append(kernels.select(*given, **settings))
        return found

    return run


def vectors(kind: str, n: int, d: int, seed: int) -> torch.Tensor:
    """(n, d) float32 rows of a kind."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=made)
    if kind == "sparse":
        x = x * (torch.rand(n, d, generator=made) < 0.1)
    elif kind == "heavy":
        x = x.pow(5)
    elif kind == "aligned":  # all entries round the same way, and their errors add up
        x = torch.full((n, d), 1 + 2**-9 * 0.99) + 2**-12 * x
    elif kind == "alike":  # scores of a row differ by little more than rounding
        x = torch.ones(n, d) + 1e-3 * x
    elif kind == "wide":
        x = x * torch.logspace(-6, 2, d)
    elif kind == "rounded":
        x = x.bfloat16().float()
    return x


KINDS = ("normal", "sparse", "heavy", "aligned", "alike", "wide", "rounded")
RULES = {
    "sparsemax": Sparsemax(), "entmax": Entmax(1.5), "entmax 1.1": Entmax(1.1), "top 1": TopK(1), "top 30": TopK(30),
    "above": Threshold(0.7), "below zero": Threshold(-0.1), "batch": BatchTopK(12),
}  # fmt: skip


def agree(found, exact, queries, keys, bias=None):
    """The same support but for scores that are the threshold's to their last bits; values to their last bits."""
    screen._compare(found, exact, queries, keys, bias)
    assert abs(found.indices.numel() - exact.indices.numel()) <= 0.002 * exact.indices.numel() + 1
    finite = exact.threshold.isfinite()
    torch.testing.assert_close(found.threshold[finite], exact.threshold[finite], rtol=1e-4, atol=1e-5)
    assert (found.indices.diff()[found.rows.diff() == 0] > 0).all(), "ascending inside a row"
    if found.scores is None:
        return
    score = (queries.double() @ keys.double().T) + (0 if bias is None else bias.double())
    own = score[found.rows, found.indices]
    good = own.isfinite()
    scale = queries.double().norm(dim=1)[found.rows] * keys.double().norm(dim=1)[found.indices] + own.abs()
    assert ((found.scores.double() - own).abs()[good] <= 2 * keys.shape[1] * 2**-24 * scale[good] + 1e-30).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_screen_selects_what_float32_products_select(both, rule, kind):
    """All rules, with and without a bias, at scales from all rows alike to one latent a row."""
    for seed, (rows, d_sae, d) in enumerate([(70, 2100, 40), (9, 700, 1), (33, 1000, 130)]):
        keys = vectors(kind, d_sae, d, seed)
        keys = keys / keys.norm(dim=1, keepdim=True).clamp(min=1e-9)
        bias = torch.randn(d_sae, generator=torch.Generator().manual_seed(seed))
        for scale in (1e-3, 1.0, 6.0, 1e3):
            queries = scale * vectors(kind, rows, d, seed + 9) / d**0.5
            for given in (None, bias):
                agree(*both(queries, keys, rule, given), queries, keys, given)


def test_supports_are_those_of_float64(monkeypatch):
    """Sparsemax through the screen against sorting in float64, which knows nothing of either."""
    monkeypatch.setattr(screen, "MODE", "on")
    queries, keys = 4 * vectors("normal", 60, 64, 0) / 8, vectors("normal", 3000, 64, 1)
    support = kernels.select(queries, keys, Sparsemax())
    scores = queries.double() @ keys.double().T
    assert (weights(scores, support) - sparsemax_by_sorting(scores)).abs().sum(1).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_no_score_is_off_by_more_than_the_bound(kind):
    """The error of every screened score, over its row's bound, is at most 1, at any width and scale."""
    worst = 0.0
    for seed, (d, scale) in enumerate([(1, 1.0), (3, 1e-6), (64, 1e6), (577, 1.0), (2048, 1e3), (16384, 1.0)]):
        queries, keys = scale * vectors(kind, 20, d, seed), vectors(kind, 300, d, seed + 50)
        bias = None if seed % 2 else scale * torch.randn(300, generator=torch.Generator().manual_seed(seed))
        rounded = screen.rounded_keys(keys, bias)
        made = screen.rounded_queries(queries)
        errors = screen.rounding_errors(made, rounded)
        found = (made.table @ rounded.table.T).double()
        exact = queries.double() @ keys.double().T + (0 if bias is None else bias.double())
        bound = torch.from_numpy(errors)[:, None].double() + screen.ROUNDING * found.abs()
        worst = max(worst, float(((found - exact).abs() / bound).max()))
    assert worst <= 1.0
    assert worst > 0.01, "the bound is no mere fiction"


@pytest.mark.parametrize("expected", [-1e30, -3.0, 0.05, 0.3, 1.0, 7.0, 1e30])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_whatever_threshold_is_expected_the_selection_is_the_same(both, rule, expected, monkeypatch):
    """Rows are shifted by what is expected of them: far too much, too little or nothing of it changes no support."""
    monkeypatch.setattr(screen.Rounded, "expected", (rule, expected))
    monkeypatch.setattr(screen._Job, "expect", lambda job, thresholds: None)
    plain = screen._Job.shift_all
    monkeypatch.setattr(screen._Job, "shift_all", lambda job, by: plain(job, expected))
    keys, bias = vectors("normal", 1500, 48, 1), torch.randn(1500, generator=torch.Generator().manual_seed(0))
    for rows, scale in ((3, 1.0), (300, 0.2), (300, 5.0)):
        queries = scale * vectors("heavy", rows, 48, rows) / 48**0.5
        for given in (None, bias):
            agree(*both(queries, keys, rule, given), queries, keys, given)


def test_no_shifted_score_is_off_by_more_than_the_bound():
    """The bound holds for scores from which a shift was subtracted before they were rounded."""
    for seed, (d, scale, by) in enumerate([(3, 1.0, 2.0), (64, 1e3, 5e3), (577, 1.0, 1e9), (30, 1e-3, -1e-4)]):
        queries, keys = scale * vectors("normal", 20, d, seed), vectors("normal", 300, d, seed + 50)
        rounded = screen.rounded_keys(keys, None)
        made, shifts = screen.rounded_queries(queries), torch.zeros(20)
        errors = screen.rounding_errors(made, rounded)
        given = rounded, made.table, made.norms[0].astype(float), errors, shifts.numpy()
        job = screen._Job(queries, keys, TopK(1), TopK(1), None, *given)
        job.shift_all(by)
        assert abs(float(shifts[0]) / by - 1) < 2**-7
        found = (job.half @ rounded.table.T).double()
        exact = queries.double() @ keys.double().T - shifts[:, None].double()
        bound = torch.from_numpy(job.errors)[:, None].double() + screen.ROUNDING * found.abs()
        assert ((found - exact).abs() <= bound).all()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rows_that_cannot_be_screened_are_selected_exactly(both, rule):
    """NaN, infinities, zeros, ties, tiny and huge rows, among rows that can be."""
    queries, keys = vectors("normal", 40, 32, 0), vectors("normal", 1500, 32, 1)
    queries[3, 2], queries[5, 1], queries[7, 0] = nan, inf, -inf
    queries[9], queries[11], queries[13] = 0.0, 1e-30, 1e30
    keys[100:200] = keys[100]
    keys[300:400] = 0.0
    found, exact = both(queries, keys, rule)
    assert torch.equal(found.offsets, exact.offsets)
    assert torch.equal(found.indices, exact.indices)
    torch.testing.assert_close(found.threshold, exact.threshold, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [nan, inf, 1e30])
def test_a_table_that_cannot_be_screened_is_selected_from_exactly(both, value):
    """One key that is not finite, or so large that products may overflow, keeps the whole table from the screen."""
    queries, keys = vectors("normal", 20, 16, 0), vectors("normal", 1200, 16, 1)
    keys[77, 3] = value
    for rule in (Sparsemax(), TopK(5), BatchTopK(5)):
        found, exact = both(queries, keys, rule)
        assert torch.equal(found.indices, exact.indices)
        assert torch.equal(found.offsets, exact.offsets)


@pytest.mark.parametrize("rule", [Sparsemax(), Entmax(1.5), Threshold(-1.0), BatchTopK(500)])
def test_supports_as_large_as_the_dictionary_overflow_no_list(both, rule):
    """Rows of which everything may be selected are selected from as a whole."""
    queries, keys = 1e-4 * vectors("normal", 30, 16, 0), vectors("normal", 1200, 16, 1)
    agree(*both(queries, keys, rule), queries, keys)


def test_every_latent_may_have_a_threshold_and_a_bias_of_its_own(both):
    """Both enter the screen as columns; infinite thresholds never let a latent through."""
    made = torch.Generator().manual_seed(0)
    queries, keys = vectors("normal", 50, 24, 0), vectors("normal", 1100, 24, 1)
    theta = 5 * torch.rand(1100, generator=made) + 3
    theta[::7], bias = inf, 10 * torch.randn(1100, generator=made)
    for given in (None, bias):
        found, exact = both(queries, keys, Threshold(theta), given)
        agree(found, exact, queries, keys, given)
        assert not (found.indices % 7 == 0).any()
        scores = queries @ keys.T + (0 if given is None else given)
        sure = (scores - theta).abs() > 1e-4
        dense = torch.zeros_like(scores, dtype=torch.bool).index_put((found.rows, found.indices), torch.tensor(True))
        assert torch.equal(dense & sure, (scores > theta) & sure)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_rows_come_in_chunks_and_threads(both, threads, monkeypatch):
    """Chunks, the first of which says whether rows can be screened, and threads change nothing."""
    queries, keys = vectors("normal", 1200, 16, 0), vectors("normal", 1100, 16, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        monkeypatch.setattr(screen, "CPU_SCORE_BYTES", 300 * 2 * 1100)
        for rule in (Sparsemax(), TopK(9), BatchTopK(9)):
            agree(*both(queries, keys, rule), queries, keys)
            agree(*both(1e-4 * queries, keys, rule), 1e-4 * queries, keys)
    finally:
        torch.set_num_threads(before)


def test_candidates_of_many_rows_are_scored_in_batches(both):
    """More candidates than are scored together, and more selected entries than there is room for at first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        queries, keys = vectors("normal", 3000, 24, 0), vectors("normal", 4096, 24, 1)
        keys = keys / keys.norm(dim=1, keepdim=True)
        for rule, scale in ((TopK(200), 1.0), (Sparsemax(), 0.023)):
            found, exact = both(scale * queries, keys, rule)
            assert 128 * len(queries) < found.indices.numel() > screen.BATCH_ENTRIES
            agree(found, exact, scale * queries, keys)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "rounding"), [(40, "rounded_keys"), (2, "int8_keys")])
@pytest.mark.parametrize("dictionary", ["concepts", "linear"])
def test_a_copy_of_a_table_is_never_stale(dictionary, rows, rounding, monkeypatch):
    """An SAE in use keeps its copy; what was changed in place, loaded or moved is copied again."""
    torch.manual_seed(0)
    sae, x = SAE(24, 1100, dictionary, "topk", k=8).eval(), torch.randn(rows, 24)
    calls, plain = [], getattr(screen, rounding)
    monkeypatch.setattr(screen, rounding, lambda *given: calls.append(1) or plain(*given))

    def encode(mode):
        monkeypatch.setattr(screen, "MODE", mode)
        with torch.no_grad():
            return sae.encode(x)

    def check(copies):
        before = len(calls)
        found = encode("on")
        assert len(calls) - before == copies
        assert torch.equal(found.indices, encode("off").indices)

    check(1)
    check(0)
    table = next(p for p in sae.dictionary.parameters() if p.numel() == 24 * 1100 and p is not getattr(sae, "W_dec", 0))
    with torch.no_grad():
        for p in sae.dictionary.parameters():
            p.mul_(-1)
    check(1)
    sae.load_state_dict({name: t.flip(0) if t.shape == table.shape else t for name, t in sae.state_dict().items()})
    check(1)
    check(0)
    for p in sae.dictionary.parameters():  # none of these is counted by torch
        p.data.mul_(-1)
    check(1)
    for p in sae.dictionary.parameters():
        p.detach().numpy()[:] *= -1
    check(1)
    check(0)
    assert sae.frozen().dictionary._screen_tables is sae.dictionary._screen_tables
    assert sae.dictionary._screen_tables.nbytes >= (2 if rows == 40 else 1) * table.numel()
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert other.dictionary._screen_tables.nbytes == 0


def test_a_table_in_the_place_of_another_is_not_taken_for_it():
    """The copy holds its table, so that memory is not used again while it would be recognised by its place."""
    tables = ScreenTables()
    queries = torch.randn(20, 16)
    for seed in range(6):
        keys = vectors("normal", 1100, 16, seed)
        screen_mode, screen.MODE = screen.MODE, "check"
        try:
            kernels.select(queries, keys, TopK(5), step=Step(screen_tables=tables))
        finally:
            screen.MODE = screen_mode
        del keys


def test_training_through_the_screen_gives_the_losses_of_exact_products(monkeypatch):
    """The same steps, screened and not: losses differ by rounding alone."""
    from saehooks import TrainConfig, Trainer

    ends = []
    for mode in ("on", "off"):
        monkeypatch.setattr(screen, "MODE", mode)
        torch.manual_seed(0)
        sae = SAE(24, 1100, "linear", "topk", k=8)
        trainer = Trainer(sae, TrainConfig(batch_size=64, buffer_rows=128, warmup_steps=0))
        made = torch.Generator().manual_seed(1)
        ends.append([float(trainer.step(torch.randn(64, 24, generator=made)).total.detach()) for _ in range(8)])
    torch.testing.assert_close(torch.tensor(ends[0]), torch.tensor(ends[1]), rtol=1e-4, atol=0)


def test_checking_stops_at_a_difference(monkeypatch):
    """Under SAEHOOKS_SCREEN=check a screen that loses a latent is an error that names it."""
    queries, keys = vectors("normal", 20, 16, 0), vectors("normal", 1100, 16, 1)
    monkeypatch.setattr(screen, "MODE", "check")
    kernels.select(queries, keys, TopK(5))
    plain = screen.rounding_errors
    monkeypatch.setattr(screen, "rounding_errors", lambda *given: plain(*given) * 0 - 0.5)
    with pytest.raises(InexactError, match=r"differ in row \d+, latent \d+, score .* SAEHOOKS_SCREEN=off"):
        kernels.select(queries, keys, TopK(5))


def test_a_machine_without_bfloat16_products_multiplies_in_float32(monkeypatch):
    """The measurement decides, once for a shape, and small shapes are not measured at all."""
    monkeypatch.setattr(screen, "MODE", None)
    monkeypatch.setattr(screen, "_screened", lambda *given: pytest.fail("it was screened"))
    queries, keys = vectors("normal", 600, 16, 0), vectors("normal", 1100, 16, 1)
    for times in ((1.0, 0.9), (1.0, 3.0)):
        screen.has_bfloat16_products.cache_clear()
        monkeypatch.setattr(screen, "_product_times", lambda *shape, times=times: times)
        kernels.select(queries, keys, TopK(5))
    monkeypatch.setattr(screen, "_product_times", lambda *shape: pytest.fail("it was measured"))
    kernels.select(queries[:1], keys, TopK(5))
    screen.has_bfloat16_products.cache_clear()


def test_the_environment_says_whether_to_screen():
    """SAEHOOKS_SCREEN forces it; a word that is none of its is an error."""
    code = (
        "import torch; from saehooks import kernels; from saehooks.kernels.cpu import screen\n"
        "q, k = torch.randn(9, 8), torch.randn(100, 8)\n"
        "plain = screen._screened; screen._screened = lambda *a: print('screened') or plain(*a)\n"
        "try: print(len(kernels.select(q, k, kernels.TopK(2)).indices))\n"
        "except screen.ConfigError as error: print(error)"
    )
    said = {}
    for mode in ("check", "perhaps"):
        env = {**os.environ, "SAEHOOKS_SCREEN": mode, "SAEHOOKS_KERNELS": "cpu"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
        said[mode] = done.stdout.split("\n")[0] + done.stderr
    assert said["check"] == "screened"
    assert "choose one of on, off, check" in said["perhaps"]


def test_keys_made_under_inference_mode_are_copied_each_time(monkeypatch):
    """They do not say whether they were changed: nothing is kept, and what was written over is not stale."""
    monkeypatch.setattr(screen, "MODE", "on")
    tables, queries = ScreenTables(), vectors("normal", 20, 16, 0)
    with torch.inference_mode():
        keys = vectors("normal", 1100, 16, 1)
        first = kernels.select(queries, keys, TopK(5), step=Step(screen_tables=tables))
        keys.neg_()
        second = kernels.select(queries, keys, TopK(5), step=Step(screen_tables=tables))
    assert tables.nbytes == 0
    assert not torch.equal(first.indices, second.indices)
    agree(second, kernels.select(queries, keys.clone(), TopK(5)), queries, keys)


def test_a_large_table_is_not_laid_out_twice(monkeypatch):
    """Few rows are read from the copy as it is where a second one would take much memory; the answer is the same."""
    monkeypatch.setattr(screen, "MODE", "on")
    queries, keys = vectors("normal", 4, 16, 0), vectors("normal", 1100, 16, 1)
    found = []
    for limit in (screen.LARGE_TABLE, 0):
        monkeypatch.setattr(screen, "LARGE_TABLE", limit)
        tables = ScreenTables()
        found.append(kernels.select(queries, keys, TopK(5), step=Step(screen_tables=tables)))
        assert tables.nbytes < 2.5 * 1100 * 64 * 2
    assert torch.equal(found[0].indices, found[1].indices)


class TestFewRows:
    """Up to `MOST_ROWS` rows of an SAE in use go through int8."""

    @pytest.fixture
    def few(self, monkeypatch):
        """Selects through the screen, which must have decided, and without it."""

        def run(queries, keys, rule, bias=None, decided=True):
            monkeypatch.setattr(screen, "MODE", "on")
            calls, plain = [], screen.select_few
            monkeypatch.setattr(screen, "select_few", lambda *given: calls.append(plain(*given)) or calls[-1])
            found = kernels.select(queries, keys, rule, bias, step=Step(screen_tables=ScreenTables()))
            monkeypatch.setattr(screen, "select_few", plain)
            assert len(calls) == 1
            assert decided is None or (calls[0] is not None) == decided
            monkeypatch.setattr(screen, "MODE", "off")
            return found, kernels.select(queries, keys, rule, bias)

        return run

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rule", [r for r in RULES.values() if not isinstance(r, BatchTopK)], ids=str)
    def test_they_select_what_float32_products_select(self, few, rule, kind):
        """All row rules, with and without a bias, from all latents alike to one latent a row."""
        for seed, (rows, d_sae, d) in enumerate([(1, 2100, 40), (4, 700, 1), (3, 1000, 130), (2, 300, 577)]):
            keys = vectors(kind, d_sae, d, seed)
            keys = keys / keys.norm(dim=1, keepdim=True).clamp(min=1e-9)
            bias = torch.randn(d_sae, generator=torch.Generator().manual_seed(seed))
            for scale in (1e-3, 1.0, 6.0, 1e3):
                queries = scale * vectors(kind, rows, d, seed + 9) / d**0.5
                for given in (None, bias):
                    agree(*few(queries, keys, rule, given, decided=None), queries, keys, given)

    def test_thresholds_of_each_latent(self, few):
        """Each latent is compared with its own threshold; infinite ones let nothing through."""
        queries, keys = vectors("normal", 3, 40, 0), vectors("normal", 1500, 40, 1)
        theta = torch.rand(1500, generator=torch.Generator().manual_seed(2)) * 12 + 8
        theta[::9] = inf
        found, exact = few(queries, keys, Threshold(theta))
        assert torch.equal(found.indices, exact.indices)
        assert not (found.indices % 9 == 0).any()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("d", "scale"), [(1, 1.0), (64, 1e6), (577, 1e-5), (16384, 1.0)])
    def test_scores_lie_where_they_are_said_to(self, kind, d, scale):
        """The ends of each score's interval hold its float64 value and what float32 makes of it."""
        from saehooks.kernels.cpu import few_rows

        count = few_rows.PART + 200
        queries, keys = scale * (vectors(kind, 3, d, 0) + 1e-3), vectors(kind, count, d, 1)  # none is zero
        bias = scale * torch.randn(count, generator=torch.Generator().manual_seed(2))
        table = few_rows.int8_keys(keys)
        rounded, bounds = np.empty((3, table.table.shape[1]), np.int16), np.empty((3, 4), np.float32)
        assert few_rows._round_queries(queries.numpy(), rounded, bounds)
        for given in (None, bias):
            low, high = np.empty((3, count), np.float32), np.empty((3, count), np.float32)
            added = np.zeros(0, np.float32) if given is None else given.numpy()
            for part in ((0, 100), (100, count)):
                few_rows._interval_range(rounded, bounds, table.table, table.numbers, added, *part, low, high)
            low, high = (torch.from_numpy(end).double() for end in (low, high))
            for dtype in (torch.float64, torch.float32):
                scores = (queries.to(dtype) @ keys.to(dtype).T + (0 if given is None else given.to(dtype))).double()
                assert ((low <= scores) & (scores <= high)).all()
            norms = queries.double().norm(dim=1)[:, None] * keys.double().norm(dim=1)
            wide = norms + 1e-5 * (scores.abs() + scale) + 1e-15
            assert ((high - low) < wide).all(), "the interval is no mere fiction"

    def test_two_threads_select_what_one_does(self, few):
        """Alone a thread does all in one loop; two share the table out. Bounds and scores are the same to the bit."""
        queries, keys = vectors("normal", 3, 300, 0) / 17, vectors("normal", 20000, 300, 1)
        before, found = torch.get_num_threads(), {}
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found[threads], _ = few(queries, keys, Sparsemax())
        finally:
            torch.set_num_threads(before)
        for part in ("indices", "offsets", "threshold", "scores"):
            assert torch.equal(getattr(found[1], part), getattr(found[2], part))

    def test_rows_and_tables_that_cannot_be_screened_are_selected_exactly(self, few):
        """NaN, infinities, zeros, and values so large or small that products leave the numbers' range."""
        clean, keys = vectors("normal", 2, 32, 0), vectors("normal", 1500, 32, 1)
        for value in (nan, inf, 1e30, 0.0, 1e-30):
            queries = clean.clone()
            queries[1] = value
            for rule in (Sparsemax(), TopK(7), Threshold(0.5)):
                found, exact = few(queries, keys, rule, decided=False)
                assert torch.equal(found.indices, exact.indices)
                assert torch.equal(found.offsets, exact.offsets)
        for value in (nan, inf, 1e30, 1e-30):
            broken = keys.clone()
            broken[77] = value
            found, exact = few(clean, broken, TopK(7), decided=None if value == 1e-30 else False)
            assert torch.equal(found.indices, exact.indices)
        bias = torch.zeros(1500)
        bias[5] = -inf
        found, exact = few(clean, keys, Sparsemax(), bias, decided=None)
        assert torch.equal(found.indices, exact.indices)

    def test_many_candidates_are_selected_exactly(self, few):
        """Ties of a whole row leave too much open; ties of a few latents do not."""
        queries, keys = vectors("normal", 2, 32, 0), vectors("normal", 1500, 32, 1)
        keys[100:130] = keys[100]
        agree(*few(queries, keys, TopK(20)), queries, keys)
        agree(*few(1e-4 * queries, keys, Sparsemax(), decided=False), 1e-4 * queries, keys)

    def test_the_plain_loop_sums_what_the_instruction_sums(self, monkeypatch):
        """Where the processor lacks the instruction, the same whole numbers come of a loop; the largest sums fit."""
        from llvmlite import binding

        from saehooks.kernels.cpu import few_rows

        monkeypatch.setattr(binding, "get_host_cpu_features", dict)
        plain = few_rows._whole_dot()
        for d, steps in ((64, 32767), (16384, 1031)):
            query = np.full(d, steps, np.int16)
            for row in (np.full(d, 127, np.int8), np.full(d, -127, np.int8), np.arange(d).astype(np.int8)):
                exact = int(query.astype(np.int64) @ row.astype(np.int64))
                assert int(plain(query, row)) == int(few_rows.whole_dot(query, row)) == exact
