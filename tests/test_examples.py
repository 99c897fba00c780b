"""The notebooks in examples/: they run from top to bottom, and are committed with their outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
LARGEST = 1_500_000
"""Bytes of a notebook with its outputs."""

LOADED_ONCE = """
import functools, gc
import saehooks.demo
for name in ("smollm2", "small_clip"):
    load = getattr(saehooks.demo, name)
    setattr(saehooks.demo, name, load if hasattr(load, "cache_info") else functools.cache(load))
gc.collect()
del functools, gc, load, name, saehooks
"""
"""The packaged models are as before when a notebook is done with them, so the next one gets the same."""

nbformat = pytest.importorskip("nbformat")


def test_there_are_notebooks():
    """First steps, steering, live CE degradation, training, CLIP, SAEs of others, latents: each has its notebook."""
    names = "01_first_steps 02_steering 03_live_ce 04_train_your_own 05_clip_concepts 06_published_sae "
    names += "07_find_and_steer 08_your_own_data 09_ten_questions"
    assert set(names.split()) <= {file.stem for file in NOTEBOOKS}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_are_committed(file):
    """A reader sees results without running anything: no error, no path of the machine it ran on, not too large."""
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs
    assert [output for output in outputs if output.output_type == "error"] == []
    text = file.read_text(encoding="utf-8")
    assert "/tmp/" not in text
    assert "site-packages" not in text
    assert len(text) < LARGEST


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One Jupyter kernel for all notebooks, as of a person who opens one after the other: it imports things once."""
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("jupyter_client")
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    manager = client.KernelManager(kernel_name="python3")
    manager.start_kernel(env={**os.environ, **settings}, cwd=str(tmp_path_factory.mktemp("notebooks")))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_run(file, kernel, tmp_path):
    """Every cell runs, on the real small models, without a model hub."""
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(file, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {tmp_path}\n{LOADED_ONCE}"))
    patient = {"timeout": 600, "iopub_timeout": 600}  # a busy machine may take its time to tell what a cell printed
    nbclient.NotebookClient(notebook, km=kernel, **patient).execute()
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(counts[0], counts[0] + len(counts)))
