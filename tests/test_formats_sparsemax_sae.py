"""The authors' checkpoints: read exactly, and without running anything in them."""

from __future__ import annotations

import gzip
import os
import pickle
import sys
import types

import pytest
import torch

from saehooks.errors import FormatError
from saehooks.formats import sparsemax_sae


class Runs:
    """A pickle of this writes a file when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def theirs():
    """A state dict with the authors' names, unused weights included, and their forward pass in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    state = {"concept": random(50, 12), "k": random(12, 12) / 3, "v": random(12, 12) / 3}
    unused = {"W_enc": random(12, 50), "b_enc": random(50), "W_dec": random(50, 12), "b_dec": random(12)}

    def forward(x):
        concept, k, v = (state[name].double() for name in ("concept", "k", "v"))
        norm = x.norm(dim=-1, keepdim=True)
        score = (x / norm) @ (concept @ k).T
        ordered = score.sort(descending=True, dim=-1).values
        ranks = torch.arange(1, 51, dtype=torch.float64)
        bound = 1 + ranks * ordered > ordered.cumsum(-1)
        size = (ranks * bound).max(-1, keepdim=True).values
        tau = ((ordered * bound).sum(-1, keepdim=True) - 1) / size
        acts = score * (score - tau > 0)
        return acts, acts @ (concept @ v) * norm

    return {**state, **unused, "log_threshold": torch.tensor(0.0)}, forward


@pytest.fixture
def config_class():
    """Their config class, in a module that is gone again when the file is read."""
    module = types.ModuleType("src_of_the_authors")

    class ViTSAERunnerConfig:
        pass

    ViTSAERunnerConfig.__module__, ViTSAERunnerConfig.__qualname__ = module.__name__, "ViTSAERunnerConfig"
    module.ViTSAERunnerConfig = ViTSAERunnerConfig
    sys.modules[module.__name__] = module
    yield ViTSAERunnerConfig
    sys.modules.pop(module.__name__, None)


def write(path, content):
    """As their ``save_model`` does."""
    if path.suffix == ".pt":
        torch.save(content, path)
    else:
        data = pickle.dumps(content)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("name", ["sae.pt", "sae.pkl", "sae.pkl.gz"])
def test_codes_and_reconstructions_are_the_authors(name, theirs, config_class, tmp_path):
    """Every file type they write; a config object whose class cannot be imported; exact in float64."""
    state, forward = theirs
    cfg = config_class()
    cfg.d_in, cfg.block_layer, cfg.module_name = 12, 10, "resid"
    cfg.model_name, cfg.dtype, cfg.device = "openai/clip-vit-base-patch16", torch.float32, torch.device("cpu")
    write(tmp_path / name, {"cfg": cfg, "state_dict": state})
    sys.modules.pop("src_of_the_authors")
    sae = sparsemax_sae.load(tmp_path / name, dtype=torch.float64)
    x = torch.randn(7, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    acts, recons = forward(x)
    out = sae(x)
    torch.testing.assert_close(out.codes.dense(), acts)
    torch.testing.assert_close(out.recons, recons)
    assert bool((acts < 0).any()) == bool((out.codes.values < 0).any())
    assert sae.hook_name == "visual.blocks.10.hook_resid_post"
    assert sae.cfg.metadata["source"]["cfg"]["block_layer"] == 10
    assert not sae.training


def test_it_saves_as_a_folder(theirs, tmp_path):
    """A read checkpoint is an SAE like any other."""
    import saehooks as sh

    write(tmp_path / "sae.pt", {"cfg": {"d_in": 12}, "state_dict": theirs[0]})
    sae = sparsemax_sae.load(tmp_path / "sae.pt", hook_name="blocks.8.hook_resid_pre")
    sae.save(tmp_path / "mine")
    x = torch.randn(3, 12)
    assert torch.equal(sh.load(tmp_path / "mine")(x).recons, sae(x).recons)


@pytest.mark.parametrize("name", ["sae.pt", "sae.pkl", "sae.pkl.gz"])
def test_nothing_in_the_file_runs(name, theirs, tmp_path):
    """Code hidden in the config, or anywhere, stays inert."""
    target = tmp_path / "ran"
    write(tmp_path / name, {"cfg": Runs(target), "state_dict": theirs[0], "more": [Runs(target)]})
    sparsemax_sae.load(tmp_path / name)
    assert not target.exists()
    write(tmp_path / name, Runs(target))
    with pytest.raises(FormatError):
        sparsemax_sae.load(tmp_path / name)
    assert not target.exists()


def test_other_files_are_refused(theirs, tmp_path):
    """Missing, truncated, of another make, or with tensors that do not fit: each by name."""
    file = tmp_path / "sae.pt"
    with pytest.raises(FormatError, match="no file"):
        sparsemax_sae.load(file)
    write(file, {"cfg": {}, "state_dict": {"W_enc": torch.ones(2, 2)}})
    with pytest.raises(FormatError, match="no concept"):
        sparsemax_sae.load(file)
    write(file, {**theirs[0]})
    with pytest.raises(FormatError, match="state_dict"):
        sparsemax_sae.load(file)
    write(file, {"cfg": {}, "state_dict": {**theirs[0], "k": torch.ones(11, 11)}})
    with pytest.raises(FormatError, match=r"\(11, 11\)"):
        sparsemax_sae.load(file)
    write(file, {"cfg": {}, "state_dict": theirs[0]})
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(FormatError, match="readable"):
        sparsemax_sae.load(file)
