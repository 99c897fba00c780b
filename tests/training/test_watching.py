"""Records of a training, handed on as they are made."""

import sys
import types

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError
from saehooks.training import watching

SETTINGS = {"batch_size": 16, "buffer_rows": 64, "log_every": 2, "eval_every": 4, "progress": False}


def rows(n=640):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(0))


def fresh():
    torch.manual_seed(0)
    return sh.SAE(8, 32)


def merged(records):
    """Records by step, later columns added to earlier ones."""
    made = {}
    for record in records:
        made.setdefault(record["step"], {}).update(record)
    return list(made.values())


def test_every_record_is_handed_on_as_it_is_made():
    """What arrives is the history, evaluations included; the next record comes after the next steps only."""
    seen = []
    trainer = sh.fit(list(rows().split(80)), fresh(), eval_batches=rows(64), on_record=seen.append, **SETTINGS)
    assert merged(seen) == trainer.history
    assert any("eval_nmse" in record for record in seen)
    with pytest.raises(TypeError, match="on_record"):
        sh.Trainer(fresh(), on_record=3)


def test_records_of_several_saes_carry_their_names():
    """Each record says whose it is."""
    seen = []
    trainers = sh.fit(rows(), {"a": fresh(), "b": fresh()}, on_record=seen.append, **SETTINGS)
    for name, trainer in trainers.items():
        own = [{k: v for k, v in record.items() if k != "sae"} for record in seen if record["sae"] == name]
        assert merged(own) == trainer.history


def test_a_resumed_training_goes_on_with_the_curve(tmp_path):
    """The steps that arrive after a resume follow those before; nothing is handed on twice."""
    before, after, whole = [], [], []
    sh.fit(rows(), fresh(), on_record=whole.append, **SETTINGS)
    sh.fit(rows(), fresh(), steps=10, out=tmp_path, on_record=before.append, decay=0.0, **SETTINGS)
    sh.fit(rows(), fresh(), out=tmp_path, resume=True, on_record=after.append, decay=0.0, **SETTINGS)
    assert [record["step"] for record in before + after] == [record["step"] for record in whole]


def test_tensorboard_holds_every_figure(tmp_path):
    """A reader of TensorBoard's own finds the history in the folder, and a resumed training goes on in it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs, out = tmp_path / "logs", tmp_path / "sae"
    sh.fit(rows(), fresh(), steps=10, out=out, on_record=watching.tensorboard(logs), **SETTINGS)
    trainer = sh.fit(rows(), fresh(), out=out, resume=True, on_record=watching.tensorboard(logs), **SETTINGS)
    found = EventAccumulator(str(logs))
    found.Reload()
    for name in ("loss", "nmse", "l0", "lr"):
        curve = [(event.step, event.value) for event in found.Scalars(name)]
        right = [(record["step"], record[name]) for record in trainer.history]
        assert [step for step, _ in curve] == [step for step, _ in right]
        assert [value for _, value in curve] == pytest.approx([value for _, value in right])


def test_wandb_offline_gets_every_record(tmp_path, monkeypatch):
    """A run of Weights & Biases without a network holds the last figures."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    import wandb

    trainer = sh.fit(rows(), fresh(), on_record=watching.wandb(project="saehooks", dir=str(tmp_path)), **SETTINGS)
    wandb.run.log({"end": 1.0}, step=trainer.steps + 1)  # what comes last is held back until something follows it
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["nmse"] == pytest.approx(trainer.history[-1]["nmse"])
    assert summary["_step"] == trainer.steps
    assert list(tmp_path.rglob("run-*.wandb"))


def test_trackio_holds_every_figure(tmp_path, monkeypatch):
    """What trackio stored is the history, and a resumed training goes on in the same run."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    out, asked = tmp_path / "sae", {"project": "saehooks", "name": "one", "resume": "allow"}
    asked |= {"auto_log_gpu": False, "auto_log_cpu": False}
    sh.fit(rows(), fresh(), steps=10, out=out, on_record=watching.trackio(**asked), **SETTINGS)
    trackio.finish()
    trainer = sh.fit(rows(), fresh(), out=out, resume=True, on_record=watching.trackio(**asked), **SETTINGS)
    trackio.finish()
    logs = SQLiteStorage.get_logs("saehooks", "one")
    for name in ("loss", "nmse", "l0", "lr"):
        curve = {log["step"]: log[name] for log in logs if name in log}
        assert curve == pytest.approx({record["step"]: record[name] for record in trainer.history})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_begins_with_the_first_record_and_what_is_missing_is_said_at_once(name, monkeypatch):
    """Of several processes only the one that gets records makes a run."""
    made = types.ModuleType(name)
    made.init = lambda **settings: made.runs.append(settings) or made
    made.log = lambda figures, step: made.logged.append((step, figures))
    made.runs, made.logged = [], []
    monkeypatch.setitem(sys.modules, name, made)
    on_record = getattr(watching, name)(project="p")
    assert made.runs == []
    on_record({"step": 3, "loss": 1, "sae": "a"})
    on_record({"step": 4, "loss": 2})
    assert made.runs == [{"project": "p"}]
    assert made.logged == [(3, {"a/loss": 1.0}), (4, {"loss": 2.0})]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        getattr(watching, name)(project="p")
