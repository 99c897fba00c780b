"""What is installed: releases, known-bad pairs, the kernels that serve each device and why no better ones, threads."""

from __future__ import annotations

import os
import platform
import warnings
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch

from saehooks import kernels
from saehooks.kernels.memory import FREED_BYTES, keep_freed
from saehooks.known_bad import known_bad

Status = Literal["ok", "note", "wrong"]

PACKAGES = {
    "torch": "",
    "triton": "",
    "numba": "",
    "numpy": "",
    "safetensors": "",
    "huggingface_hub": "",
    "transformer-lens": "lens",
    "transformers": "lens",
    "open_clip_torch": "clip",
    "matplotlib": "plot",
    "gguf": "demo",
}
"""Packages whose releases matter, each with the extra that brings it."""


class Finding(NamedTuple):
    """One line of the table."""

    part: str
    """What it is about: releases, kernels, ..."""
    name: str
    status: Status
    """``"note"`` is worth knowing, ``"wrong"`` makes the exit status 1."""
    detail: str


def environment_findings() -> list[Finding]:
    """Every finding that needs no model."""
    return [*_releases(), *_pairs(), *_kernels(), *_threads()]


def _release(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _releases() -> list[Finding]:
    machine = f"{platform.system()} {platform.machine()}"
    own = _release("saehooks") or "not installed: imported from a folder"
    findings = [
        Finding("releases", "saehooks", "ok", own),
        Finding("releases", "Python", "ok", f"{platform.python_version()} on {machine}"),
    ]
    for package, extra in PACKAGES.items():
        release = _release(package)
        if release is not None:
            findings.append(Finding("releases", package, "ok", release))
        elif extra:
            detail = f'not installed; write: pip install "saehooks[{extra}]"'
            findings.append(Finding("releases", package, "note", detail))
    return findings


def _pairs() -> list[Finding]:
    bad = [Finding("known-bad pairs", " + ".join(pair.packages), "wrong", pair.sentence()) for pair in known_bad()]
    return bad or [Finding("known-bad pairs", "none", "ok", "no releases that are known not to work together")]


def _kernels() -> list[Finding]:
    forced = os.environ.get("SAEHOOKS_KERNELS")
    if forced:
        status: Status = "note" if forced in kernels.BACKENDS else "wrong"
        detail = f"SAEHOOKS_KERNELS={forced} names the kernels of every device; unset it for the fastest"
        return [Finding("kernels", "all devices", status, detail)]
    return [_cpu_kernels(), *_cpu_choices(), *_gpu_kernels()]


def _cpu_kernels() -> Finding:
    slower = "plain torch serves float32 on the CPU, more slowly"
    if find_spec("numba") is None:
        return Finding("kernels", "cpu", "note", f"numba is not installed, so {slower}; write: pip install numba")
    try:
        loops = import_module("saehooks.kernels.cpu.select")
    except Exception as error:  # numba refuses some releases of numpy, with errors of its own
        why = f"numba cannot be imported ({first_line(error)})"
        return Finding("kernels", "cpu", "wrong", f"{why}; write: pip install --upgrade numba")
    folder = _cache_folder(loops)
    if folder is None:
        detail = (
            "compiled by numba anew in every process, which takes up to a minute: no cache folder can be written; "
            "write: export NUMBA_CACHE_DIR=/a/folder/of/yours"
        )
        return Finding("kernels", "cpu", "note", detail)
    return Finding("kernels", "cpu", "ok", f"numba, compiled once and kept in {folder}")


def _cpu_choices() -> list[Finding]:
    try:
        screen = import_module("saehooks.kernels.cpu.screen")
    except Exception:  # `_cpu_kernels` says so
        return []
    memory = "freed memory is given back as the C library, or this environment's MALLOC_ variables, have it"
    if keep_freed():
        memory = f"glibc keeps {FREED_BYTES >> 20} MB of freed memory for later; a MALLOC_ variable overrules it"
    return [
        Finding("kernels", "cpu screen", "ok", f"selection through bfloat16 products: {screen.describe()}"),
        Finding("kernels", "cpu memory", "ok", memory),
    ]


def _cache_folder(loops: Any) -> str | None:
    """Where numba keeps what it compiled of a module; None if it cannot."""
    folders = (getattr(getattr(one, "stats", None), "cache_path", None) for one in vars(loops).values())
    return next((folder for folder in folders if isinstance(folder, str)), None)


def _gpu_kernels() -> list[Finding]:
    if not torch.cuda.is_available():
        built = "no GPU that torch can use" if torch.version.cuda else "torch is built without CUDA"
        return [Finding("kernels", "gpu", "ok", f"none: {built}")]
    findings = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {torch.cuda.get_device_capability(device)}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_module("saehooks.kernels.gpu").probe(device)
        except Exception as error:  # no Triton, an old one, an old GPU, no C compiler: whatever keeps them from running
            detail = f"plain torch on {name}, more slowly: {first_line(error)}; write: pip install --upgrade triton"
            findings.append(Finding("kernels", str(device), "note", detail))
        else:
            findings.append(Finding("kernels", str(device), "ok", f"Triton on {name}"))
    return findings


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _threads() -> list[Finding]:
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"torch uses {threads} of {cores} cores"
    limits = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    if limits:
        detail += f" ({', '.join(limits)})"
    return [Finding("threads", "torch", "note" if threads > cores else "ok", detail)]
