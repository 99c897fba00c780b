"""Folders of config and weights: corrupt ones are refused by name, and a crash at any moment leaves a readable one."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

import saehooks as sh
from saehooks import storage
from saehooks.errors import FormatError
from saehooks.storage import CONFIG, WEIGHTS, read_folder, write_folder


@pytest.fixture
def folder(tmp_path):
    """A folder holding one small SAE."""
    torch.manual_seed(0)
    sh.SAE(8, 40).save(tmp_path / "sae")
    return tmp_path / "sae"


def test_other_files_stay(folder):
    """Saving replaces its own two files and nothing else; nothing temporary is left."""
    (folder / "notes.txt").write_text("mine")
    sh.SAE(8, 16).save(folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted([CONFIG, WEIGHTS, "notes.txt"])
    assert (folder / "notes.txt").read_text() == "mine"
    assert sh.load(folder).d_sae == 16


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_damaged_files_are_refused_by_name(folder, name, damage):
    """A file missing, empty, cut off or altered: a FormatError that names a file, never a half-loaded SAE."""
    file = folder / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        changed = {"empty": b"", "cut": data[: len(data) // 2], "flipped": data[:-20] + b"\x00\xff" * 10}
        file.write_bytes(changed[damage])
    with pytest.raises(FormatError, match=name.split(".")[0]):
        sh.load(folder)


def test_a_pickle_is_never_opened(folder, tmp_path):
    """A pickle in place of safetensors is refused unread: its code does not run."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for write in (lambda path: path.write_bytes(pickle.dumps(Bomb())), lambda path: torch.save({"a": Bomb()}, path)):
        write(folder / WEIGHTS)
        with pytest.raises(FormatError, match="pickle"):
            sh.load(folder)
        assert not (tmp_path / "ran").exists()


def test_a_folder_that_is_not_one(tmp_path, folder):
    """No folder, a file, a config of something else: each says what was expected."""
    for source in (tmp_path / "nowhere", tmp_path, folder / CONFIG):
        with pytest.raises(FormatError):
            sh.load(source)
    (folder / CONFIG).write_text('["a", "list"]')
    with pytest.raises(FormatError, match="list"):
        sh.load(folder)
    (folder / CONFIG).write_text(json.dumps({"d_in": 8, "format": "another"}))
    with pytest.raises(FormatError, match="not saved by saehooks"):
        sh.load(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="it is a file"):
        sh.SAE(8, 16).save(tmp_path / "file")


def test_weights_of_another_width_are_refused(folder, tmp_path):
    """Weights of one SAE beside the config of another."""
    sh.SAE(9, 40).save(tmp_path / "other")
    config = json.loads((tmp_path / "other" / CONFIG).read_text())
    config.pop("weights_checksum")
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(FormatError, match="shape"):
        sh.load(folder)


@pytest.mark.parametrize("moment", range(4))
def test_a_crash_between_two_writes_leaves_an_sae(folder, monkeypatch, moment):
    """Cut off before or after either file is replaced: what loads is the old SAE or the new, whole."""
    calls = []
    real = storage.os.replace

    class Crash(BaseException):
        pass

    def replace(source, target):
        if len(calls) == moment // 2 and moment % 2 == 0:
            raise Crash
        real(source, target)
        if len(calls) == moment // 2:
            raise Crash
        calls.append(target)

    monkeypatch.setattr(storage.os, "replace", replace)
    torch.manual_seed(1)
    new, old = sh.SAE(8, 24, "linear", "topk", k=4), sh.load(folder)
    with pytest.raises(Crash):
        new.save(folder)
    monkeypatch.undo()
    found = sh.load(folder)
    expected = old if moment == 0 else new
    assert found.cfg.to_dict() == expected.cfg.to_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


def test_tensors_and_config_come_back(tmp_path):
    """What was written is read, dtype for dtype."""
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.randn(3).bfloat16(), "c": torch.randn(4, 2).T}
    write_folder(tmp_path, {"x": [1, 2]}, tensors)
    config, found = read_folder(tmp_path)
    assert config == {"x": [1, 2]}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
