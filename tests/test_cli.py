"""The commands, on the small CLIP that is carried in the package."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch

import saehooks as sh
from saehooks import presets
from saehooks.cli import main

pytestmark = pytest.mark.real
SITE = "visual.blocks.4.hook_resid_post"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an SAE that ``saehooks fit`` trained for three steps."""
    pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("saes") / "clip"
    status = main(
        f"fit --model tinyclip --at {SITE} --d-sae 256 --batch-size 512 --steps 3 --sequences 4 --out {folder}".split()
    )
    assert status == 0
    return folder


def test_help_teaches(capsys):
    """Every command says what it is for and shows an example."""
    for command in ([], ["demo"], ["fit"], ["harvest"], ["measure"], ["sites"], ["info"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        text = capsys.readouterr().out
        assert stopped.value.code == 0
        assert re.search(r"example", text)
        assert "saehooks " + " ".join(command) in text


def test_sites_lists_and_finds(capsys):
    """``sites`` prints names with widths, and ``--find`` narrows them."""
    assert main(["sites", "tinyclip", "--find", "visual.blocks.4.hook_resid"]) == 0
    out = capsys.readouterr().out
    assert SITE in out
    assert "128" in out
    assert "text.blocks" not in out


def test_fit_leaves_an_sae_that_knows_its_site(trained, capsys):
    """What ``fit`` writes can be loaded, measured and asked about without naming the site again."""
    sae = sh.load(trained)
    assert (sae.d_in, sae.d_sae, sae.hook_name) == (128, 256, SITE)
    assert main(["info", str(trained)]) == 0
    out = capsys.readouterr().out
    assert SITE in out
    assert "CIFAR-10" in out
    assert main(["info", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["d_sae"] == 256


def test_measure_prints_a_table_or_json(trained, capsys):
    """``measure`` gives cosine and zero-shot accuracy of the packaged photos."""
    assert main(["measure", str(trained), "--model", "tinyclip"]) == 0
    assert "zero-shot accuracy" in capsys.readouterr().out
    assert main(["measure", str(trained), "--model", "tinyclip", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["n_images"] == 200
    assert figures["acc_clean"] > 0.6
    assert figures["acc_zero"] < 0.2


def test_fit_reads_the_users_own_pictures(tmp_path):
    """A folder of pictures, or an array in an .npz file, trains as well."""
    from PIL import Image

    pictures = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=pictures)
    (tmp_path / "own").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "own" / f"{i}.png")
    for name in ("own.npz", "own"):
        common = f"fit --model tinyclip --at {SITE} --d-sae 64 --batch-size 64 --steps 1 --activation topk --k 4"
        assert main(f"{common} --images {tmp_path / name} --out {tmp_path / 'sae'}".split()) == 0
        assert sh.load(tmp_path / "sae").cfg.metadata["data"]["images"] == name


def test_fit_on_a_clip_sees_the_same_rows_by_python_and_by_command(tinyclip, tmp_path):
    """Every position of a picture, the class token too: as a plain hook on the tower counts them."""
    pictures = np.random.default_rng(1).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=pictures)
    common = f"fit --model tinyclip --at {SITE} --d-sae 64 --batch-size 16 --activation topk --k 4"
    assert main(f"{common} --images {tmp_path / 'own.npz'} --out {tmp_path / 'sae'}".split()) == 0
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    seen = []
    handle = tinyclip.visual.transformer.resblocks[0].register_forward_hook(lambda *_: seen.append(_[2].shape))
    with torch.no_grad():
        tinyclip.encode_image(images)
    handle.remove()
    sae = sh.SAE(tinyclip.visual.transformer.width, 64, "linear", "topk", k=4)
    trainer = sh.fit(tinyclip, sae, [images], SITE, batch_size=16, progress=False)
    by_command = sh.load(tmp_path / "sae").cfg.metadata["training"]["rows"]
    assert trainer.rows_seen == by_command == seen[0][0] * seen[0][1]


def test_fit_and_measure_run_a_bfloat16_model_where_they_are_told(trained, tmp_path, capsys):
    """A half-precision model trains and carries a float32 SAE; products are made as precisely as asked."""
    before = torch.get_float32_matmul_precision()
    where = "--device cpu --model-dtype bfloat16 --sequences 4"
    try:
        command = f"fit --model tinyclip --at {SITE} --d-sae 256 --batch-size 512 --steps 2 --precision high {where}"
        assert main(f"{command} --out {tmp_path / 'half'}".split()) == 0
        assert torch.get_float32_matmul_precision() == "high"
        sae = sh.load(tmp_path / "half")
        assert sae.dtype == torch.float32
        assert all(p.isfinite().all() for p in sae.parameters())
        capsys.readouterr()
        assert main(f"measure {trained} --model tinyclip --json {where}".split()) == 0
        figures = json.loads(capsys.readouterr().out)
        assert 0 < figures["cos_spliced"] <= 1
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"fit --model tinyclip --device nowhere --at {SITE} --d-sae 64 --out x", "device 'nowhere'"),
        (f"fit --model tinyclip --at {SITE[:-1]} --d-sae 64 --out x", "did you mean"),
        (f"fit --model tinyclip --at {SITE} --d-sae 64 --out x --set values", "NAME=VALUE"),
        (f"fit --model tinyclip --at {SITE} --d-sae 64 --out x --set nothing=1", "unknown setting"),
        (f"fit --model tinyclip --at {SITE} --d-sae 64 --out x --images nowhere", "no such folder"),
        ("measure nowhere --model tinyclip", "no folder"),
        ("info nowhere", "no folder"),
        ("sites no/such-model-anywhere", "cannot open model"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(command, message, capsys, tmp_path, monkeypatch):
    """No traceback: what was wrong and what to write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(command.split()) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "x" / "cfg.json").exists()


def test_every_setting_of_a_training_has_an_option(capsys):
    """What the dataclasses of the library hold can be said on the command line, with their words as help."""
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for kind, prefix in ((sh.TrainConfig, ""), (sh.LossConfig, "loss-")):
        for name in kind.__dataclass_fields__:
            assert name == "loss" or f"--{prefix}{name.replace('_', '-')} " in text
    assert "--betas X X Decay of Adam's running means (0.9 0.999)" in text


def test_settings_of_the_loss_betas_and_buffer_are_used(tmp_path):
    """They are those that the SAE was trained with, the others being the defaults of its activation."""
    common = (
        f"fit --model tinyclip --at {SITE} --d-sae 64 --batch-size 64 --steps 2 --activation topk --k 4 --sequences 1"
    )
    own = "--betas 0.8 0.99 --buffer-rows 1024 --loss-reconstruction mse --loss-l1 0.5 --log-every 1 --seed 3"
    assert main(f"{common} {own} --out {tmp_path}".split()) == 0
    training = sh.load(tmp_path).cfg.metadata["training"]
    assert training["betas"] == [0.8, 0.99]
    assert (training["buffer_rows"], training["log_every"], training["seed"]) == (1024, 1, 3)
    assert training["loss"]["reconstruction"] == "mse"
    assert training["loss"]["l1"] == 0.5
    assert training["loss"]["aux_k"] == 1 / 32
    assert main(f"{common} --loss-reconstruction nothing --out {tmp_path / 'x'}".split()) == 2
    assert not (tmp_path / "x").exists()


def test_harvest_and_fit_from_disk(tmp_path):
    """What ``harvest`` writes, ``fit --activations`` trains on; the SAE knows its site, and what was read."""
    common = f"harvest --model tinyclip --at {SITE} --sequences 4 --dtype bfloat16 --to {tmp_path / 'acts'}"
    assert main(common.split()) == 0
    assert main(common.split()) == 0
    acts = sh.Activations(tmp_path / "acts")
    assert (acts.rows, acts.d_in, acts.dtype) == (500 * 65, 128, torch.bfloat16)
    fit = f"fit --activations {tmp_path / 'acts'} --d-sae 64 --batch-size 512 --steps 3 --out {tmp_path / 'sae'}"
    assert main(fit.split()) == 0
    sae = sh.load(tmp_path / "sae")
    assert sae.hook_name == SITE
    assert sae.cfg.metadata["data"]["images"] == "saehooks photos (CIFAR-10)"
    assert main(["measure", str(tmp_path / "sae"), "--model", "tinyclip", "--json"]) == 0


GRID = """
[small]
d_sae = 64
[topk]
at = "visual.blocks.2.hook_resid_post"
d_sae = 96
dictionary = "linear"
activation = "topk"
k = 4
training = { lr = 0.001, seed = 3, betas = [0.8, 0.99] }
loss = { l1 = 0.1 }
[twice]
d_sae = 64
preset = "sparsemax"
reselect = 1.5
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML is read by Python 3.11 and later")
def test_several_saes_by_a_file(tmp_path, capsys):
    """Each SAE of the file is the one that flags of its own would have made, bit for bit."""
    (tmp_path / "grid.toml").write_text(GRID)
    common = ["fit", "--model", "tinyclip", "--batch-size", "256", "--steps", "3", "--sequences", "1"]
    assert main([*common, "--at", SITE, "--saes", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "grid")]) == 0
    assert "topk: Trainer(step 3/3" in capsys.readouterr().out
    assert main([*common, "--at", SITE, "--d-sae", "64", "--out", str(tmp_path / "small")]) == 0
    own = "--at visual.blocks.2.hook_resid_post --d-sae 96 --dictionary linear --activation topk --k 4 --lr 0.001"
    more = "--seed 3 --betas 0.8 0.99 --loss-l1 0.1 --out"
    assert main([*common, *own.split(), *more.split(), str(tmp_path / "topk")]) == 0
    named = ["--d-sae", "64", "--preset", "sparsemax", "--set", "reselect=1.5", "--out"]
    assert main([*common, "--at", SITE, *named, str(tmp_path / "twice")]) == 0
    assert sh.load(tmp_path / "twice").cfg.settings == {
        **presets.sparsemax_sae(8, 16).cfg.settings, "reselect": 1.5
    }  # fmt: skip
    for name in ("small", "topk", "twice"):
        one, other = sh.load(tmp_path / "grid" / name), sh.load(tmp_path / name)
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items()), name
        assert one.hook_name == other.hook_name


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML is read by Python 3.11 and later")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a]\nactivation = 'topk'", "[a] does not say how large the SAE is"),
        ("d_sae = 4", "one table for each SAE"),
        ("[a", "cannot be read as TOML"),
        ("[a]\nd_sae = 64\nnothing = 1", "unknown setting nothing"),
        ("[a]\nd_sae = 64\ntraining = { speed = 1 }", "TrainConfig has no speed"),
        ("[a]\nd_sae = 64\npreset = 'tokp'", "no preset 'tokp'; there are relu"),
        ("[a]\nd_sae = 64\npreset = 'topk'\nactivation = 'relu'", "the preset topk has a dictionary and an activation"),
    ],
)
def test_a_file_of_saes_that_cannot_be_used_says_why(tmp_path, capsys, text, said):
    """One line names the table and what to write."""
    (tmp_path / "grid.toml").write_text(text)
    command = f"fit --model tinyclip --at {SITE} --saes {tmp_path / 'grid.toml'} --out {tmp_path / 'x'}"
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fit --d-sae 64 --out x", "give --model NAME, or --activations"),
        (f"fit --model tinyclip --at {SITE} --out x", "how large is the SAE"),
        ("fit --model tinyclip --d-sae 64 --out x", "Write --at SITE"),
        ("fit --activations nowhere --d-sae 64 --out x", "no activations in"),
    ],
)
def test_what_fit_needs_is_said(command, said, capsys, tmp_path, monkeypatch):
    """A model or activations, a site, a size."""
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err
