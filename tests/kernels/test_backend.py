"""Which backend serves a tensor, what each owes, and how threads share its work."""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import platform
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from hard_scores import scores_of

from saehooks import kernels
from saehooks.errors import ConfigError
from saehooks.kernels import Sparsemax, Step, backend_for, select_rows


def test_float32_on_cpu_takes_the_compiled_path_and_float64_the_reference():
    """Device and dtype choose; so an SAE in float64 is served by plain torch."""
    pytest.importorskip("numba")
    if os.environ.get("SAEHOOKS_KERNELS"):
        pytest.skip("a path is forced from outside")
    assert backend_for(torch.zeros(1)).NAME == "cpu"
    assert backend_for(torch.zeros(1, dtype=torch.float64)).NAME == "reference"


def test_a_step_names_its_backend():
    """What a step says holds for what it is passed to, and nothing else; a name that is no backend's is an error."""
    before = backend_for(torch.zeros(1))
    assert backend_for(torch.zeros(1), Step(backend="reference")).NAME == "reference"
    assert backend_for(torch.zeros(1)) is before
    with pytest.raises(ConfigError, match="choose one of reference, cpu, gpu"):
        kernels.select_rows(torch.zeros(2, 3), Sparsemax(), step=Step(backend="fpga"))


@pytest.mark.parametrize("name", kernels.BACKENDS)
def test_every_backend_offers_all_that_is_owed(name):
    """The operations of the Protocol, with its arguments in its order, and under the same file name in each."""
    if name == "gpu":
        pytest.importorskip("triton")
    if name == "cpu":
        pytest.importorskip("numba")
    module = importlib.import_module(f"saehooks.kernels.{name}")
    owed = {key: value for key, value in vars(kernels.Backend).items() if inspect.isfunction(value)}
    owed = {key: value for key, value in owed.items() if not key.startswith("_")}
    assert len(owed) >= 9
    for operation in owed:
        wanted = list(inspect.signature(owed[operation]).parameters)[1:]
        offered = list(inspect.signature(getattr(module, operation)).parameters)
        assert offered[: len(wanted)] == wanted, operation
    assert (module.NAME, type(module.ASYNCHRONOUS)) == (name, bool)
    files = {file.stem for file in Path(module.__file__).parent.glob("*.py")}
    assert files >= {"select", "products"}
    reference = {file.stem for file in Path(kernels.reference.__file__).parent.glob("*.py")}
    assert reference >= {"select", "pairs", "products", "rows", "weights", "across_rows", "adam"}


def test_the_environment_forces_a_path_and_importing_compiles_nothing():
    """SAEHOOKS_KERNELS holds for a process; neither numba nor Triton is imported before it is needed."""
    pytest.importorskip("numba")
    code = (
        "import sys, torch; from saehooks import kernels, SAE; print('numba' in sys.modules, 'triton' in sys.modules);"
        "SAE(d_in=4, d_sae=8)(torch.zeros(1, 4));"
        "print('numba' in sys.modules, kernels.backend_for(torch.zeros(1)).NAME)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "SAEHOOKS_KERNELS": "reference"},
        timeout=200,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["False", "False", "False", "reference"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_selection_works_in_a_forked_process():
    """A child of a process that has used torch's threads, which do not come along, starts its own."""
    pytest.importorskip("numba")
    from saehooks.kernels import cpu
    from saehooks.kernels.cpu import threads

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        scores = scores_of("random", 600, 2000, 1.0)
        expected = cpu.select_rows(scores, Sparsemax()).indices.numpy()
        child = os.fork()
        if child == 0:
            same = (cpu.select_rows(scores, Sparsemax()).indices.numpy() == expected).all()
            os._exit(0 if same and threads._helpers else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_forked_while_memory_is_handed_out_goes_on():
    """The lock that another thread of the parent held is not held in the child, which no thread could open there."""
    from saehooks.kernels import memory

    with memory._lock:
        child = os.fork()
        if child == 0:
            worker = threading.Thread(target=memory.reusable_empty, args=(2048, 1024), daemon=True)
            worker.start()
            worker.join(timeout=30)
            os._exit(int(worker.is_alive()))
    assert os.waitpid(child, 0)[1] == 0


class Rang(Exception):
    """Raised by a signal handler."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that signal here")
@pytest.mark.parametrize("team", ["openmp", "python"])
def test_what_a_signal_raises_during_selection_is_never_swallowed(team, monkeypatch):
    """Each exception of a signal handler reaches the caller, wherever in the shared work it was raised."""
    from saehooks.kernels.cpu import threads

    monkeypatch.setattr(threads, "_forked", team == "python")
    raised, caught, whole, draw = 0, 0, 0, random.Random(0)

    def ring(*_):
        nonlocal raised
        raised += 1
        raise Rang

    before, number = torch.get_num_threads(), signal.signal(signal.SIGALRM, ring)
    torch.set_num_threads(2)
    threads.spread(lambda start, stop: stop, [(0, 1), (1, 2)])  # starts the threads
    gc.collect()
    gc.disable()  # Python loses what a handler raises while the garbage collector calls weak references back
    try:
        for _ in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 4e-4))
                for _ in range(6):
                    done = threads.spread(lambda start, stop: stop, [(i, i + 1) for i in range(40)])
                    whole += done == list(range(1, 41))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Rang:
                caught += 1
        assert threads.spread(lambda start, stop: stop, [(i, i + 1) for i in range(40)]) == list(range(1, 41))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, number)
        torch.set_num_threads(before)
        gc.enable()
    assert caught == raised > 0
    assert whole >= 6 * (150 - raised)


FULL_DISK = """
import resource, signal, torch
from saehooks.kernels.cpu.products import sort_by_latent
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # no file may grow: writing fails
print(*sort_by_latent(torch.tensor([1, 0, 2]), torch.tensor([0, 3]), 3).places.tolist())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits on the size of files")
def test_a_full_disk_under_the_cache_of_compiled_loops_costs_compiling_only(tmp_path):
    """Where numba's cache cannot be written, a loop is compiled and runs."""
    pytest.importorskip("numba")
    done = subprocess.run(
        [sys.executable, "-B", "-c", FULL_DISK],
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "0", "2"]
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size]


@pytest.mark.parametrize("team", ["openmp", "python"])
def test_several_threads_may_select_at_once(team, monkeypatch):
    """Calls from different threads neither share a score buffer nor mix their rows."""
    from saehooks.kernels.cpu import threads as spreading

    monkeypatch.setattr(spreading, "_forked", team == "python")
    made = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(64, 8, generator=made), torch.randn(4000, 8, generator=made)
    inputs = [queries * (1 + i) for i in range(6)]
    expected = [kernels.select(q, keys, Sparsemax()) for q in inputs]
    wrong: list[int] = []

    def work(i):
        for _ in range(3):
            if not torch.equal(kernels.select(inputs[i], keys, Sparsemax()).indices, expected[i].indices):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("team", ["openmp", "python"])
def test_an_error_in_a_thread_reaches_the_caller(team, monkeypatch):
    """Work that fails on any thread fails the call, and the next call works."""
    from saehooks.kernels.cpu import threads

    monkeypatch.setattr(threads, "_forked", team == "python")
    spread = threads.spread

    def fail(start, stop):
        raise ValueError(f"rows {start} to {stop}")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="rows"):
            spread(fail, [(0, 1), (1, 2), (2, 3)])
        assert spread(lambda start, stop: stop, [(0, 1), (1, 2), (2, 3)]) == [1, 2, 3]
    finally:
        torch.set_num_threads(before)


def test_work_is_shared_with_torchs_own_team(monkeypatch):
    """Where torch brings GNU's OpenMP, blocks run on its threads, all of them; work may itself be spread."""
    from saehooks.kernels.cpu import threads

    if threads._openmp() is None:
        pytest.skip("this torch has another OpenMP")
    monkeypatch.setattr(threads, "_forked", False)
    monkeypatch.setattr(threads, "_helpers", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    met = threading.Barrier(2, timeout=20)

    def work(start, stop):
        if start < 2:
            met.wait()
        without_pool = threads._helpers == 0
        return threading.get_ident(), without_pool, threads.spread(lambda a, b: (start, a), [(0, 1), (1, 2)])

    try:
        found = threads.spread(work, [(i, i + 1) for i in range(4)])
    finally:
        torch.set_num_threads(before)
    assert len({thread for thread, _, _ in found}) == 2
    assert found[0][1] or found[1][1], "the first blocks ran before any Python thread was made"
    assert [inner for _, _, inner in found] == [[(i, 0), (i, 1)] for i in range(4)]


def test_large_memory_is_used_again_only_when_nobody_holds_it():
    """What a tensor, a view or its gradient still refers to is left alone; what is free is taken, up to a bound."""
    from saehooks.kernels import memory

    memory.release()
    first = memory.reusable_empty(2048, 1024)
    place = first.data_ptr()
    assert place % memory.ALIGNMENT == 0
    row = first[3]
    del first
    second = memory.reusable_empty(2048, 1000)
    assert second.data_ptr() != place
    del row
    third = memory.reusable_empty(2000, 1024)
    assert third.data_ptr() == place
    assert third._base is None
    assert memory.reusable_empty(4, 4).shape == (4, 4)
    assert sum(held.nbytes for held in memory._pool) <= memory.POOL_BYTES
    del second, third
    memory.release()
    assert not memory._pool


@pytest.mark.parametrize("decided", [False, True], ids=["ours", "the user's"])
def test_what_one_step_frees_serves_the_next(decided):
    """glibc keeps it, so that memory is not touched anew in each step; unless its own variables say otherwise."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    script = """
        import resource, torch
        torch.set_num_threads(1)
        from saehooks.kernels import memory
        print(memory.keep_freed())
        def step():
            made = [torch.ones(1200, 1024) for _ in range(8)]
        for _ in range(5):
            step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            step()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "131072"} if decided else {}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=True
    )
    kept, faults = run.stdout.split()
    assert kept == str(not decided)
    assert (int(faults) > 1000) == decided


def test_gradients_of_tables_outlive_the_memory_they_came_from():
    """A gradient that is kept is not overwritten by the next step."""
    pytest.importorskip("numba")
    made = torch.Generator().manual_seed(0)
    table = torch.randn(4096, 300, generator=made, requires_grad=True)
    queries = torch.randn(20, 300, generator=made)
    kept = []
    for scale in (1.0, 2.0):
        table.grad = None
        support = kernels.select(queries, table, Sparsemax())
        kernels.sddmm(queries * scale, table, support.with_scores(None)).sum().backward()
        kept.append(table.grad)
    assert torch.equal(kept[1], 2 * kept[0])
    assert kept[0].any()


def test_one_row_takes_the_same_path():
    """Generation sends one row at a time."""
    scores = scores_of("trained", 8, 4096, 2.0)
    together = select_rows(scores, Sparsemax())
    alone = [select_rows(scores[i : i + 1], Sparsemax()).indices for i in range(8)]
    assert torch.equal(torch.cat(alone), together.indices)
