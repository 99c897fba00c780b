"""What `sh.load` reads: every format against its library's numbers, and how much of SAELens' table of releases that is.

    python recipes/formats_table.py                                  # against the formulas of formats_samples.py
    python recipes/formats_table.py --table pretrained_saes.yaml     # and the share of a copy of SAELens' table
    recipes/benchmark/peers_env && .venv-peers/bin/python recipes/formats_table.py    # and against SAELens itself

The last way needs no network: SAELens' own loaders are given the same small files in place of the hub's.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from formats_samples import D_IN, Sample, samples
from torch import Tensor

import saehooks as sh
from saehooks.formats import releases

OUT = Path(__file__).parent / "results" / "formats_table.md"
LOADERS = {
    "gemma scope": ("gemma_2", "google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_9"),
    "gemma scope, embedding": ("gemma_2", "google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"),
    "gemma scope transcoder": (
        "gemma_2_transcoder",
        "google/gemma-scope-2b-pt-transcoders",
        "layer_3/width_16k/average_l0_9",
    ),
    "llama scope": ("llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x", "."),
    "llama scope r1": ("llama_scope_r1_distill", "fnlp/Llama-Scope-R1-Distill", "."),
    "dictionary_learning AutoEncoder": ("dictionary_learning_1", "canrager/lm_sae", "."),
    "dictionary_learning topk": ("dictionary_learning_1", "canrager/lm_sae", "."),
    "dictionary_learning batchtopk": ("dictionary_learning_1", "canrager/lm_sae", "."),
    "dictionary_learning matryoshka": ("dictionary_learning_1", "canrager/lm_sae", "."),
    "goodfire": ("goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"),
}
"""Which of SAELens' loaders for the hub is for a sample that no folder of SAELens is."""


ABOUT = """Largest difference of codes and reconstructions, in units of the largest, on small random files as each
library writes them. "To SAELens" is to SAELens' own loader of the same files, where it has one; it leaves the norm of
decoder rows out of the thresholds of Llama Scope, which OpenMOSS' code does not (rows whose norm is not 1 show it)."""

BY_LOADER = """Counted by the loader that SAELens has for each release: the files themselves were not fetched."""


def rows() -> Tensor:
    return 1.5 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(7))


def distance(got: Tensor, right: Tensor) -> float:
    """Largest difference, in units of the largest right value."""
    return float((got - right).abs().max() / right.abs().max())


def by_formula(sample: Sample, at: Path) -> tuple[float, Any]:
    """Difference to the library's formula, of codes and reconstructions; and what was loaded."""
    source, x = sample.write(at), rows()
    sae = sh.load(source)
    codes, recons = sample.formula(x)
    with torch.no_grad():
        out = sae(x)
    apart = distance(out.recons, recons)
    return apart if codes is None else max(apart, distance(out.codes.dense(), codes)), sae


# --------------------------------------------------------------------- SAELens


def saelens_reader() -> Callable[[Sample, Path], float | str] | None:
    """Difference to what SAELens computes of a sample; None where it is not installed."""
    if importlib.util.find_spec("sae_lens") is None:
        return None
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def peer_of(sample: Sample, source: Path) -> Any:
        if sample.name.startswith("saelens"):
            return SAE.load_from_disk(str(source))
        kind, repository, folder = LOADERS[sample.name]
        base = source.parent if source.is_file() else source

        def fetch(repo_id: str, filename: str = "", subfolder: str = "", **_: Any) -> str:
            wanted = Path(subfolder, filename)
            inside = wanted.relative_to(folder) if not source.is_file() else wanted
            return str(base / inside)

        overrides = {"d_in": D_IN, "d_sae": 24, "dtype": "float32", "device": "cpu"}
        overrides |= {"d_out": D_IN} if "transcoder" in kind else {}
        with mock.patch.object(loaders, "hf_hub_download", fetch):
            found, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[kind](repository, folder, "cpu", False, overrides)
        found = loaders.handle_config_defaulting(found)
        peer = SAE.from_dict(found)
        peer.process_state_dict_for_loading(state)
        peer.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        if kind.startswith("llama_scope"):
            peer.fold_activation_norm_scaling_factor(D_IN**0.5 / 6.3125)
        return peer

    def difference(sample: Sample, source: Path) -> float | str:
        if not sample.name.startswith("saelens") and sample.name not in LOADERS:
            return ""
        x, ours = rows(), sh.load(source)
        try:
            peer = peer_of(sample, source)
        except Exception as error:  # what it does not read is what the table shows
            return f"not read ({type(error).__name__})"
        with torch.no_grad():
            codes, recons, out = peer.encode(x), peer(x), ours(x)
        codes = codes.to_dense() if codes.is_sparse else codes
        seen = out.codes.dense()
        return max(distance(out.recons, recons), distance(seen, codes) if codes.abs().max() else 0.0)

    return difference


# ----------------------------------------------------------------- the releases


def coverage(table: Path | None) -> list[tuple[str, int, int, str]]:
    """For each kind of loader in SAELens' table: releases, SAEs, and why they are not read (empty where they are)."""
    text = releases.table_text(table)
    if text is None:
        return []
    import yaml

    found = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for entry in found.values():
        kind = str(entry.get("conversion_func") or "sae_lens")
        for one in entry["saes"]:
            why = releases.NOT_READ.get(kind, "" if kind in releases.READ else "its loader is not known")
            if not why and kind == "gemma_3" and "clt" in str(one.get("path")):
                why = releases.NOT_READ["mntss_clt_layer_transcoder"]
            counts[kind, why][1] += 1
        counts[kind, why][0] += 1
    return [(kind, *numbers, why) for (kind, why), numbers in sorted(counts.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="a copy of SAELens' pretrained_saes.yaml")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = [
        "# What sh.load reads",
        "",
        "Largest difference of codes and reconstructions, in units of the largest.",
        "",
    ]
    lines += ["| format | read as | to its formula | to SAELens |", "|---|---|---|---|"]
    peer = saelens_reader()
    for sample in samples():
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            apart, sae = by_formula(sample, Path(one))
            theirs = peer(sample, sample.write(Path(two))) if peer else ""
        shown = f"{theirs:.0e}" if isinstance(theirs, float) else theirs
        lines.append(f"| {sample.name} | {type(sae).__name__}, {sae.cfg.activation} | {apart:.0e} | {shown} |")
    found = coverage(options.table)
    if found:
        lines += ["", "## SAELens' table of releases", "", "| loader | releases | SAEs | |", "|---|---|---|---|"]
        lines += [
            f"| {kind} | {n} | {saes} | {(why and 'refused: ' + why) or 'read'} |" for kind, n, saes, why in found
        ]
        read = sum(saes for _, _, saes, why in found if not why)
        whole = sum(saes for *_, saes, _ in found)
        lines += ["", f"Read: {read} of {whole} SAEs, {read / whole:.1%}; the rest are neither SAEs nor transcoders."]
    text = "\n".join(lines) + "\n"
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
