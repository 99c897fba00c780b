"""SAEs of dictionary_learning: ``ae.pt``, a pickled state dict that is read without running it, and ``config.json``.

Read are the classes of all its trainers: standard, p-anneal, gated, jumprelu, top-k, batch top-k, matryoshka. TopK and
BatchTopK have tensors of the same names: without a config the file does not say which it is, and is not read.
Source: ``dictionary.py`` and ``trainers/*.py``, version 0.1.0 and the repository after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from saehooks.errors import FormatError
from saehooks.formats._linear import LinearParts, build_linear
from saehooks.formats.archives import open_torch_file
from saehooks.formats.contents import Contents
from saehooks.formats.names import block_site, layer_in
from saehooks.sae import SparseCoder
from saehooks.storage import StoredTensor, read_json

WEIGHTS, CONFIG = "ae.pt", "config.json"
CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
    "MatroyshkaBatchTopKSAE": "batchtopk",
}
TRAINING = """
    anneal_end anneal_start auxk_alpha bandwidth beta1 beta2 compile dead_feature_threshold decay_start device
    group_fractions group_sizes group_weights initialization initial_sparsity_penalty k_anneal_steps l1_penalty
    l1_warmup_steps layer lm_name log_steps lr n_sparsity_updates norm_factor p_end p_start resample_steps seed
    sparsity_function sparsity_penalty sparsity_queue_length sparsity_warmup_steps steps submodule_name target_l0
    temperature threshold_beta threshold_start_step top_k_aux trainer_class wandb_name warmup_steps weights_temperature
"""
"""Fields of their trainers' configs that change no number: activations that were scaled by ``norm_factor`` had the
biases scaled back before the file was written."""

KINDS = {"resid_post": "resid_post", "resid_out": "resid_post", "resid_pre": "resid_pre", "resid_mid": "resid_mid"}
KINDS |= {"mlp_out": "mlp_out", "attn_out": "attn_out", "attention_out": "attn_out"}


def load(
    path: str | Path, *, hook_name: str | None = None, ignore: Iterable[str] = (), name: str | None = None
) -> SparseCoder:
    """Load a dictionary_learning SAE: the same reconstructions, and the codes of its ``encode``.

    Args:
        path: a folder of ae.pt and config.json, or the .pt file.
        hook_name: its site, where neither config nor path says it.
        ignore: settings or tensors that you know to change nothing.
        name: where it came from, which says the site; the path if not given.
    Raises:
        FormatError: not such a folder, or something in it that is not understood.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    config = next((p for p in (file.parent / CONFIG, file.parent.parent / CONFIG) if p.is_file()), None)
    if config is not None and config.parent != file.parent and file.parent.name != "checkpoints":
        config = None  # only a checkpoint has its config one folder up
    return read(
        open_torch_file(file),
        read_json(config) if config else None,
        str(path),
        hook_name=hook_name,
        ignore=ignore,
        name=name or str(file.resolve()),
    )


def read(
    state: Any,
    config: Mapping[str, Any] | None,
    where: str,
    *,
    hook_name: str | None = None,
    ignore: Iterable[str] = (),
    name: str = "",
) -> SparseCoder:
    """The SAE of such a state dict and such a config."""
    if not isinstance(state, dict):
        raise FormatError(f"{where}: {WEIGHTS} holds a {type(state).__name__}, expected a state dict")
    whole = Contents(where, config or {})
    trainer = Contents(where, whole.group("trainer", {}), state, ignore)
    buffer = Contents(where, whole.group("buffer", {}), ignore=ignore)
    _check_buffer(buffer)
    kind = trainer.one_of("dict_class", CLASSES, None)
    if kind is None:
        kind = _by_tensors(state, where)
    for theirs, ours in (("activation_dim", "d_in"), ("dict_size", "d_sae")):
        size = trainer.setting(theirs, int, None)
        if size is not None:
            trainer.size(ours, size, f"{theirs} in {CONFIG}")
    settings: dict[str, Any] = {"apply_b_dec_to_input": kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")}
    parts = _parts(trainer, kind, settings)
    facts = {n: value for n, value in trainer.known(TRAINING, "k").items() if value is not None}
    metadata = {
        "hook_name": hook_name or _site(facts, name),
        "model_name": trainer.check("lm_name", facts["lm_name"], str) if "lm_name" in facts else None,
        "source": {"format": "dictionary_learning", "dict_class": kind, **facts},
    }
    return build_linear(trainer, CLASSES[kind], parts, metadata)


def _check_buffer(buffer: Contents) -> None:
    """What the config says of the activations: whether they are of one place."""
    buffer.one_of("io", ("in", "out"), "out")  # "in_and_out" trains a transcoder of two places
    buffer.known("d_submodule n_ctxs ctx_len refresh_batch_size out_batch_size device dataset hook add_special_tokens")
    buffer.known("remove_bos remove_high_norm max_activation_norm_multiple")
    buffer.finish()


def _parts(trainer: Contents, kind: str, settings: dict[str, Any]) -> LinearParts:
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE", "MatroyshkaBatchTopKSAE"):
        parts = LinearParts(
            W_enc=trainer.tensor("W_enc", "d_in", "d_sae"),
            W_dec=trainer.tensor("W_dec", "d_sae", "d_in"),
            b_enc=trainer.tensor("b_enc", "d_sae"),
            b_dec=trainer.tensor("b_dec", "d_in"),
            settings=settings,
        )
        if kind == "JumpReluAutoEncoder":
            parts.threshold, parts.score_scale = trainer.tensor("threshold", "d_sae"), "decoder_norm"
            return parts
        trainer.skip("group_sizes")  # all groups are active once it is trained
        return _batch_topk(trainer, parts)
    subtracted = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    parts = LinearParts(
        W_enc=trainer.tensor("encoder.weight", "d_sae", "d_in"),
        W_dec=trainer.tensor("decoder.weight", "d_in", "d_sae"),
        b_dec=trainer.tensor(subtracted.get(kind, "b_dec"), "d_in"),
        encoder_rows=True,
        decoder_columns=True,
        settings=settings,
    )
    if kind == "GatedAutoEncoder":
        gate = tuple(trainer.tensor(name, "d_sae") for name in ("gate_bias", "mag_bias", "r_mag"))
        parts.gate, parts.score_scale = gate, "decoder_norm"  # type: ignore[assignment]
        return parts
    parts.b_enc = trainer.tensor("encoder.bias", "d_sae")
    if kind == "BatchTopKSAE":
        return _batch_topk(trainer, parts)
    if kind == "AutoEncoderTopK":
        trainer.skip("threshold")  # for another way of encoding than theirs by default
        settings["k"] = _k(trainer)
    return parts


def _batch_topk(trainer: Contents, parts: LinearParts) -> LinearParts:
    parts.threshold, parts.settings["k"] = trainer.tensor("threshold"), _k(trainer)
    return parts


def _k(trainer: Contents) -> int:
    """k, which the state dict and the config must agree on, as their `load_dictionary` asks."""
    said = trainer.setting("k", int, None)
    if not trainer.holds("k"):
        if said is None:
            raise FormatError(f"{trainer.where}: neither the state dict nor {CONFIG} says k")
        return said
    stored = int(trainer.tensor("k").read())
    if said is not None and said != stored:
        raise FormatError(f"{trainer.where}: k is {stored} in the state dict and {said} in {CONFIG}")
    return stored


def _by_tensors(state: Mapping[str, Any], where: str) -> str:
    """The class whose tensors these are, where one class alone has such tensors."""
    shape = getattr(state.get("threshold"), "shape", None)
    if "gate_bias" in state:
        return "GatedAutoEncoder"
    if "group_sizes" in state:
        return "MatryoshkaBatchTopKSAE"
    if "W_enc" in state and isinstance(state.get("threshold"), StoredTensor) and shape is not None and len(shape) == 1:
        return "JumpReluAutoEncoder"
    if "encoder.weight" in state and "bias" in state:
        return "AutoEncoder"
    if "encoder.weight" in state and "decoder.bias" in state:
        return "AutoEncoderNew"
    raise FormatError(
        f"{where}: its tensors do not say which class it is (AutoEncoderTopK and BatchTopKSAE have the same ones): it "
        f"needs the {CONFIG} that dictionary_learning writes beside {WEIGHTS}, whose dict_class says so"
    )


def _site(facts: Mapping[str, Any], name: str) -> str | None:
    """The site, from the layer in the config and the kind of place that the config or the path names."""
    place = str(facts.get("submodule_name") or name)
    kind = next((ours for theirs, ours in KINDS.items() if theirs in place), None)
    layer = facts["layer"] if isinstance(facts.get("layer"), int) else layer_in(name)
    return block_site(layer, kind) if kind is not None and isinstance(layer, int) else None
