"""Kills, interruptions, full disks, read-only folders: nothing is lost but the steps since the last checkpoint."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import saehooks as sh
from saehooks.errors import StorageError
from saehooks.storage import UNFINISHED

KILLED = Path(__file__).parent / "killed.py"
JOBS = ("train", "harvest", "survey", "save")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ten_signals_at_random_moments_change_nothing(tmp_path, number):
    """Killed or interrupted ten times and called again each time, each job leaves what it leaves undisturbed."""
    command = [sys.executable, str(KILLED), str(tmp_path), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(JOBS)


@pytest.fixture
def mounted(tmp_path):
    """``mounted("size=64k")`` is the folder of a file system of its own, with these options."""
    made = []

    def mount(options):
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small():
    """A model, batches for it, and an SAE."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16)).eval()
    data = [torch.randint(0, 50, (16, 33)) for _ in range(24)]
    return model, data, sh.SAE(d_in=16, d_sae=64, hook_name="0")


def fill(disk):
    """Take what is left of a disk."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            return disk / "filler"


def unfinished(folder):
    return [file.name for file in folder.iterdir() if file.name.endswith(UNFINISHED)]


def same(one, two):
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_saving_on_a_full_disk_keeps_the_sae_that_was_there(mounted):
    """The error says why; what loads is the old SAE, and nothing half-written takes room."""
    disk = mounted("size=256k")
    old = sh.SAE(8, 32)
    old.save(disk / "sae")
    with pytest.raises(StorageError, match=r"cannot write .*sae_weights.*No space left"):
        sh.SAE(64, 4096).save(disk / "sae")
    filler = fill(disk)
    with pytest.raises(StorageError, match="No space left"):
        sh.SAE(8, 32, "linear", "topk", k=4).save(disk / "sae")
    assert same(old, sh.load(disk / "sae"))
    assert unfinished(disk / "sae") == []
    filler.unlink()
    new = sh.SAE(8, 32, "linear", "topk", k=4)
    new.save(disk / "sae")
    assert same(new, sh.load(disk / "sae"))


def test_a_training_on_a_full_disk_goes_on_from_its_last_checkpoint(mounted, small):
    """The disk fills in the middle; with room again the same call ends with the weights of an undisturbed training."""
    model, data, _ = small
    disk, settings = mounted("size=2m"), {"batch_size": 64, "buffer_rows": 512, "progress": False}

    def fresh():
        torch.manual_seed(3)
        return sh.SAE(d_in=16, d_sae=64)

    def filling(batches):
        for number, batch in enumerate(batches):
            if number == 14:
                fill(disk)
            yield batch

    whole = fresh()
    sh.fit(model, whole, data, "0", steps=150, **settings)
    with pytest.raises(StorageError, match=r"could not be saved .*No space left"):
        sh.fit(model, fresh(), filling(data), "0", out=disk / "out", steps=150, checkpoint_every=8, **settings)
    assert unfinished(disk / "out") == []
    (disk / "filler").unlink()
    again = fresh()
    sh.fit(model, again, data, "0", out=disk / "out", steps=150, checkpoint_every=8, resume=True, **settings)
    assert same(whole, again)


def test_a_harvest_and_a_survey_on_a_full_disk_go_on(mounted, small, tmp_path):
    """What was written stays, the error says why, and with room again the same call ends as if undisturbed."""
    model, data, sae = small
    disk = mounted("size=300k")
    with pytest.raises(StorageError, match=r"No space left .*are kept"):
        sh.harvest(model, data, "0", to=disk / "acts", shard_bytes=60_000)
    assert list((disk / "acts").glob("shard-*"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    sh.harvest(model, data, "0", to=disk / "acts", shard_bytes=60_000)
    sh.harvest(model, data, "0", to=tmp_path / "acts", shard_bytes=60_000)
    files = {file.name for file in (tmp_path / "acts").iterdir()}
    assert {file.name for file in (disk / "acts").iterdir()} == files
    assert all((disk / "acts" / name).read_bytes() == (tmp_path / "acts" / name).read_bytes() for name in files)
    filler = fill(disk)
    with pytest.raises(StorageError, match="No space left"):
        sh.survey(model, sae, data, folder=disk / "index", progress=False)
    filler.unlink()
    found = sh.survey(model, sae, data, folder=disk / "index", progress=False)
    assert torch.equal(found.counts, sh.survey(model, sae, data, progress=False).counts)


def test_a_read_only_disk_is_said_before_anything_runs(mounted, small):
    """Training and saving name the folder; what is on the disk can be read, and trained further elsewhere."""
    model, data, sae = small
    disk = mounted("size=1m")
    sae.save(disk / "sae")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    ran = []
    handle = model.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(StorageError, match="Read-only file system"):
        sh.fit(model, sh.SAE(16, 64), data, "0", out=disk / "new", progress=False)
    assert not ran
    handle.remove()
    for folder in (disk / "new", disk / "sae"):
        with pytest.raises(StorageError, match="Read-only file system"):
            sae.save(folder)
    with pytest.raises(StorageError, match="Read-only file system"):
        sh.harvest(model, data, "0", to=disk / "acts")
    assert same(sae, sh.load(disk / "sae"))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that signal here")
def test_an_interrupted_ranking_leaves_the_model_as_it_was(small, hooks_of):
    """Ctrl-C at any moment of a ranking: the model keeps its hooks, and the next ranking gives the same figures."""
    model, data, sae = small

    def effect(output, batch):
        return output.square().mean((1, 2))

    before, whole, some = hooks_of(model), sh.rank_latents(model, sae, data[:6], effect, exact=8), 0
    number, draw = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT)), random.Random(0)
    try:
        for _ in range(10):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.001, 0.05))
                found = sh.rank_latents(model, sae, data[:6], effect, exact=8)
                signal.setitimer(signal.ITIMER_REAL, 0)
                some += not found.complete
            except KeyboardInterrupt:
                some += 1
            assert hooks_of(model) == before
            assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, number)
    assert some
    again = sh.rank_latents(model, sae, data[:6], effect, exact=8)
    assert torch.equal(again.latents, whole.latents)
    assert torch.equal(again.exact.nan_to_num(), whole.exact.nan_to_num())
