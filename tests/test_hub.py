"""SAEs from and to a hub: against a stand-in for its HTTP interface, through huggingface_hub itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import saehooks as sh
from saehooks import hub
from saehooks.errors import FormatError

pytest.importorskip("huggingface_hub")
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "recipes"))
import formats_samples
import hub_stand_in

SAMPLES = {sample.name: sample for sample in formats_samples.samples()}


@pytest.fixture
def stand_in():
    with hub_stand_in.running() as found:
        yield found


def run(address, cache, lines):
    """Lines of a user, in an interpreter whose hub is the stand-in; what they print."""
    import os

    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def put(files, folder, prefix):
    """A folder's files in a repository."""
    for path in folder.rglob("*"):
        if path.is_file():
            files[prefix + path.relative_to(folder).as_posix()] = path.read_bytes()


def test_an_sae_goes_up_with_a_card_and_comes_back(stand_in, tmp_path):
    """push_to_hub into a subfolder, then load by repository: the same SAE; the card says how to load it."""
    stand, address = stand_in
    said = run(
        address,
        tmp_path,
        "import saehooks as sh, torch\n"
        "sae = sh.SAE(8, 24, 'linear', 'topk', k=3, hook_name='blocks.1.hook_resid_post')\n"
        "sae.cfg.metadata |= {'model_name': 'user/model', 'metrics': {'held_out': {'nmse': 0.12345}}}\n"
        "print(sae.push_to_hub('user/mine', subfolder='layer_1', token='t').rsplit('/', 1)[0].endswith('commit'))\n"
        "back = sh.load('user/mine', subfolder='layer_1')\n"
        "print(all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), back.state_dict().values())))\n"
        "print(sh.load('user/mine/layer_1').hook_name)\n",
    )
    assert said.splitlines() == ["True", "True", "blocks.1.hook_resid_post"]
    card = stand.repositories["user/mine"]["layer_1/README.md"].decode()
    for words in ("sh.load('user/mine', subfolder='layer_1')", "0.1235", "library_name: saehooks", "topk"):
        assert words in card


def test_only_the_files_that_are_needed_are_fetched(stand_in, tmp_path):
    """Of a repository of many SAEs and other files, one SAE's two files; a second load asks for none."""
    stand, address = stand_in
    files = stand.repositories.setdefault("org/many", {})
    for layer in (3, 4):
        put(files, SAMPLES["sparsify"].write(tmp_path / str(layer)), f"layers.{layer}/")
    files |= {"layers.3/optimizer.pt": b"x" * 10, "layers.3/notes.md": b"y", "pytorch_model.bin": b"z"}
    lines = "import saehooks as sh; print(sh.load('org/many', 'layers.3').hook_name)"
    assert run(address, tmp_path / "cache", lines) == "blocks.3.hook_resid_post"
    assert sorted(stand.fetched) == ["layers.3/cfg.json", "layers.3/sae.safetensors"]
    stand.fetched.clear()
    run(address, tmp_path / "cache", lines)
    assert stand.fetched == []


TABLE = """
other-release:
  repo_id: org/other
  model: gpt2
  saes:
  - id: a
    path: a
tiny-res-jb:
  conversion_func: null
  model: gpt2-small
  repo_id: org/tiny
  config_overrides:
    normalize_activations: expected_average_only_in
  saes:
  - id: blocks.1.hook_resid_pre
    neuronpedia: null
    norm_scaling_factor: 2.0
    path: layer_1
  - id: blocks.2.hook_resid_pre
    path: ../outside
tiny-temporal:
  conversion_func: temporal
  repo_id: org/temporal
  saes:
  - id: a
    path: a
"""


def test_a_release_is_found_in_a_copy_of_the_table(stand_in, tmp_path):
    """By release and SAE; the scale that only the table knows is folded in."""
    stand, address = stand_in
    put(
        stand.repositories.setdefault("org/tiny", {}), SAMPLES["saelens April 2024"].write(tmp_path / "one"), "layer_1/"
    )
    (tmp_path / "table.yaml").write_text(TABLE)
    said = run(
        address,
        tmp_path,
        "import saehooks as sh, torch\n"
        f"sae = sh.load('tiny-res-jb', 'blocks.1.hook_resid_pre', table={str(tmp_path / 'table.yaml')!r})\n"
        f"torch.save([sae.dictionary.W_enc.detach(), sae.dictionary.b_dec.detach()], {str(tmp_path / 'w.pt')!r})\n"
        "print(sae.hook_name)\n",
    )
    import torch
    from formats_parts import W

    assert said == "blocks.1.hook_resid_pre"
    W_enc, b_dec = torch.load(tmp_path / "w.pt")
    torch.testing.assert_close(W_enc, W["W_enc"] * 2)
    torch.testing.assert_close(b_dec, W["b_dec"] / 2)


@pytest.mark.parametrize(
    ("release", "sae_id", "words"),
    [
        ("tiny-res-jb", "blocks.9.hook_resid_pre", "blocks.1.hook_resid_pre"),
        ("tiny-res-jb", None, "which SAE is not said"),
        ("tiny-res-jb", "blocks.2.hook_resid_pre", "leads out"),
        ("tiny-res-jc", "blocks.1.hook_resid_pre", "did you mean 'tiny-res-jb'"),
        ("tiny-temporal", "a", "temporal"),
    ],
)
def test_what_a_table_has_not_is_said(release, sae_id, words, tmp_path):
    """A wrong SAE, a wrong release, a path that leaves its repository, a kind that is no SAE."""
    (tmp_path / "table.yaml").write_text(TABLE)
    with pytest.raises(FormatError, match=words):
        sh.load(release, sae_id, table=tmp_path / "table.yaml")


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    """Offline: how to get the files another way."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FormatError, match="--local-dir"):
        sh.load("user/name")


@pytest.mark.parametrize("name", ["user/name/../x", "user/name//x", "user", "user/na\\me/..", "../x/y"])
def test_an_id_stays_in_its_repository(name):
    """Ids that lead elsewhere, or are none, are refused before anything is asked."""
    with pytest.raises(FormatError):
        sh.load(name)


def test_a_card_is_made_of_what_is_known():
    """Model, site, sizes, training and metrics; nothing where nothing is known."""
    config = sh.SAE(8, 24, "linear", "topk", k=3).cfg.to_dict()
    bare = hub.model_card(config, "user/mine")
    assert "24 of width 8" in bare
    assert "## Metrics" not in bare
    config["metadata"] = {"hook_name": "blocks.1.hook_mlp_out", "training": {"rows": 100, "lr": 1e-3}}
    assert "| rows | 100 |" in hub.model_card(json.loads(json.dumps(config)), "user/mine")
