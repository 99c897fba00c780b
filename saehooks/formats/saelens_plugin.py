"""SAEs of this library inside SAELens: its evals, SAEBench, SAEDashboard and Neuronpedia's runner take them as its own.

Importing this module adds the architecture ``"saehooks"`` to SAELens' registry. It needs SAELens 6, in an environment
of its own (``recipes/benchmark/peers_env``), since SAELens keeps to an older TransformerLens.

    import saehooks as sh
    from saehooks.formats import saelens_plugin
    peer = saelens_plugin.wrap(sh.load("saes/mine"))              # an `sae_lens.SAE`
    peer = sae_lens.SAE.load_from_disk("saes/mine", converter=saelens_plugin.disk_loader)
    peer.save_model("saes/for_saelens")                           # read by `SAE.load_from_disk` once this is imported

What SAELens calls feature activations are our values times the scale of their row, dense: decoding them is linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE as LensSAE
from sae_lens import SAEConfig as LensConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from saehooks.errors import FormatError
from saehooks.formats import native
from saehooks.sae import SAE, SAEConfig, SparseCoder, Transcoder, without_memory
from saehooks.sparse_coder import laid_out

ARCHITECTURE = "saehooks"


@dataclass
class SaehooksConfig(LensConfig):
    """SAELens' config of an SAE of ours."""

    saehooks: dict[str, Any] = field(default_factory=dict)
    """Our own config, as `saehooks.SAEConfig.to_dict` gives it."""

    @classmethod
    def architecture(cls) -> str:
        """Its name in SAELens' registry."""
        return ARCHITECTURE


class SaehooksSAE(LensSAE):
    """An SAE of ours that SAELens takes for its own."""

    coder: SparseCoder

    def initialize_weights(self) -> None:
        """Build our SAE; loading fills it."""
        config = SAEConfig.from_dict(self.cfg.saehooks)
        config.dtype = str(self.dtype)[6:]
        if self.device.type == "meta":
            self.coder = without_memory(config)
        else:
            self.coder = SAE(
                config.d_in,
                config.d_sae,
                config.dictionary,
                config.activation,
                dtype=self.dtype,
                device=self.device,
                **config.settings,
            )
        self.coder.eval()
        self._row: tuple[Tensor | None, Tensor | None] = (None, None)

    def train(self, mode: bool = True) -> SaehooksSAE:
        """As of any module; our SAE itself stays in eval mode, since SAELens does not train it."""
        super().train(mode)
        self.coder.eval()
        return self

    def encode(self, x: Tensor) -> Tensor:
        """(*shape, d_sae) values times the scale of their row, dense."""
        sae_in = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        codes = self.coder.encode(sae_in)
        acts = codes.dense()
        if codes.scale is not None:
            acts = acts * codes.scale.reshape(*codes.shape, 1)
        self._row = codes.scale, codes.shift
        return self.hook_sae_acts_post(acts)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """(*shape, d_in) reconstruction; for an SAE that normalises each row, of the rows that were encoded last."""
        dictionary, flat = self.coder.dictionary, feature_acts.reshape(-1, feature_acts.shape[-1])
        recons = dictionary.project(flat @ dictionary.table)
        scale, shift = self._row
        if dictionary.offset is not None:
            scaled = dictionary.scales_offset
            recons = recons + (dictionary.offset * self._of_rows(scale, flat) if scaled else dictionary.offset)
        if shift is not None:
            recons = recons + self._of_rows(shift, flat)
        recons = self.hook_sae_recons(recons.reshape(*feature_acts.shape[:-1], self.coder.d_out))
        return self.reshape_fn_out(recons, self.d_head)

    def _of_rows(self, held: Tensor | None, flat: Tensor) -> Tensor:
        """(rows, 1) or (rows, d_in), what the last encoding said of each row."""
        if held is None or len(held) != len(flat):
            raise FormatError("this SAE normalises each row: decode the activations that encode() gave last")
        return held.reshape(len(flat), -1)

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """(d_sae, d_in) what one unit of each latent adds."""
        return self.coder.directions(torch.arange(self.coder.d_sae))

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        """(d_in, d_sae) what a prepared activation is multiplied with, where scores are such a product."""
        keys = self.coder.dictionary.keys
        if keys.shape[0] != self.coder.d_sae:
            raise AttributeError(f"scores of {self.coder.cfg.dictionary} are no product with a matrix W_enc")
        return keys.T

    @property
    def b_dec(self) -> Tensor:  # type: ignore[override]
        """(d_in,) added to every reconstruction."""
        offset = self.coder.dictionary.offset
        return torch.zeros(self.coder.d_out, dtype=self.dtype, device=self.device) if offset is None else offset

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Safetensors take contiguous tensors alone."""
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Our kernels read matrices in the order in which our parameters hold them."""
        own = self.state_dict()
        for name, tensor in state_dict.items():
            if name in own:
                state_dict[name] = laid_out(tensor, own[name])


if ARCHITECTURE not in SAE_CLASS_REGISTRY:
    register_sae_class(ARCHITECTURE, SaehooksSAE, SaehooksConfig)


def _config_dict(sae: SparseCoder, device: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """SAELens' config of an SAE of ours, as a dict."""
    if isinstance(sae, Transcoder):
        raise FormatError(
            "the plug-in is for SAEs; saehooks.formats.saelens.save writes transcoders that SAELens reads"
        )
    known = sae.cfg.metadata
    joined = (sae.hook_name or "").endswith("hook_z") and known.get("head") is None
    metadata = {
        "sae_lens_version": "6.54.0",
        "hook_name": sae.hook_name,
        "hook_head_index": known.get("head"),
        "model_name": known.get("model_name"),
        "prepend_bos": True,
        "context_size": (known.get("training") or {}).get("context", 128),
    }
    return {
        "architecture": ARCHITECTURE,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype)[6:],
        "device": device,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if joined else "none",
        "metadata": metadata,
        "saehooks": sae.cfg.to_dict(),
        **(more or {}),
    }


def wrap(sae: SparseCoder) -> SaehooksSAE:
    """An `sae_lens.SAE` around an SAE of ours; both share their tensors.

    Raises:
        FormatError: a transcoder.
    """
    found = _config_dict(sae, str(sae.device))
    config = SaehooksConfig.from_dict({**found, "device": "meta"})
    config.metadata = SAEMetadata(**found["metadata"])
    peer = SaehooksSAE(config)
    peer.cfg.device, peer.device = str(sae.device), sae.device
    peer.coder = sae.frozen()
    return peer


def disk_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A converter for ``sae_lens.SAE.load_from_disk``: reads folders of saehooks."""
    sae = native.load(path)
    return _config_dict(sae, device, cfg_overrides), {f"coder.{name}": t for name, t in sae.state_dict().items()}
