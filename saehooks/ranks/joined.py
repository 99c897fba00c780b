"""An SAE whose dictionary is split over processes, for every verb that takes an SAE."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saehooks.codes import Codes
from saehooks.errors import ConfigError, FormatError, WidthError
from saehooks.kernels import Step
from saehooks.ranks.exchange import all_codes, own_codes
from saehooks.ranks.files import read_part
from saehooks.ranks.grid import Alone, Ranks
from saehooks.ranks.splitting import axes_of, check_splits, shard
from saehooks.sae import FORMAT, SAE, SAEConfig, without_memory
from saehooks.sparse_coder import Encoded, SAEOutput, SparseCoder
from saehooks.storage import open_folder


def split(sae: SAE, latent_ranks: int | None = None) -> SparseCoder:
    """This process's latents of an SAE that all processes have, joined with those of the others: see `JoinedSAE`.

    Args:
        sae: the same on every rank.
        latent_ranks: over how many processes; all if not given.
    Raises:
        ConfigError: latents that cannot be split evenly, or no other processes.
    """
    ranks = Ranks.joined(latent_ranks)
    return JoinedSAE(sae.cfg, shard(sae, ranks), ranks) if isinstance(ranks, Ranks) else sae


def load(folder: str | Path, latent_ranks: int | None = None) -> SparseCoder:
    """Load this process's latents of an SAE's folder, joined with those of the other processes: see `JoinedSAE`.

    No process ever holds the whole dictionary. Where only a part of a file is read, its checksum cannot be looked at.

    Args:
        folder: saved by `SAE.save` or by a training, on a disk that all processes see.
        latent_ranks: over how many processes; all if not given.
    Raises:
        FormatError: the folder is not one, or its tensors do not fit its config; on every rank.
        ConfigError: latents that cannot be split evenly.
    """
    ranks = Ranks.joined(latent_ranks)
    cfg, local = ranks.agree(lambda: _read(Path(folder), ranks))
    return JoinedSAE(cfg, local, ranks) if isinstance(ranks, Ranks) else local


def _read(folder: Path, ranks: Alone) -> tuple[SAEConfig, SAE]:
    opened = open_folder(folder)
    if opened.config.get("format") != FORMAT:
        raise FormatError(f"{folder} was not saved by saehooks: load it by sh.load, and split it by ranks.split(sae)")
    cfg = SAEConfig.from_dict(opened.config)
    whole = without_memory(cfg, str(folder))
    if not isinstance(whole, SAE):
        raise FormatError(f"{folder} holds a {type(whole).__name__}; only SAEs can be split over processes")
    whole.check_shapes(opened.shapes, str(folder))
    axes = axes_of(whole)
    check_splits(cfg, ranks)
    local = shard(whole, ranks)
    local.adopt(read_part(opened.weights, axes.get, ranks), str(folder))
    return cfg, local


class JoinedSAE(SparseCoder):
    """An SAE of which each process holds some latents; every process calls the model on the same inputs.

    Codes are those of all latents, on every process, under the numbers that one process would give them; edits,
    traces, `measure` and gradients work as with any SAE. Each encoding sends the row sums or candidates of its
    threshold and the codes, each decoding one sum of reconstructions.

    Args:
        cfg: of the whole.
        local: this process's latents, from `saehooks.ranks.shard`.
        ranks: the processes.
    """

    def __init__(self, cfg: SAEConfig, local: SAE, ranks: Ranks) -> None:
        torch.nn.Module.__init__(self)
        self.cfg, self.local, self.ranks = cfg, local, ranks
        self._finished = True
        self.eval()

    @property
    def d_out(self) -> int:
        return self.local.d_out

    def encode(self, x: Tensor, *, step: Step | None = None) -> Codes:
        return all_codes(self.local.encode(x, step=step), self.ranks)

    def encode_stages(self, x: Tensor, *, decoding: bool = False, step: Step | None = None) -> Encoded:
        raise ConfigError("an SAE that is split over processes is trained by sh.fit(..., latent_ranks=N), not here")

    def _decode(
        self, codes: Codes, with_offset: bool, unscaled: Tensor | None = None, step: Step | None = None
    ) -> Tensor:
        if codes.d_sae != self.cfg.d_sae:
            raise WidthError(f"codes over {codes.d_sae} latents were given to an SAE of {self.cfg.d_sae}")
        return self.local._decode(own_codes(codes, self.ranks), with_offset, unscaled, step)

    def forward(self, x: Tensor, *, step: Step | None = None) -> SAEOutput:
        codes = self.encode(x, step=step)
        return SAEOutput(self.decode(codes, step=step), codes)

    def directions(self, latents: int | list[int] | Tensor) -> Tensor:
        wanted, n = self.checked(latents), self.local.d_sae
        own = (wanted // n == self.ranks.latent_rank).nonzero()[:, 0]
        found = torch.zeros(len(wanted), self.d_out, dtype=self.dtype, device=self.device)
        found[own] = self.local.directions(wanted[own] - n * self.ranks.latent_rank).detach()
        return self.ranks.over_latents(found)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        raise ConfigError("an SAE that is split over processes cannot be saved from one of them: its folder is whole")
