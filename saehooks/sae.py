"""The SAE, and the transcoder, which writes another site than it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saehooks.errors import ConfigError, FormatError
from saehooks.sae_config import FORMAT, SAEConfig
from saehooks.sparse_coder import Encoded, SAEOutput, SparseCoder, autocast_off, settings_of
from saehooks.storage import dtype_of

__all__ = [
    "FORMAT",
    "SAE",
    "Encoded",
    "SAEConfig",
    "SAEOutput",
    "SparseCoder",
    "Transcoder",
    "autocast_off",
    "settings_of",
    "without_memory",
]


class SAE(SparseCoder):
    """A sparse autoencoder: ``SAE(d_in=768, d_sae=24576)`` is sparsemax over shared concepts, in one pass.

    Any cell of the grid, plain unless settings say more. `saehooks.presets` makes the published ones, and the Sparsemax
    SAE that chooses twice and refines its values: the one to train for quality.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        dictionary: how scores come from an activation and codes become a reconstruction.
        activation: which scores are active and what value each carries.
        dtype: what the SAE computes in.
        device: where its parameters live.
        hook_name: the site it belongs to, so that the verbs need no ``at=``.
        **settings: settings of the dictionary, the activation and the refinement, such as ``k=32``,
            ``values="weight"`` or ``refine=1``.
    Raises:
        ConfigError: an unknown dictionary, activation or setting, or sizes that cannot work.

    >>> sae = SAE(d_in=8, d_sae=32)
    >>> recons, codes = sae(torch.randn(2, 5, 8))
    >>> recons.shape, codes.shape
    (torch.Size([2, 5, 8]), (2, 5))
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        dictionary: str = "concepts",
        activation: str = "sparsemax",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        hook_name: str | None = None,
        **settings: Any,
    ) -> None:
        for name in ("d_out", "skip"):
            if name in settings:
                raise ConfigError(f"{name}= is for a Transcoder, which reads one site and writes another, not an SAE")
        metadata = {} if hook_name is None else {"hook_name": hook_name}
        cfg = SAEConfig(d_in, d_sae, dictionary, activation, settings, str(dtype)[6:], metadata)
        super().__init__(cfg, dtype, device)

    def refined(self, steps: int = 3) -> SAE:
        """This SAE with refinement added afterwards, as a new one in eval mode: it selects the same latents and gives
        them better values.

        Nothing is trained and no data are needed: steps of conjugate gradients (`saehooks.refinement`) find their own
        sizes, and no row's error ever grows by them. So it serves SAEs of others as well, and what is known of which
        latents fire where stays true; the scale of their values changes.

        Args:
            steps: how often values are refined; each costs a sparse product and a sampled one. More than 3 give little.
        Raises:
            ConfigError: an SAE that refines already, or steps below 1.
        """
        if self.refinement.steps:
            raise ConfigError(f"this SAE refines its values already: refine={self.refinement.steps}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps={steps!r}: write the number of refinement steps, 1 or more")
        metadata = {name: known for name, known in self.cfg.metadata.items() if name != "metrics"}  # of the SAE without
        settings = {**self.cfg.settings, "refine": steps, "refine_method": "conjugate"}
        cfg = replace(self.cfg, settings=settings, metadata=metadata, dtype=str(self.dtype)[6:])
        with torch.inference_mode(False):
            state = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
            return SAE.from_config(cfg, state)  # type: ignore[return-value]

    @staticmethod
    def from_config(cfg: SAEConfig, tensors: Mapping[str, Tensor], where: str = "the given tensors") -> SparseCoder:
        """Build an SAE, or the transcoder that a config describes, around its tensors; it is in eval mode.

        Raises:
            FormatError: tensors are missing, left over, or of another shape than the config says.
        """
        sae = without_memory(cfg, where)
        sae.adopt(tensors, where)
        return sae

    @staticmethod
    def from_pretrained(*given: Any, **options: Any) -> SparseCoder:
        """What SAELens calls `saehooks.load`: always an error, which says that.

        Raises:
            ConfigError: always.
        """
        shown = [repr(one) for one in given] or ["'folder or hub id'"]
        raise ConfigError(f"SAEs are read by a function: write sh.load({', '.join(shown)})")


class Transcoder(SparseCoder):
    """A transcoder: it reads one site and predicts another, as an MLP's output from its input.

    Args:
        d_in: width of the activations it reads.
        d_sae: number of latents.
        dictionary: ``"linear"``.
        activation: which scores are active and what value each carries.
        d_out: width of the activations it writes.
        skip: a linear path from input to output beside the latents.
        dtype: what it computes in.
        device: where its parameters live.
        hook_name: the site it reads.
        hook_name_out: the site it writes.
        **settings: settings of the activation, such as ``k=32``.
    Raises:
        ConfigError: an unknown activation or setting, or sizes that cannot work.

    >>> Transcoder(d_in=8, d_sae=32, activation="relu", d_out=6)(torch.randn(2, 5, 8)).recons.shape
    torch.Size([2, 5, 6])
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        dictionary: str = "linear",
        activation: str = "relu",
        *,
        d_out: int,
        skip: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        hook_name: str | None = None,
        hook_name_out: str | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(d_out, bool) or not isinstance(d_out, int) or d_out < 1:
            raise ConfigError(f"d_out must be a positive integer, got {d_out!r}")
        if settings.get("refine"):
            raise ConfigError("refine= compares a reconstruction with the input, and transcoders write another")
        given = {"hook_name": hook_name, "hook_name_out": hook_name_out}
        metadata = {name: site for name, site in given.items() if site is not None}
        settings = {"d_out": d_out, "skip": skip, **settings}
        cfg = SAEConfig(d_in, d_sae, dictionary, activation, settings, str(dtype)[6:], metadata)
        super().__init__(cfg, dtype, device)

    @property
    def hook_name_out(self) -> str | None:
        """The site it writes, if it knows."""
        return self.cfg.metadata.get("hook_name_out")


def without_memory(cfg: SAEConfig, where: str = "the given config") -> SparseCoder:
    """The SAE or the transcoder that a config describes; its parameters have shapes and no memory yet.

    Raises:
        FormatError: the config cannot be built.
    """
    kind = Transcoder if "d_out" in cfg.settings else SAE
    dtype = dtype_of(cfg.dtype)
    try:
        with torch.device("meta"):
            sae = kind(cfg.d_in, cfg.d_sae, cfg.dictionary, cfg.activation, dtype=dtype, **cfg.settings)
    except (ConfigError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FormatError(f"{where}: the config cannot be built: {error}") from error
    sae.cfg.metadata = dict(cfg.metadata)
    return sae
