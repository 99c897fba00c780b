"""Training SAEs through the hooks by which they are used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from saehooks.attachments.foreign import same_model
from saehooks.attachments.request import refuse_unknown
from saehooks.attachments.resolve import find, name_of
from saehooks.errors import ConfigError, NeverFiredError
from saehooks.hosts import Site, host
from saehooks.ranks import Alone, Ranks, shard
from saehooks.sae import SAE
from saehooks.sparse_coder import SparseCoder
from saehooks.streams import Tap, checked_batches, harvest_sites
from saehooks.training.data import Data, ModelData, OwnData, is_activations
from saehooks.training.divergence import DivergenceTraining
from saehooks.training.job import Job, check_trained
from saehooks.training.loop import run_jobs
from saehooks.training.trainer import TrainConfig, Trainer
from saehooks.where import where_of

OBJECTIVES = ("reconstruction", "kl")


@contextmanager
def train(
    model: Any,
    sae: SAE,
    at: str | None = None,
    *,
    head: int | None = None,
    where: Any = None,
    objective: Literal["reconstruction", "kl"] = "reconstruction",
    mix: float = 0.5,
    config: TrainConfig | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Iterator[Trainer]:
    """Train on what ordinary calls of the model bring past a site: ``with sh.train(model, new, at=...) as trainer:``.

    The model's outputs are untouched. On leaving the block normally, the rest of the buffer is trained on.

    With ``objective="kl"`` each call of a language model is one step of fine-tuning: the call runs once more with the
    reconstruction at the site, and the SAE learns to bring the next-token distribution back to the clean one. It
    starts best from a trained SAE, with about a tenth of the learning rate: ``sh.train(model, sae, objective="kl",
    lr=2e-4, steps=...)``. See `saehooks.training.divergence`.

    Args:
        model: any model that saehooks knows.
        sae: trained in place.
        at: the site; the SAE's own if not given.
        head: one head of a per-head site.
        where: which positions; left out, all but the first of each text, or where the SAE was trained before. Never
            padding.
        objective: ``"reconstruction"`` of the activations, or ``"kl"``, the divergence of spliced from clean logits.
        mix: with ``"kl"``, the share of the SAE's own loss; 0 for the divergence alone.
        config: settings; single ones may be given by name instead, such as ``lr=4e-4``.
        on_record: called with each record of the history as it is made: see `Trainer`.
    Raises:
        SiteError, WidthError: on entering, when the site does not exist or does not fit.
        NeverFiredError: on leaving, when no forward passed the site.
        ConfigError: on leaving, when fewer activations came than make one batch.
        NotFiniteError: from the model's call, when an activation or the loss is not finite.
    """
    _refuse_unknown(settings)
    if is_activations(model):
        raise ConfigError("train listens to a model; on activations of your own write sh.fit(activations, sae)")
    source = host(model)
    site = find(source, sae, at, head)
    rule = where_of(sae, where, training=True)
    trainer = Trainer(sae, _config(config, settings), on_record)
    known = {**source.describe(), "hook_name": site.name, "head": site.head}
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective!r}: choose one of {', '.join(map(repr, OBJECTIVES))}")
    if objective == "kl":
        divergence = DivergenceTraining(source, site, trainer, rule, mix)
        with divergence.listening():
            yield trainer
        if not trainer.steps:
            raise NeverFiredError(f"no call of the model passed '{site.name}' inside the block, so nothing was trained")
        divergence.came.check(site.name)
        _remember(trainer, known, repr(rule), objective=objective, mix=mix)
        return

    def receive(rows: Tensor) -> None:
        # Activation checkpointing around the site counts the tensors that are saved: those of the training are not its.
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            if not trainer.finished:
                trainer.push(rows)

    tap = Tap(source, site, receive, rule)
    with tap.attached():
        yield trainer
    if not tap.fired:
        raise NeverFiredError(f"no forward passed '{site.name}' inside the block, so nothing was trained")
    trainer.drain()
    check_trained(trainer)
    _remember(trainer, known, repr(rule))


@overload
def fit(model: Any, sae: SAE, batches: Iterable[Any] | None = None, at: str | None = None, **options: Any) -> Trainer:
    """One SAE."""


@overload
def fit(
    model: Any, sae: Mapping[str, SAE], batches: Iterable[Any] | None = None, at: str | None = None, **options: Any
) -> dict[str, Trainer]:
    """Several."""


def fit(
    model: Any,
    sae: SAE | Mapping[str, SAE],
    batches: Iterable[Any] | None = None,
    at: str | None = None,
    *,
    head: int | None = None,
    where: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    eval_batches: Iterable[Any] | None = None,
    config: TrainConfig | Mapping[str, TrainConfig] | None = None,
    progress: bool | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    latent_ranks: int = 1,
    **settings: Any,
) -> Trainer | dict[str, Trainer]:
    """Train an SAE on the activations of a site, stopping each forward there: ``sh.fit(model, new, batches, at=...)``.

    Args:
        model: any model that saehooks knows; or activations of your own, a tensor (n, d_in) or an iterable of such,
            and no batches then: ``sh.fit(activations, new)``.
        sae: trained in place. Several, by name, are trained from the same forwards, each at ``at`` or at the site it
            knows, and each as it would be alone: ``sh.fit(model, {"small": a, "large": b}, batches)``.
        at, head, where, config, settings: as for `train`. Several SAEs may have a config each, by name.
        batches: token tensors (batch, pos), images, or dicts of arguments. To resume, give the same ones again.
        out: folder for checkpoints while training and the SAE at the end; for several, one folder each inside it. An
            interruption (Ctrl-C, SIGTERM) writes one more, between two steps, before it leaves; a second one leaves at
            once. A new training does not start in a folder that holds the checkpoint of an interrupted one.
        resume: go on from the checkpoint in ``out``, if there is one: bit for bit as if never interrupted (on CPU).
        eval_batches: held-out batches, evaluated every ``eval_every`` steps and at the end.
        progress: show a progress display; by default in a terminal or notebook.
        on_record: called with each record of a history as it is made, of several SAEs with its name as ``"sae"``:
            ``on_record=saehooks.training.watching.tensorboard("logs")``.
        latent_ranks: under ``torchrun``, over how many of the processes the dictionary is split; the others split the
            rows of each batch. All processes make the same call; the first one writes.
    Returns:
        The trainer, with its history; of several SAEs a dict of them. SAEs are trained in place and left in eval mode.
    Raises:
        SiteError, WidthError, ConfigError: before anything runs; ConfigError also when the batches hold too little,
            or are others than those that a resumed training has seen.
        NotFiniteError: an activation or the loss is not finite; the last checkpoint stays.
        StorageError: the folder cannot be written to, or the disk is full; the last checkpoint stays.
        KeyboardInterrupt: interrupted; the message says where the checkpoint is and how to go on.
    """
    ranks = Ranks.joined(latent_ranks)
    saes, configs = ranks.agree(lambda: _asked(sae, config, settings))
    ranks.check_agreement({"SAEs": list(saes)})
    targets = ranks.agree(lambda: {name: _target(model, one, at, head, where) for name, one in saes.items()})
    jobs = {}
    for name, one in saes.items():
        _begin_together(ranks, one, {"config": asdict(configs[name]), "out": str(out), "resume": resume})
        trainer = _trainer(one, configs[name], _named(on_record, name), ranks)
        jobs[name] = Job(trainer, targets[name].key, None if out is None else Path(out, name), resume, one)
    data = ranks.agree(lambda: _data(model, batches, min(one.d_in for one in saes.values()), targets.values(), ranks))
    if eval_batches is not None:
        held_out = ranks.agree(lambda: _held_out(model, eval_batches, targets.values()))
        for job in jobs.values():
            job.held_out = held_out[job.key]
    run_jobs(jobs, data, progress, {name: targets[name].remember for name in jobs})
    trainers = {name: job.trainer for name, job in jobs.items()}
    return trainers[""] if isinstance(sae, SparseCoder) else trainers


def _asked(sae: Any, config: Any, settings: dict[str, Any]) -> tuple[dict[str, SAE], dict[str, TrainConfig]]:
    """The SAEs by name, and how each is to be trained."""
    _refuse_unknown(settings)
    if not isinstance(sae, (SparseCoder, Mapping)):
        raise ConfigError(f"expected an SAE, or several by name, after the model; got {type(sae).__name__}")
    saes: dict[str, Any] = {"": sae} if isinstance(sae, SparseCoder) else dict(sae)
    if not saes:
        raise ConfigError("no SAE to train: give one, or several by name as in {'small': a, 'large': b}")
    return saes, {name: _config(config, settings, name) for name in saes}


def _trainer(sae: SAE, config: TrainConfig, on_record: Any, ranks: Alone) -> Trainer:
    return ranks.agree(lambda: Trainer(shard(sae, ranks), config, on_record, ranks))


def _data(model: Any, batches: Any, d_in: int, targets: Iterable[Target], ranks: Alone) -> Data:
    """What is read: activations as they are, or batches of a model's inputs."""
    if is_activations(model):
        if batches is not None:
            raise ConfigError("fit(activations, sae) trains on them alone: leave out batches=")
        return OwnData(model, d_in, ranks)
    if batches is None:
        raise ConfigError("fit(model, sae, batches) needs batches, the inputs of the model")
    return ModelData(host(model), checked_batches(batches), _sites(targets), ranks)


def _begin_together(ranks: Alone, sae: SAE, facts: dict[str, Any]) -> None:
    """Every rank is asked for the same training, and begins with the weights of the first."""
    ranks.check_agreement({"sae": sae.cfg.to_dict(), "finished": sae.finished, **facts})
    if ranks.size > 1:
        was_finished = sae.finished
        ranks.broadcast(sae.state_dict())
        if not was_finished:
            sae.begin_with_these_weights()


def _named(on_record: Callable[[dict[str, Any]], None] | None, name: str) -> Callable[[dict[str, Any]], None] | None:
    """The same callback, whose records also name the SAE where there are several."""
    if on_record is None or not name:
        return on_record
    return lambda record: on_record({"sae": name, **record})


class Target(NamedTuple):
    """Where the rows of one SAE come from."""

    key: Hashable
    """By which a `Part` holds them."""
    site: Site | None
    where: Any
    remember: Callable[[Trainer], None]


def _target(model: Any, sae: SAE, at: str | None, head: int | None, where: Any) -> Target:
    if is_activations(model):
        if where is not None:
            raise ConfigError("activations have no positions: leave out where=")
        described = getattr(model, "described", {})
        wanted, there = name_of(sae, at, head) if at or sae.hook_name else (None, None), described.get("hook_name")
        if wanted[0] and there and wanted != (there, described.get("head")):
            raise ConfigError(f"the SAE is of site {wanted[0]!r}, the activations are of {there!r}; at= says another")
        ours, theirs = sae.cfg.metadata.get("model_name"), described.get("model_name")
        if not same_model(ours, theirs):
            raise ConfigError(
                f"the SAE is of the model {ours!r}, the activations are of {theirs!r}: harvest those of {ours!r}"
            )
        known = {**described, **({"hook_name": wanted[0], "head": wanted[1]} if wanted[0] else {})}
        positions = getattr(model, "positions", "as given")
        return Target(None, None, None, lambda trainer: _remember(trainer, known, positions))
    source = host(model)
    found = find(source, sae, at, head)
    rule = where_of(sae, where, training=True)
    known = {**source.describe(), "hook_name": found.name, "head": found.head}
    return Target((found.key, repr(rule)), found, rule, lambda trainer: _remember(trainer, known, repr(rule)))


def _sites(targets: Iterable[Target]) -> dict[Hashable, tuple[Site, Any]]:
    """The sites with their rules, each pair once, by the keys of the targets."""
    return {target.key: (target.site, target.where) for target in targets if target.site}


def _held_out(model: Any, batches: Any, targets: Iterable[Target]) -> dict[Hashable, Tensor]:
    """(n, d_in) activations of the evaluation batches, by the keys of the targets."""
    sites = _sites(targets)
    if sites:
        rows = list(harvest_sites(host(model), checked_batches(batches), list(sites.values())))
        parts = {key: [one[i] for one in rows] for i, key in enumerate(sites)}
    else:
        parts = {None: [batches] if isinstance(batches, Tensor) else list(batches)}
    if not all(sum(map(len, found)) for found in parts.values()):
        raise ConfigError("eval_batches= gave no activation: it is empty, or a generator that was used up before")
    return {key: torch.cat(found) for key, found in parts.items()}


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    known = sorted(TrainConfig.__dataclass_fields__)
    refuse_unknown("training", sorted(set(settings) - set(known)), ("at", "head", "where", "out", "config", *known))


def _config(
    config: TrainConfig | Mapping[str, TrainConfig] | None, settings: dict[str, Any], name: str = ""
) -> TrainConfig:
    if isinstance(config, Mapping):
        if name not in config:
            raise ConfigError(f"config= has no entry for the SAE {name!r}; it has {', '.join(map(repr, config))}")
        config = config[name]
    return replace(config or TrainConfig(), **settings)


def _remember(trainer: Trainer, known: Mapping[str, Any], positions: str, **more: Any) -> None:
    """Write into the SAE where it belongs and how it was trained; leave it ready for use."""
    trainer.sae.eval()
    settings = asdict(replace(trainer.config, loss=trainer.loss_config))
    trainer.sae.cfg.metadata.update(
        known, training={**settings, "steps": trainer.steps, "rows": trainer.rows_seen, "positions": positions, **more}
    )
