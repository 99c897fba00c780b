"""One pass over the data that finds out what every latent stands for."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saehooks.attachments import attach
from saehooks.attachments.request import refuse_others
from saehooks.attachments.resolve import find, written_by
from saehooks.codes import Codes
from saehooks.errors import ConfigError, FormatError, NeverFiredError
from saehooks.hosts import Host, Site
from saehooks.hosts import host as host_of
from saehooks.hosts.unembedding import unembedding
from saehooks.latents.cofiring import CoFiring, Neighbours, nearest
from saehooks.latents.folder import read_tensors, remove_partial, write_partial
from saehooks.latents.index import LatentIndex
from saehooks.latents.pictures import Pictures, grid_of, images_of
from saehooks.latents.shelf import Shelf, best_of_each, lottery
from saehooks.latents.tallies import Tallies
from saehooks.precision import widened
from saehooks.sae import SAE, Transcoder
from saehooks.show.progress import Bar, bar
from saehooks.streams import checked_batches
from saehooks.trace import Forward
from saehooks.training.signals import Interruptions
from saehooks.where import where_of

SAVE_EVERY = 300.0
"""Seconds between two checkpoints."""

LOGITS_AT_ONCE = 2**24


def survey(
    model: Any,
    sae: SAE,
    batches: Iterable[Any],
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    at: str | tuple[str, str] | None = None,
    head: int | None = None,
    where: Any = None,
    tokenizer: Any = None,
    labels: Sequence[str] | None = None,
    contexts: int = 12,
    sampled: int = 12,
    window: tuple[int, int] = (16, 8),
    logits: int = 10,
    neighbours: int = 10,
    progress: bool | None = None,
    **unknown: Any,
) -> LatentIndex:
    """``index = sh.survey(model, sae, batches)``: what every latent stands for, and how strong it usually is.

    One streaming pass; each forward stops at the site. Memory does not grow with the data: about
    ``d_sae * (contexts + sampled) * sum(window) * 8`` bytes.

    Args:
        model: any model that saehooks knows.
        sae: an SAE; ``at`` and ``head`` say where, if it does not know. A transcoder reads one site and writes another:
            ``at=(read, written)``.
        batches: token tensors (batch, pos), images, dicts of arguments, or lists of texts for a model with a tokenizer.
        folder: where the index is saved, and checkpoints on the way.
        resume: go on with an interrupted survey in ``folder``: give the same batches again.
        where: positions to look at; left out, where the SAE was trained.
        tokenizer: to write tokens as text; by default the model's own.
        labels: for images, a word or two for each, in order: what `LatentIndex.search` looks in.
        contexts: the strongest places kept of each latent, each of another sequence or image.
        sampled: places kept that are drawn at random from all where it fires, for its whole range of values.
        window: tokens kept before and after each place.
        logits: tokens kept that its direction raises, and lowers; 0 for none.
        neighbours: latents kept that fire with it, and that point the same way; 0 for none.
        progress: show a progress bar; by default only in a terminal.
    Returns:
        A `LatentIndex`. Ctrl-C ends the pass early: the index is of what was read, and says so in ``complete``.
    Raises:
        ConfigError: a text instead of batches, no batch, or batches that are not those of the survey to resume.
        FormatError: the folder holds another survey, or one that was interrupted, without ``resume=True``.
        NeverFiredError: a forward ended without passing the site.

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.ReLU())
    >>> sae = SAE(d_in=8, d_sae=32, hook_name="0")
    >>> index = survey(model, sae, torch.randint(0, 50, (2, 4, 16)))
    >>> index.sequences, len(index)
    (8, 32)
    """
    refuse_others(survey, unknown)
    if min(contexts, sampled, logits, neighbours, *window) < 0 or contexts < 1:
        raise ConfigError("contexts must be at least 1; sampled, window, logits and neighbours at least 0")
    host = host_of(model)
    read_at, written_at = at if isinstance(at, tuple) else (at, None)
    site = last = find(host, sae, read_at, head)
    if isinstance(sae, Transcoder):
        last = written_by(host, sae, written_at)
    options = {"at": site.name if last is site else (site.name, last.name), "head": site.head}
    options |= {} if where is None else {"where": where}
    settings = {"contexts": contexts, "sampled": sampled, "window": list(window), "site": site.name}
    settings["fingerprint"] = sae.fingerprint()
    walk = Walk(host, (site, last), sae, options, settings)
    if folder is not None:
        _check_folder(Path(folder), resume)
        if resume:
            walk.resume(Path(folder))
    with bar(progress) as shown, Interruptions() as interruptions:
        complete = _walk(walk, checked_batches(batches), shown, interruptions, folder)
    index = _index(walk, tokenizer or host.tokenizer, labels, logits, neighbours, complete)
    if folder is not None:
        index.save(folder)
        if complete:
            remove_partial(Path(folder))
    return index


class Walk:
    """The running pass: everything counted and kept so far."""

    def __init__(
        self, host: Host, sites: tuple[Site, Site], sae: SAE, options: dict[str, Any], settings: dict[str, Any]
    ) -> None:
        self.host, (self.site, self.last), self.sae = host, sites, sae
        self.options, self.settings = options, settings
        self.tallies = Tallies(sae.d_sae, sae.device)
        self.cofiring = CoFiring(sae.d_sae, sae.device)
        self.best: Shelf | None = None
        self.drawn: Shelf | None = None
        self.before = 0
        """Columns of a window before its place; 0 for images, whose window is the image."""
        visual = getattr(host.model, "visual", None)
        self.pictures = Pictures(getattr(visual, "image_mean", None), getattr(visual, "image_std", None))
        self.reads_tokens: bool | None = None
        self.sequences = self.positions = self.batches = 0
        self.first_batch = ""

    # ------------------------------------------------------------ one batch

    def forward(self, batch: Any) -> list[Forward]:
        """Run a batch up to the site."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            traces = stack.enter_context(attach(self.host.model, self.sae, keep_all=True, **self.options))
            stack.enter_context(self.host.stop_at(self.last))
            self.host.run(self.host.to_device(batch))
        if not traces.calls:
            raise NeverFiredError(f"the forward passed without reaching '{self.site.name}'")
        return traces.forwards

    def add(self, batch: Any, forwards: list[Forward]) -> None:
        """Count what a batch showed."""
        for forward in forwards:
            self._add(batch, forward)
        self.batches += 1
        if not self.reads_tokens and len(self.pictures.kept) > 4096:
            self._drop_pictures()

    @torch.no_grad()
    def _add(self, batch: Any, forward: Forward) -> None:
        codes, mask = forward.codes, forward.mask
        n, pos = codes.shape
        best, drawn = self._shelves(forward)
        rows, latents, values = codes.rows, codes.indices, codes.values
        acted = torch.ones(n * pos, dtype=torch.bool, device=rows.device) if mask is None else mask.reshape(-1)
        acted = acted.to(rows.device)
        inside = acted[rows]
        rows, latents, values = rows[inside], latents[inside], values[inside].float()
        self.tallies.add(latents, values)
        self.cofiring.add(rows, latents, n * pos, seed=self.sequences)
        real = forward._record.columns.real
        tokens = forward.tokens if real is None or forward.tokens is None else forward.tokens.masked_fill(~real, -1)
        view = _Batch(codes, tokens, acted, self.sae.d_sae)
        sequence, column = rows // pos + self.sequences, rows % pos
        seen: set[int] = set()
        draws = lottery(latents, sequence, column)
        for shelf, scores in ((best, widened(values)), (drawn, draws)):
            wanted = shelf.wants(latents, scores).nonzero()[:, 0]
            if not len(wanted) or not shelf.size:
                continue
            chosen = wanted[best_of_each(latents[wanted] * n + rows[wanted] // pos, scores[wanted])]

            def window(taken: Tensor, chosen: Tensor = chosen, shelf: Shelf = shelf) -> tuple[Tensor, Tensor]:
                which = chosen[taken]
                seen.update((rows[which] // pos).tolist() if not self.reads_tokens else ())
                start = torch.zeros_like(which) if not self.reads_tokens else column[which] - self.before
                return view.around(latents[which], rows[which] // pos, start, shelf.width)

            shelf.offer(latents[chosen], scores[chosen], values[chosen], sequence[chosen], column[chosen], window)
        if seen and (images := images_of(batch)) is not None and len(images) == n:
            numbers = sorted(seen)
            self.pictures.add([self.sequences + i for i in numbers], images[numbers])
        self.sequences, self.positions = self.sequences + n, self.positions + int(acted.sum())

    def _shelves(self, forward: Forward) -> tuple[Shelf, Shelf]:
        """The two shelves, made at the first forward, which tells texts from images."""
        tokens, pos = forward.tokens is not None, forward.codes.shape[1]
        if self.best is None or self.drawn is None:
            self._make_shelves(tokens, pos)
        if self.reads_tokens != tokens or (not tokens and self.best.width != pos):  # type: ignore[union-attr]
            raise ConfigError("all batches of a survey must be texts, or all images of one size")
        return self.best, self.drawn  # type: ignore[return-value]

    def _make_shelves(self, tokens: bool, pos: int) -> None:
        before, after = self.settings["window"]
        self.reads_tokens, self.before = tokens, before if tokens else 0
        width = before + 1 + after if tokens else pos
        self.best, self.drawn = (
            Shelf(self.sae.d_sae, self.settings[name], width, self.sae.device) for name in ("contexts", "sampled")
        )
        self.settings |= {"reads_tokens": tokens, "width": width}

    def _drop_pictures(self) -> None:
        shown = torch.cat([self.best.sequences.reshape(-1), self.drawn.sequences.reshape(-1)])  # type: ignore[union-attr]
        self.pictures.drop_all_but(set(shown.unique().tolist()))

    # ---------------------------------------------------------- checkpoints

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        tensors = {f"tallies.{name}": tensor for name, tensor in self.tallies.state().items()}
        tensors["cofiring"] = self.cofiring.table
        for name, shelf in (("best", self.best), ("drawn", self.drawn)):
            tensors |= {f"{name}.{part}": tensor for part, tensor in shelf.state().items()} if shelf else {}
        tensors |= {f"picture.{number}": image for number, image in self.pictures.kept.items()}
        names = ("sequences", "positions", "batches", "first_batch")
        write_partial(folder, {"settings": self.settings, **{name: getattr(self, name) for name in names}}, tensors)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            FormatError: there is none.
            ConfigError: it is of another SAE, or of other settings.
        """
        found, tensors = read_tensors(folder, partial=True)
        known = {name: found["settings"].get(name) for name in self.settings}
        if known != self.settings:
            name = next(name for name in known if known[name] != self.settings[name])
            raise ConfigError(
                f"the survey in {folder} was begun with {name}={known[name]!r}, not {self.settings[name]!r}: "
                "give the same SAE and settings, or another folder"
            )
        self._make_shelves(found["settings"]["reads_tokens"], found["settings"]["width"])
        self.tallies.restore(_part(tensors, "tallies."))
        self.cofiring.table = tensors["cofiring"].to(self.sae.device)
        self.best.restore(_part(tensors, "best."))  # type: ignore[union-attr]
        self.drawn.restore(_part(tensors, "drawn."))  # type: ignore[union-attr]
        self.pictures.kept = {int(number): image for number, image in _part(tensors, "picture.").items()}
        for name in ("sequences", "positions", "batches", "first_batch"):
            setattr(self, name, found[name])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class _Batch:
    """The codes of one forward, looked up around places."""

    def __init__(self, codes: Codes, tokens: Tensor | None, acted: Tensor, d_sae: int) -> None:
        self.pos, self.d_sae = codes.shape[1], d_sae
        self.keys = codes.rows * d_sae + codes.indices  # ascending: rows are in order, and latents inside a row
        self.values, self.acted = codes.values.float(), acted
        self.tokens = None if tokens is None else tokens.to(codes.indices.device).int()

    def around(self, latents: Tensor, sequences: Tensor, starts: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Tokens and values (n, width) of latents (n,), from a column of a sequence on."""
        columns = starts[:, None] + torch.arange(width, device=starts.device)
        outside = (columns < 0) | (columns >= self.pos)
        columns = columns.clamp(0, self.pos - 1)
        rows = sequences[:, None] * self.pos + columns
        wanted = rows * self.d_sae + latents[:, None]
        if len(self.keys):
            place = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
            values = torch.where(self.keys[place] == wanted, self.values[place], 0.0)
        else:
            values = torch.zeros(wanted.shape, device=wanted.device)
        values = values.masked_fill(outside | ~self.acted[rows], float("nan"))
        if self.tokens is None:
            return torch.full_like(rows, -1, dtype=torch.int32), values
        return self.tokens.reshape(-1)[rows].masked_fill(outside, -1), values


def _walk(
    walk: Walk, batches: Iterable[Any], shown: Bar, interruptions: Interruptions, folder: str | Path | None
) -> bool:
    """Read all batches; False when an interrupt ended it early, with a checkpoint written."""
    shown.start("survey", len(batches) if hasattr(batches, "__len__") else None)  # type: ignore[arg-type]
    saved = time.monotonic()
    try:
        for batch in _from_where_it_was(walk, batches, shown):
            forwards = walk.forward(batch)
            with interruptions.held():
                walk.add(batch, forwards)
                if folder is not None and time.monotonic() - saved > SAVE_EVERY:
                    walk.save(Path(folder))
                    saved = time.monotonic()
            shown.step()
        if not walk.batches:
            raise ConfigError("there is nothing to survey: the batches are empty")
        return True
    except BaseException as error:
        if folder is not None and walk.batches:
            walk.save(Path(folder))
        if isinstance(error, KeyboardInterrupt) and walk.batches:
            return False
        raise


def _from_where_it_was(walk: Walk, batches: Iterable[Any], shown: Bar) -> Iterator[Any]:
    """The batches that have not been read."""
    iterator = iter(batches)
    skipped = list(itertools.islice(iterator, 1)) if walk.batches else []
    if skipped and _digest(skipped[0]) != walk.first_batch:
        raise ConfigError("these are not the batches of the survey to resume: the first one differs")
    n = len(skipped) + sum(1 for _ in itertools.islice(iterator, max(0, walk.batches - 1)))
    if n < walk.batches:
        raise ConfigError(f"the survey to resume has read {walk.batches} batches, and these are only {n}")
    shown.step(n)
    for batch in iterator:
        walk.first_batch = walk.first_batch or _digest(batch)
        yield batch


def _digest(batch: Any) -> str:
    """Tells batches apart."""
    if isinstance(batch, Tensor):
        return hashlib.sha256(batch.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return hashlib.sha256("".join(map(_digest, batch)).encode()).hexdigest()[:16]
    return hashlib.sha256(str(batch).encode()).hexdigest()[:16]


def _check_folder(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"cannot save to {folder}: it is a file; give the name of a folder")
    if not resume and (folder / "survey.json").exists():
        raise FormatError(
            f"{folder} holds an interrupted survey: write resume=True to go on with it, or give another folder"
        )


@torch.no_grad()
def _index(
    walk: Walk, tokenizer: Any, labels: Sequence[str] | None, logits: int, neighbours: int, complete: bool
) -> LatentIndex:
    """The index of what was seen."""
    sae, host, site = walk.sae, walk.host, walk.site
    if not walk.reads_tokens:
        walk._drop_pictures()
    every = torch.arange(sae.d_sae, device=sae.device)
    directions = torch.cat([sae.directions(part) for part in every.split(4096)]) if neighbours or logits else None
    raises = lowers = None
    found = unembedding(host.model, walk.last.name) if logits and walk.reads_tokens and site.head is None else None
    if found is not None and directions is not None and found.weight.shape[1] == directions.shape[1]:
        raises, lowers = _logit_effects(found, directions, min(logits, found.weight.shape[0]))
    fired_with = walk.cofiring.neighbours(neighbours) if neighbours else None
    alike = nearest(directions, neighbours) if neighbours and directions is not None else None
    metadata = {
        "site": site.name,
        "written": walk.last.name,
        "head": site.head,
        "model": host.describe(),
        "where": repr(where_of(sae, walk.options.get("where"))),
        "sae": repr(sae),
        "fingerprint": walk.settings["fingerprint"],
        "grid": None if walk.reads_tokens else grid_of(host.model, walk.settings["width"]),
        "before": walk.before,
    }
    index = LatentIndex(
        metadata=metadata,
        sequences=walk.sequences,
        positions=walk.positions,
        complete=complete,
        counts=walk.tallies.counts.cpu(),
        mean=walk.tallies.mean.cpu(),
        quantiles=walk.tallies.quantiles().cpu(),
        best={name: tensor.cpu() for name, tensor in walk.best.state().items()},  # type: ignore[union-attr]
        drawn={name: tensor.cpu() for name, tensor in walk.drawn.state().items()},  # type: ignore[union-attr]
        raises=raises,
        lowers=lowers,
        fired_with=_on_cpu(fired_with),
        alike=_on_cpu(alike),
        pictures=dict(walk.pictures.kept),
        labels=None if labels is None else [str(label) for label in labels],
    )
    index.read_pieces(tokenizer)
    index.bind(host.model, sae, tokenizer, walk.options.get("where"))
    return index


def _on_cpu(found: Neighbours | None) -> Neighbours | None:
    return None if found is None else Neighbours(found.latents.cpu(), found.similarity.cpu())


def _logit_effects(found: Any, directions: Tensor, n: int) -> tuple[Neighbours, Neighbours]:
    """The n tokens that each direction raises most, and lowers most, with the change of their logits."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for part in directions.split(max(1, LOGITS_AT_ONCE // found.weight.shape[0])):
        change = found.logits(part)
        for sign, kept in zip((1, -1), parts, strict=True):
            best = (change * sign).topk(n, dim=1)
            kept.append((best.indices.cpu(), (best.values * sign).float().cpu()))
    return tuple(  # type: ignore[return-value]
        Neighbours(*(torch.cat(column) for column in zip(*kept, strict=True))) for kept in parts
    )
