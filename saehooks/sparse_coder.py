"""A dictionary times an activation: what SAEs and transcoders share."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from saehooks import hub, kernels
from saehooks.activations import ACTIVATIONS, LatentDensity
from saehooks.answers import no_attribute
from saehooks.codes import Codes
from saehooks.dictionaries import DICTIONARIES, Prepared
from saehooks.errors import ConfigError, FormatError, LatentError, UnknownKeywordError, WidthError
from saehooks.kernels import Step, Support
from saehooks.refinement import Refinement
from saehooks.sae_config import SAEConfig
from saehooks.storage import write_folder

FINGERPRINTED = 4096
"""Numbers of each tensor that a fingerprint looks at."""

Method = TypeVar("Method", bound=Callable[..., Any])


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Inside the block autocast is off on a device: an SAE computes in its own dtype, wherever it is called."""
    if _can_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@cache
def _can_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _in_own_dtype(method: Method) -> Method:
    """A method of an SAE that runs with `autocast_off`."""

    @wraps(method)
    def called(self: SparseCoder, *args: Any, **kwargs: Any) -> Any:
        with autocast_off(self.device):
            return method(self, *args, **kwargs)

    return called  # type: ignore[return-value]


OUTPUT_ANSWERS = {
    **dict.fromkeys(
        ("feature_acts", "acts", "latents", "latent_acts", "features", "z"), "write .codes, or .codes.dense()"
    ),
    **dict.fromkeys(("sae_out", "x_hat", "recon", "reconstruction", "x_reconstruct", "out"), "write .recons"),
    **dict.fromkeys(("latent_indices", "latent_acts"), "write .codes.top(k)"),
    **dict.fromkeys(("loss", "fvu", "mse_loss"), "write sh.measure(model, sae, batches), or saehooks.metrics"),
}


class SAEOutput(NamedTuple):
    """What calling an SAE gives."""

    recons: Tensor
    """(*shape, d_in), the reconstruction."""
    codes: Codes
    """Codes of shape (*shape): the sparse latent activations."""

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name, OUTPUT_ANSWERS)


class Encoded(NamedTuple):
    """The stages of encoding, for losses that need more than the codes."""

    prepared: Prepared
    """What the dictionary made of the rows: queries (rows, d), and scale (rows,) or None."""
    support: Support
    """The selected latents: indices (nnz,), offsets (rows + 1,)."""
    scores: Tensor
    """(nnz,) scores of the selected latents, differentiable."""
    candidates: Codes
    """(*shape) codes of all that was selected: training decodes these, so that gradients reach inactive latents too."""
    codes: Codes
    """(*shape) codes of what is active; the same as ``candidates`` but for jumprelu in train mode."""
    first_pass: Codes | None = None
    """(*shape) codes before refinement, of all that was selected first; None without refinement."""
    unscaled: Tensor | None = None
    """(rows, d_out) ``values @ directions`` of the candidates, where encoding has made it."""
    first_unscaled: Tensor | None = None
    """(rows, d_out) that of the first pass."""


def _glance(module: nn.Module) -> dict[str, Tensor]:
    """A few numbers of every parameter: they show whether it was filled anew."""
    found = {}
    for name, p in module.named_parameters():
        few = p.detach()
        while few.dim() > 2:
            few = few[0]
        few = few.diagonal() if few.dim() == 2 else few.reshape(-1)
        if not p.is_meta:
            found[name] = few[:64].to("cpu", torch.float32, copy=True)
    return found


def _differ(before: dict[str, Tensor], now: dict[str, Tensor]) -> bool:
    """Whether numbers differ by more than the rounding of a cast, or there are others."""
    return before.keys() != now.keys() or any(
        few.shape != now[name].shape or not torch.allclose(few, now[name], rtol=0.01, atol=1e-6, equal_nan=True)
        for name, few in before.items()
    )


ANSWERS = {
    **dict.fromkeys(("use_error_term", "error_term"), "a block keeps or drops the error: error='keep', error='drop'"),
    **dict.fromkeys(
        ("hook_sae_acts_post", "hook_sae_acts_pre", "hook_sae_output", "hook_sae_error", "hook_sae_recons"),
        "with sh.read(model, sae) as trace: gives trace.codes, trace.recons and trace.error",
    ),
    **dict.fromkeys(("layer", "hook_layer", "hook_point", "site", "at"), "write sae.hook_name"),
    **dict.fromkeys(("n_features", "num_latents", "dict_size", "n_latents", "d_hidden"), "write sae.d_sae"),
    **dict.fromkeys(("d_model", "activation_dim"), "write sae.d_in"),
    **dict.fromkeys(("config", "metadata"), "write sae.cfg, sae.cfg.metadata"),
    **dict.fromkeys(("decoder", "encoder", "W_D", "W_E"), "write sae.directions(latents), sae.dictionary"),
    **dict.fromkeys(
        ("fold_W_dec_norm", "set_decoder_norm_to_unit_norm"),
        "values need no folding: index.typical(latent) is their scale",
    ),
    **dict.fromkeys(("save_model", "save_pretrained", "save_to_disk"), "write sae.save(folder)"),
}
"""What to write, by the names of other libraries."""

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
"""Tensors that a linear dictionary has, also asked of the SAE."""

MEANT = {
    **dict.fromkeys(("d_model", "d_input", "input_dim", "activation_dim", "in_features", "d_embed"), "d_in"),
    **dict.fromkeys(
        (
            "dict_size",
            "n_features",
            "num_features",
            "n_latents",
            "num_latents",
            "dictionary_size",
            "d_hidden",
            "n_dict",
        ),
        "d_sae",
    ),
    **dict.fromkeys(("architecture", "activation_fn", "activation_function", "arch", "act", "kind"), "activation"),
    **dict.fromkeys(("hook_point", "layer", "at", "site", "hook"), "hook_name"),
    **dict.fromkeys(("n_active", "topk", "top_k", "num_active"), "k"),
}
"""The names of an SAE's settings in other libraries."""


class Answering(type(nn.Module)):  # type: ignore[misc]
    """Classes that answer the names of other libraries: of functions that read SAEs, and of settings."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith(("load", "from_")):
            raise no_attribute(
                cls, name, {name: "SAEs are read by sh.load('folder, hub id or release')"}, f"class {cls.__name__!r}"
            )
        raise no_attribute(cls, name, {}, f"class {cls.__name__!r}")

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        for name in settings:
            if name == "expansion_factor":
                raise UnknownKeywordError(f"{cls.__name__} has no setting {name}=; write d_sae={settings[name]} * d_in")
            if MEANT.get(name, name) != name:
                raise UnknownKeywordError(f"{cls.__name__} has no setting {name}=; did you mean {MEANT[name]}=?")
        return super().__call__(*args, **settings)


class SparseCoder(nn.Module, metaclass=Answering):
    """What an SAE and a transcoder share: activations of width d_in in, sparse codes, a reconstruction out."""

    cfg: SAEConfig

    def __init__(self, cfg: SAEConfig, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        for name, size in (("d_in", cfg.d_in), ("d_sae", cfg.d_sae)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(f"{name} must be a positive integer, got {size!r}")
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"dtype={dtype!r}; expected a torch.dtype, such as torch.float16")
        self.cfg = cfg
        kinds = _known("dictionary", cfg.dictionary, DICTIONARIES), _known("activation", cfg.activation, ACTIVATIONS)
        for_dictionary, for_activation, for_density, for_refinement = _route(
            cfg.settings, *kinds, LatentDensity, Refinement
        )
        for_density["track_density"] = for_density.get("track_density", False) or kinds[1].tracks_density
        # Parameters made under inference_mode could never be trained; a device in use as torch's default is the user's.
        with torch.inference_mode(False), nullcontext() if device is None else torch.device(device):
            self.dictionary = kinds[0](cfg.d_in, cfg.d_sae, dtype=dtype, **for_dictionary)
            self.activation = kinds[1](cfg.d_sae, **for_activation)
            self.density = LatentDensity(cfg.d_sae, **for_density)
            self.refinement = Refinement(**for_refinement)
            if self.refinement.reselect is not None:
                self.activation.check_reselect(self.refinement.reselect)
            self.to(device=device, dtype=dtype)
        self._finished = False
        self._first = _glance(self)

    @property
    def finished(self) -> bool:
        """Whether the weights are loaded, trained, or set from data: training then goes on from them and never sets
        them from data again. Parameters that you filled yourself, in whatever way, are seen."""
        return self._finished or any(p._version for p in self.parameters()) or _differ(self._first, _glance(self))

    @finished.setter
    def finished(self, value: bool) -> None:
        self._finished = value

    def begin_with_these_weights(self) -> None:
        """Count the present weights, which another process drew, as those it was made with: not `finished`."""
        self._finished, self._first = False, _glance(self)

    # ------------------------------------------------------------------- use

    def encode(self, x: Tensor, *, step: Step | None = None) -> Codes:
        """Codes of activations (*shape, d_in); differentiable in x and in the parameters.

        Args:
            x: (*shape, d_in), floating; computed in the dtype of the SAE.
            step: what the kernels know beside the tensors, such as a `Capacity`; None: exact sizes, by device.
        Raises:
            WidthError: the last axis is not d_in.
        """
        return self.encode_stages(x, step=step).codes

    @_in_own_dtype
    def encode_stages(self, x: Tensor, *, decoding: bool = False, step: Step | None = None) -> Encoded:
        """Encode activations (*shape, d_in) and keep the stages that losses need.

        Args:
            x: (*shape, d_in), floating.
            decoding: whether `decode_stages` follows: both then share passes over the dictionary.
            step: what the kernels know beside the tensors.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise WidthError(
                f"an SAE encodes activations, a floating tensor (..., {self.cfg.d_in}); got {_described(x)}; "
                "with sh.read(model, sae) as trace: model(tokens) encodes those of a text"
            )
        if x.dim() == 0 or x.shape[-1] != self.cfg.d_in:
            raise WidthError(
                f"this SAE reads activations of width {self.cfg.d_in}, got a tensor of shape {tuple(x.shape)}"
            )
        flat = self._rows(x)
        prepared = self.dictionary.prepare(flat)
        step = step or kernels.DEFAULT
        with torch.no_grad():
            rule = self.activation.rule(flat.shape[0], self.density.mean)
            silenced = self.density.silenced
            padded = self.activation.takes_padding and self.refinement.takes_padding
            selecting, rank = step if padded else step.exact(), self.activation.rank
            if rank is None:
                support = self.dictionary.select(prepared, rule, silenced=silenced, step=selecting)
            else:
                support = self.dictionary.select_ranked(prepared, rule.k, rank, silenced)
        if decoding and self.activation.carries_scores and silenced is None:
            scores, sums = self.dictionary.scored_sums(prepared, support, step=step)
        else:
            scores, sums = self.dictionary.scores(prepared, support, step=step), None
        if silenced is not None:
            scores = scores.masked_fill(silenced[support.indices], 0.0)
        values, active = self.activation.values(scores, support), self.activation.active(scores, support)
        shape, first_pass = tuple(x.shape[:-1]), None
        if self.refinement.steps:
            first_pass = self._codes(prepared, support, values, shape)
        refined = self.refinement(
            self.dictionary,
            self.activation,
            flat,
            prepared,
            support,
            values,
            active,
            sums=sums,
            decoding=decoding,
            step=step,
        )
        support, values = refined.support, refined.values
        if refined.kept is not None:
            scores, active = scores[refined.kept], None if active is None else active[refined.kept]
        codes = candidates = self._codes(prepared, support, values, shape)
        if active is not None:
            codes = candidates.keep(active)
        if self.training:
            self.activation.observe(scores.detach(), support)
            if self.density.tracked:
                self.density.update(codes.counts(), flat.shape[0])
        return Encoded(
            prepared, support, scores, candidates, codes, first_pass, refined.unscaled, refined.first_unscaled
        )

    def _rows(self, x: Tensor) -> Tensor:
        """(rows, d_in) of activations (*shape, d_in), where and in what the SAE computes."""
        flat, mine = x if x.dim() == 2 else x.reshape(-1, self.cfg.d_in), self._a_parameter
        return flat if flat.dtype == mine.dtype and flat.device == mine.device else flat.to(mine.device, mine.dtype)

    def _codes(self, prepared: Prepared, support: Support, values: Tensor, shape: tuple[int, ...]) -> Codes:
        """Codes of a batch of some shape, from the values (nnz,) of a support."""
        scale, shift = prepared.scale, prepared.shift
        return Codes(support.indices, values, support.offsets, shape, self.cfg.d_sae, scale, support.pattern(), shift)

    def decode(self, codes: Codes, *, step: Step | None = None) -> Tensor:
        """(*shape, d_out) reconstruction of codes.

        Raises:
            WidthError: codes over another number of latents.
            LatentError: codes with a latent out of range.
        """
        return self._decode(codes, with_offset=True, step=step)

    def decode_delta(self, codes: Codes) -> Tensor:
        """(*shape, d_out) what the codes add to a reconstruction: `decode` without the constant offset, so linear."""
        return self._decode(codes, with_offset=False)

    def decode_stages(self, stages: Encoded, *, first_pass: bool = False, step: Step | None = None) -> Tensor:
        """(*shape, d_out) reconstruction of the candidates, or of the first pass, of `encode_stages`."""
        codes, unscaled = stages.candidates, stages.unscaled
        if first_pass:
            if stages.first_pass is None:
                raise ConfigError("there is no first pass without refinement: write refine=1 or more")
            codes, unscaled = stages.first_pass, stages.first_unscaled
        return self._decode(codes, with_offset=True, unscaled=unscaled, step=step)

    @_in_own_dtype
    def _decode(
        self, codes: Codes, with_offset: bool, unscaled: Tensor | None = None, step: Step | None = None
    ) -> Tensor:
        if not isinstance(codes, Codes):
            raise ConfigError(
                f"decode takes Codes, got {_described(codes)}; sh.Codes.from_dense(acts) makes them of a dense tensor"
            )
        if codes.d_sae != self.cfg.d_sae:
            raise WidthError(f"codes over {codes.d_sae} latents were given to an SAE of {self.cfg.d_sae}")
        decoded = self.dictionary.decode(codes, with_offset, unscaled=unscaled, step=step or kernels.DEFAULT)
        return decoded.reshape(*codes.shape, self.d_out)

    def forward(self, x: Tensor, *, step: Step | None = None) -> SAEOutput:
        """Encode and decode activations (*shape, d_in); the reconstruction is differentiable in the codes' values."""
        stages = self.encode_stages(x, step=step)
        return SAEOutput(self.decode(stages.candidates, step=step), stages.codes)

    @torch.no_grad()
    @_in_own_dtype
    def initialise(self, x: Tensor) -> None:
        """Set what is best set from data, before training, from a sample (rows, d_in); see `finished`."""
        self.finished = True
        flat = self._rows(x)
        self.dictionary.initialise(flat)
        prepared = self.dictionary.prepare(flat)
        self.activation.initialise(prepared.queries, lambda: self.dictionary.score_chunks(prepared))

    @_in_own_dtype
    def directions(self, latents: int | list[int] | Tensor) -> Tensor:
        """(n, d_out) what one unit of each latent adds to a reconstruction of scale 1.

        Raises:
            LatentError: a latent outside ``0 .. d_sae - 1``.
        """
        return self.dictionary.directions(self.checked(latents))

    def checked(self, latents: int | list[int] | Tensor) -> Tensor:
        """(n,) int64 on this SAE's device.

        Raises:
            LatentError: a latent outside ``0 .. d_sae - 1``.
        """
        wanted = torch.as_tensor(latents, device=self.device).reshape(-1)
        if wanted.numel() and (int(wanted.min()) < 0 or int(wanted.max()) >= self.cfg.d_sae):
            raise LatentError(f"latents must lie in 0 .. {self.cfg.d_sae - 1}, got {wanted.tolist()}")
        return wanted

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            dictionary = self.__dict__.get("_modules", {}).get("dictionary")
            if name in WEIGHTS and hasattr(dictionary, name):
                return getattr(dictionary, name)
        lacks = f"a {self.cfg.dictionary!r} dictionary has none; sae.directions(latents) are what latents add"
        raise no_attribute(self, name, {**ANSWERS, **dict.fromkeys(WEIGHTS, lacks)} if "cfg" in self.__dict__ else {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "use_error_term" or name in WEIGHTS:  # it would change nothing, and nobody would know
            raise no_attribute(self, name, ANSWERS | {one: f"write sae.dictionary.{one} = ..." for one in WEIGHTS})
        super().__setattr__(name, value)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as any module does; the SAE then counts as `finished`."""
        found = super().load_state_dict(state_dict, strict, assign)
        self.finished = True
        return found

    def frozen(self) -> SparseCoder:
        """The same SAE for use only: in eval mode, its parameters without gradient.

        It shares every tensor with this SAE, whose own mode and flags stay as they are: another thread may be training
        it. Make a new one for each use; it does not see ``sae.to(...)``.
        """
        return _frozen(self)

    # ----------------------------------------------------------- what it is

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.cfg.d_in

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.dictionary.d_out

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.cfg.d_sae

    @property
    def hook_name(self) -> str | None:
        """The site it reads, if it knows."""
        return self.cfg.metadata.get("hook_name")

    @property
    def hook_name_out(self) -> str | None:
        """The site it writes: for an SAE the one that it reads."""
        return self.hook_name

    @property
    def dtype(self) -> torch.dtype:
        """What the SAE computes in."""
        return self._a_parameter.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self._a_parameter.device

    @property
    def _a_parameter(self) -> Tensor:
        """One of the parameters, found without going through all modules, which takes longer than encoding a row."""
        known = self._modules.get("dictionary")  # of a joined SAE it lies elsewhere
        for parameter in () if known is None else known._parameters.values():
            if parameter is not None:
                return parameter
        return next(self.parameters())

    @torch.no_grad()
    def fingerprint(self) -> str:
        """A hash by which an index of latents knows its SAE: of its kind, and of some numbers of each tensor."""
        cfg = self.cfg
        found = hashlib.sha256(f"{cfg.dictionary} {cfg.activation} {sorted(cfg.settings.items())}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            flat = tensor.reshape(-1)
            some = flat[:: max(1, flat.numel() // FINGERPRINTED)].cpu().double().contiguous()
            found.update(f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
        return found.hexdigest()[:16]

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write ``cfg.json`` and ``sae_weights.safetensors``; a crash at any moment leaves the old SAE or the new.

        Args:
            folder: made if missing; other files in it stay.
            dtype: store the weights in fewer bits (float16 halves the file); loading casts back.
        """
        self.cfg.dtype = str(self.dtype)[6:]
        tensors = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in self.state_dict().items()}
        write_folder(folder, self.cfg.to_dict(), tensors, in_order=True)

    def push_to_hub(
        self,
        repository: str,
        *,
        subfolder: str = "",
        private: bool = False,
        revision: str | None = None,
        message: str = "Upload an SAE",
        dtype: torch.dtype | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload the SAE to a Hugging Face repository, with a model card made from its metadata and metrics.

        Args:
            repository: ``"user/name"``; made if it does not exist.
            subfolder: in it, so that one repository can hold many SAEs.
            private: of a repository that is made.
            revision: the branch.
            message: of the commit.
            dtype: as in `save`.
            token: of the hub; the one you are logged in with if not given.
        Returns:
            The address of the commit.
        Raises:
            FormatError: the hub did not take it, saying what to do.
        """
        self.cfg.dtype = str(self.dtype)[6:]
        card = hub.model_card(self.cfg.to_dict(), repository, subfolder)
        return hub.publish(
            repository,
            lambda folder: self.save(folder, dtype),
            card,
            subfolder=subfolder,
            private=private,
            revision=revision,
            message=message,
            token=token,
        )

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Complain about tensors that do not fit.

        Raises:
            FormatError: tensors are missing, left over, or of another shape than the config says.
        """
        expected = self.state_dict()
        wrong = sorted(set(expected) ^ set(shapes))
        if wrong:
            raise FormatError(f"{where}: tensors missing or left over: {', '.join(wrong)}")
        for name, shape in shapes.items():
            if tuple(shape) != tuple(expected[name].shape):
                raise FormatError(
                    f"{where}: {name} has shape {tuple(shape)}, the config (d_in={self.cfg.d_in}, "
                    f"d_sae={self.cfg.d_sae}) says {tuple(expected[name].shape)}"
                )

    def adopt(self, tensors: Mapping[str, Tensor], where: str = "the given tensors") -> None:
        """Take these tensors as parameters and buffers, in eval mode; those of our type and layout are not copied.

        Raises:
            FormatError: tensors are missing, left over, or of another shape than the config says.
        """
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, where)
        state = self.state_dict()
        self.load_state_dict({name: laid_out(t, state[name]) for name, t in tensors.items()}, assign=True)
        self.finished = True
        self.eval()

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.cfg.settings.items())
        sites = ("hook_name", "hook_name_out") if self.hook_name_out != self.hook_name else ("hook_name",)
        site = "".join(f", {name}={getattr(self, name)!r}" for name in sites if getattr(self, name))
        kind = f"{self.cfg.dictionary!r}, {self.cfg.activation!r}"
        sizes = f"d_in={self.d_in}, d_sae={self.d_sae}"
        return f"{type(self).__name__}({sizes}, {kind}{settings}{site}, dtype={str(self.dtype)[6:]})"


def _described(given: Any) -> str:
    return f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the dtype and strides of a parameter of the same shape, copied only where they differ."""
    if tensor.dtype == like.dtype and tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=tensor.device).copy_(tensor)


def _frozen(module: Any) -> Any:
    """A module that shares its tensors with ``module``: in eval mode, with parameters that ask for no gradient."""
    twin = object.__new__(type(module))
    twin.__dict__.update(
        module.__dict__,
        training=False,
        _parameters={name: None if p is None else p.detach() for name, p in module._parameters.items()},
        _modules={name: None if one is None else _frozen(one) for name, one in module._modules.items()},
    )
    return twin


def _known(what: str, name: str, registry: dict[str, type]) -> Any:
    if name not in registry:
        plain = str(name).lower().replace("_", "").replace("-", "")
        meant = next((key for key in registry if key.replace("_", "") == plain), None)
        hint = f"did you mean {meant!r}?" if meant else f"choose one of {', '.join(sorted(registry))}"
        raise ConfigError(f"no {what} {name!r}; {hint}")
    return registry[name]


def settings_of(kind: type) -> set[str]:
    """Names of the settings that a dictionary or an activation takes."""
    parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"dtype"}


def _route(settings: dict[str, Any], *kinds: type) -> list[dict[str, Any]]:
    """Split settings between those that take them; complain about one that none takes."""
    parts = [{name: value for name, value in settings.items() if name in settings_of(kind)} for kind in kinds]
    for kind, part in zip(kinds, parts, strict=True):
        _check_settings(kind, part)
    unknown = sorted(set(settings) - {name for part in parts for name in part})
    if unknown:
        known = sorted({name for kind in kinds for name in settings_of(kind)})
        others = sorted(
            name for name, kind in {**DICTIONARIES, **ACTIVATIONS}.items() if unknown[0] in settings_of(kind)
        )
        hint = f"; {unknown[0]} is a setting of {', '.join(others)}" if others else ""
        raise ConfigError(f"unknown setting {', '.join(unknown)} for this SAE; it takes {', '.join(known)}{hint}")
    return parts


def _check_settings(kind: type, given: Mapping[str, Any]) -> None:
    """Complain about a setting of another type than its default, before anything is computed from it."""
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    for name, value in given.items():
        default = parameters[name].default
        accepted = {bool: bool, int: Real, float: Real, str: str}.get(type(default))  # whole numbers check themselves
        if accepted is not None and not isinstance(value, accepted):
            raise ConfigError(f"{name}={value!r}: expected something like {default!r}")
