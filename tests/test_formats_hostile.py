"""Files of strangers: what would run, lie about its size, or mean something else than it seems is refused by name."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import pickle
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import saehooks as sh
from saehooks.errors import ConfigError, FormatError, SaehooksError
from saehooks.formats.pickles import read_pickle
from saehooks.sae import SAE, Transcoder
from saehooks.where import where_of

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
import formats_parts as parts
import formats_samples
from formats_parts import BASE, D_IN, D_SAE, K, W, some

SAMPLES = {sample.name: sample for sample in formats_samples.samples()}
PLAIN = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
PLAIN |= {"normalize_activations": "none", "apply_b_dec_to_input": True}


def lens(at, config=None, tensors=None):
    """A folder of SAELens, with some settings and tensors of its own."""
    return parts.folder(PLAIN | (config or {}), some(*BASE) | (tensors or {}), "sae_weights.safetensors")(at)


# ------------------------------------------------------------------------- code


class Runs:
    """A value whose pickle, when it is read as Python does, makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("wrap", ["alone", "in a state dict", "as a config", "as a key"])
@pytest.mark.parametrize("how", ["zip", "before 1.6", "plain", "gzip"])
def test_code_in_a_pickle_does_not_run(how, wrap, tmp_path):
    """However a pickle is packed and wherever the call lies in it."""
    mark, bomb = tmp_path / "ran", Runs(tmp_path / "ran")
    found = {
        "alone": bomb,
        "in a state dict": {**some(*BASE), "W": bomb},
        "as a config": {"cfg": bomb, "state_dict": some(*BASE)},
        "as a key": {(1, bomb): some(*BASE)},
    }[wrap]
    file = tmp_path / ("sae.pkl.gz" if how == "gzip" else "sae.pt")
    if how in ("zip", "before 1.6"):
        torch.save(found, file, _use_new_zipfile_serialization=how == "zip")
    else:
        data = pickle.dumps(found)
        file.write_bytes(gzip.compress(data) if how == "gzip" else data)
    with pytest.raises(FormatError):
        sh.load(file)
    assert not mark.exists()


def test_a_torchscript_archive_is_not_run(tmp_path):
    """An archive of code, which torch.load hands to another loader, is refused for what it is."""
    file = tmp_path / "ae.pt"
    torch.jit.script(torch.nn.Linear(D_IN, D_SAE)).save(str(file))
    with pytest.raises(FormatError, match="TorchScript"):
        sh.load(file)


# ------------------------------------------------------------------ size and time


def nested(times):
    """A pickle, one byte longer for each doubling of the values that it stands for."""
    return b")" + b"2\x86" * times


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04X\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0fabc.",
        b"\x80\x04" + nested(90) + b".",
        b"\x80\x04}(" + nested(90) + b"K\x01u.",
        b"\x80\x04\x8f(" + nested(90) + b"\x90.",
        b"\x80\x04]2a.",
        b"\x80\x04" + b"(" * 5000 + b"t" * 5000 + b".",
    ],
    ids=["text longer than the file", "bytes longer than memory", "doubled", "key", "entry of a set", "circle", "deep"],
)
def test_a_pickle_takes_no_memory_and_no_time_on_its_word(data):
    """Lengths that the file has not, and values that would never be written out."""
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(FormatError):
        read_pickle(io.BytesIO(data), {}, lambda found: found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20
    assert time.perf_counter() - start < 5


def bomb_in_zip(at):
    with zipfile.ZipFile(at / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in {"W_enc": (64, 2**20), "W_dec": (2**20, 64), "b_enc": (2**20,), "b_dec": (64,)}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                for _ in range(int(np.prod(shape)) * 4 // 2**20 + 1):
                    file.write(bytes(2**20))
    return at / "params.npz"


def bomb_in_gzip(at):
    (at / "sae.pkl.gz").write_bytes(gzip.compress(bytes(200 * 2**20), 1))
    return at / "sae.pkl.gz"


def lying_header(at):
    source = lens(at)
    file = source / "sae_weights.safetensors"
    data = file.read_bytes()
    file.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    return source


def lying_shape(at):
    source = lens(at, {"d_sae": 10**12})
    return source


def lying_offsets(at):
    source = lens(at)
    file = source / "sae_weights.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["W_enc"]["shape"], header["W_enc"]["data_offsets"] = [D_IN, 10**11], [0, 4 * D_IN * 10**11]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return source


@pytest.mark.parametrize("write", [bomb_in_zip, bomb_in_gzip, lying_header, lying_shape, lying_offsets])
def test_a_file_takes_no_more_memory_than_it_has(write, tmp_path):
    """Archives that unpack to many times their size, and headers and configs that speak of more than there is."""
    source = write(tmp_path)
    tracemalloc.start()
    with pytest.raises(FormatError):
        sh.load(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


# --------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("d_sae", "24"),
        ("d_sae", True),
        ("d_sae", 24.0),
        ("d_sae", [24]),
        ("apply_b_dec_to_input", "no"),
        ("apply_b_dec_to_input", 1),
        ("normalize_activations", 3),
        ("architecture", ["standard"]),
        ("metadata", []),
        ("hook_name", {"a": 1}),
    ],
)
def test_a_setting_of_another_type_is_named(name, value, tmp_path):
    """No traceback of Python, no value taken for another."""
    with pytest.raises(FormatError, match=name):
        sh.load(lens(tmp_path, {name: value}))


@pytest.mark.parametrize("text", ["[]", "null", "3", '"cfg"', "{", "", "\x00", "[" * 20_000, '{"d_in": NaN}'])
def test_a_config_that_is_none(text, tmp_path):
    """Other JSON, cut off, nested beyond reason."""
    source = lens(tmp_path)
    (source / "cfg.json").write_text(text)
    with pytest.raises(FormatError):
        sh.load(source)


def test_what_is_not_understood_is_named_and_may_be_ignored(tmp_path):
    """A tensor and a setting of a version to come: read only by who says that they change nothing."""
    for config, tensors, name in (({"whitening": "zca"}, {}, "whitening"), ({}, {"W_lora": W["b_enc"]}, "W_lora")):
        source = lens(tmp_path / name, config, tensors)
        with pytest.raises(FormatError, match=name):
            sh.load(source)
        x = torch.randn(4, D_IN)
        assert torch.equal(sh.load(source, ignore=[name])(x).recons, sh.load(lens(tmp_path))(x).recons)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    """Matrices that do not fit each other, numbers that are no numbers."""
    for name, tensor in (("b_enc", W["b_dec"]), ("W_dec", W["W_enc"]), ("b_dec", torch.zeros(D_IN, dtype=torch.int8))):
        with pytest.raises(FormatError, match=name):
            sh.load(lens(tmp_path / name, tensors={name: tensor}))


def test_two_values_of_k_are_refused(tmp_path):
    """dictionary_learning stores k twice."""
    tensors = {"encoder.weight": W["W_enc"].T.contiguous(), "encoder.bias": W["b_enc"], "b_dec": W["b_dec"]}
    tensors |= {"decoder.weight": W["W_dec"].T.contiguous(), "k": torch.tensor(K)}
    for k in (K, K + 1):
        trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": D_IN, "dict_size": D_SAE, "k": k}
        source = parts.pickled(tensors, "ae.pt", {"trainer": trainer})(tmp_path / str(k))
        if k == K:
            assert sh.load(source).cfg.settings["k"] == K
        else:
            with pytest.raises(FormatError, match=f"k is {K} .* and {k} in"):
                sh.load(source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_thresholds_are_those_of_the_file(dtype, tmp_path):
    """A score at the threshold is inactive and the next number above it active, in the file's own precision."""
    threshold = torch.rand(D_SAE).to(dtype)
    tensors = {name: torch.zeros_like(W[name]).to(dtype) for name in BASE} | {"threshold": threshold}
    tensors["b_enc"] = threshold.clone()
    config = {"architecture": "jumprelu", "dtype": str(dtype)[6:]}
    at = sh.load(lens(tmp_path / "at", config, tensors))
    tensors["b_enc"] = torch.nextafter(threshold, torch.ones_like(threshold) * 9)
    above = sh.load(lens(tmp_path / "above", config, tensors))
    x = torch.zeros(1, D_IN, dtype=dtype)
    assert at.encode(x).dense().count_nonzero() == 0
    assert above.encode(x).dense().count_nonzero() == D_SAE


def test_where_an_sae_of_saelens_was_trained_is_where_it_acts(tmp_path):
    """Their slice of positions is the rule that `where=` left out stands for, and is written back."""
    said = {"hook_name": "blocks.0.hook_resid_post"}
    for ends, rule in (([1, None], "all but the first"), ([0, 64], "sh.positions(slice(0, 64))"), ([None], None)):
        sae = sh.load(lens(tmp_path / str(ends), {"metadata": {**said, "seqpos_slice": ends}}))
        assert sae.cfg.metadata.get("training") == (rule and {"positions": rule})
        assert rule is None or str(where_of(sae)) == rule
    sae = sh.load(lens(tmp_path, {"metadata": {**said, "seqpos_slice": [1, None]}}))
    sh.formats.saelens.save(sae, tmp_path / "again")
    assert sh.load(tmp_path / "again").cfg.metadata["training"] == sae.cfg.metadata["training"]


# ------------------------------------------------------------- finished and whole


@pytest.mark.parametrize("name", ["saelens topk", "saelens jumprelu", "openai topk"])
def test_a_loaded_sae_is_never_initialised_again(name, tmp_path):
    """Training goes on from the file's weights, whatever format they came in."""
    names = [one for one in SAMPLES if one.startswith(name.rsplit(" ", 1)[0]) and name.rsplit(" ", 1)[1] in one]
    sae = sh.load(SAMPLES[names[0]].write(tmp_path))
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    trainer = sh.Trainer(sae, sh.TrainConfig(lr=1e-9, batch_size=16, warmup_steps=0))
    trainer.step(100 + 30 * torch.randn(16, D_IN))
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "fill",
    [
        lambda sae, p: p.data.copy_(torch.randn(p.shape)),
        lambda sae, p: setattr(sae.dictionary, "W_dec", torch.nn.Parameter(torch.randn(p.shape))),
        lambda sae, p: sae.load_state_dict({name: t + 1 for name, t in sae.state_dict().items()}),
        lambda sae, p: torch.nn.init.normal_(p),
    ],
    ids=["data", "another parameter", "state dict", "in place"],
)
def test_an_sae_that_was_filled_in_any_way_counts_as_finished(fill):
    """Also after a copy, a cast and a pickle; a new one does not, copied or cast."""
    new, filled = (SAE(D_IN, D_SAE, "linear", "topk", k=K) for _ in range(2))
    fill(filled, filled.dictionary.W_dec)
    for sae, finished in ((new, False), (filled, True)):
        for twin in (sae, copy.deepcopy(sae), copy.deepcopy(sae).bfloat16()):
            assert twin.finished == finished
    assert pickle.loads(pickle.dumps(filled)).finished


def test_a_save_that_is_cut_off_leaves_the_last_one(tmp_path, monkeypatch):
    """The disk is full in the middle of the weights."""
    torch.manual_seed(0)
    first = SAE(D_IN, D_SAE)
    first.save(tmp_path / "sae")

    def full(*_):
        raise OSError(28, "No space left on device")

    second = SAE(D_IN, D_SAE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises((OSError, SaehooksError)):
            second.save(tmp_path / "sae")
    x = torch.randn(3, D_IN)
    assert torch.equal(sh.load(tmp_path / "sae")(x).recons, first(x).recons)
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_loading_costs_little_more_than_reading_the_file(tmp_path):
    """No parameter is made twice, and none is initialised to be overwritten."""
    SAE(512, 8192, "linear", "topk", k=8).save(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))

    def seconds(run):
        times = []
        for _ in range(7):
            start = time.thread_time()
            run()
            times.append(time.thread_time() - start)
        return min(times)

    plain = seconds(lambda: {name: tensor.clone() for name, tensor in load_file(file).items()})
    assert seconds(lambda: sh.load(tmp_path)) < 3 * plain + 0.01


# ------------------------------------------------------------- pieces of transcoders


def test_a_transcoder_is_neither_trained_nor_refined():
    """What compares a reconstruction with its input makes no sense for it."""
    transcoder = Transcoder(D_IN, D_SAE, d_out=6)
    with pytest.raises(ConfigError, match="Transcoder cannot be trained"):
        sh.Trainer(transcoder)
    with pytest.raises(ConfigError, match="refine"):
        Transcoder(D_IN, D_SAE, d_out=6, refine=2)
    for settings in ({"d_out": 6}, {"skip": True}):
        with pytest.raises(ConfigError, match="Transcoder"):
            SAE(D_IN, D_SAE, "linear", "relu", **settings)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm"])
@pytest.mark.parametrize("centred", [True, False])
def test_refinement_aims_at_the_row_in_its_own_units(norm, centred):
    """For codes that reconstruct a row exactly, nothing is missed."""
    torch.manual_seed(0)
    sae = SAE(D_IN, D_SAE, "linear", "topk", k=K, row_norm=norm, apply_b_dec_to_input=centred)
    sae.dictionary.b_dec.data.normal_()
    x = 3 + 5 * torch.randn(6, D_IN)
    prepared = sae.dictionary.prepare(x)
    target = sae.dictionary.target(x, prepared)
    recons = prepared.scale[:, None] * (target + sae.dictionary.b_dec)
    recons = recons if prepared.shift is None else recons + prepared.shift
    torch.testing.assert_close(recons, x, rtol=1e-4, atol=1e-4)


def test_files_of_ours_are_plain_safetensors(tmp_path):
    """Any reader of safetensors opens them; a file that another writer rewrote is read again."""
    sae = SAE(D_IN, D_SAE)
    sae.save(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    assert {tuple(t.shape) for t in tensors.values()} == {
        tuple(t.shape) if not n.endswith("W_enc") else tuple(t.T.shape) for n, t in sae.state_dict().items()
    } or tensors.keys()
    save_file(tensors, tmp_path / "copy.safetensors")
    assert load_file(tmp_path / "copy.safetensors").keys() == tensors.keys()
