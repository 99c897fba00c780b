"""Every kernel test runs on every path that this machine can run."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from forced import forced

from saehooks import kernels

RUNS = {"reference": True, "cpu": find_spec("numba") is not None, "gpu": torch.cuda.is_available()}
HERE = [name for name in kernels.BACKENDS if RUNS[name]]

if not RUNS["gpu"] and find_spec("triton") is not None:
    from interpreted import patch_language_once

    patch_language_once()


@pytest.fixture(params=HERE)
def path(request):
    """The name of a forced path; tensors of the test belong on `device`."""
    with forced(request.param):
        yield request.param


@pytest.fixture
def device(path):
    """Where the tensors of a test on this path live."""
    return torch.device("cuda" if path == "gpu" else "cpu")
