"""A file of every format: read as its library computes, by formulas that know nothing of saehooks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import saehooks as sh
from saehooks.sae import Transcoder

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
import formats_samples

SAMPLES = {sample.name: sample for sample in formats_samples.samples()}


def rows(n=50):
    return 1.5 * torch.randn(n, formats_samples.D_IN, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", SAMPLES)
def test_codes_and_reconstruction_are_the_librarys(name, tmp_path):
    """Codes and reconstruction to 1e-5 of their size; a transcoder is one, and never an SAE; it saves as ours."""
    sample, x = SAMPLES[name], rows()
    sae = sh.load(sample.write(tmp_path))
    codes, recons = sample.formula(x)
    with torch.no_grad():
        out = sae(x)
    assert float((out.recons - recons).abs().max() / recons.abs().max()) < 1e-5
    if codes is not None:
        assert float((out.codes.dense() - codes).abs().max() / codes.abs().max()) < 1e-5
    assert isinstance(sae, Transcoder if sample.transcoder else sh.SAE)
    assert isinstance(sae, sh.SAE) != sample.transcoder
    assert not sae.training
    assert sae.finished
    sae.save(tmp_path / "ours")
    again = sh.load(tmp_path / "ours")
    assert type(again) is type(sae)
    with torch.no_grad():
        assert torch.equal(again(x).recons, out.recons)


SITES = {
    "saelens April 2024": "blocks.1.hook_resid_pre",
    "sparsify": "blocks.5.hook_resid_post",
    "dictionary_learning topk": "blocks.4.hook_resid_post",
    "gemma scope": "blocks.3.hook_resid_post",
    "gemma scope 2": "blocks.5.hook_resid_post",
    "llama scope": "blocks.8.hook_resid_post",
    "openai topk": "blocks.8.hook_resid_post",
    "goodfire": "blocks.19.hook_resid_post",
    "qwen scope": "blocks.2.hook_resid_post",
    "patchsae": "visual.blocks.10.hook_resid_post",
    "prisma": "visual.blocks.9.hook_mlp_out",
}


@pytest.mark.parametrize("name", SITES)
def test_the_site_is_told_where_the_file_or_its_path_says_it(name, tmp_path):
    """By TransformerLens' name, or ours in a CLIP."""
    assert sh.load(SAMPLES[name].write(tmp_path)).hook_name == SITES[name]


TWO_SITES = {
    "saelens transcoder": ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"),
    "sparsify transcoder": ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out"),
    "gemma scope transcoder": ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"),
    "gemma scope 2 transcoder": ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out"),
    "llama scope transcoder": ("blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out"),
    "circuit-tracer": ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"),
}


@pytest.mark.parametrize("name", TWO_SITES)
def test_a_transcoder_knows_both_its_sites(name, tmp_path):
    """Where it reads, and where it writes."""
    sae = sh.load(SAMPLES[name].write(tmp_path))
    assert (sae.hook_name, sae.hook_name_out) == TWO_SITES[name]
