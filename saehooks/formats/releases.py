"""SAEs by the names that SAELens' table of releases gives them.

The table, ``pretrained_saes.yaml``, is that of an installed SAELens, which is not imported, or a copy of it. It says in
which repository an SAE lies, by which library it was made, and what its files leave out.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from saehooks.errors import FormatError
from saehooks.formats import openmoss, state_dicts
from saehooks.formats.archives import open_torch_file
from saehooks.formats.opening import Wanted, open_file, open_folder
from saehooks.hub import check_inside
from saehooks.sae import SparseCoder
from saehooks.storage import CONFIG, open_safetensors, read_json

TABLE = "pretrained_saes.yaml"
NOT_READ = {
    "temporal": "a temporal SAE predicts each position from those before it by attention, which is no sparse code of "
    "one activation",
    "mntss_clt_layer_transcoder": "a layer of a cross-layer transcoder writes to all layers behind it; the sum of its "
    "decoders, which SAELens loads, reconstructs nothing",
}
"""Kinds of entries that are neither SAEs nor transcoders of two places."""


@dataclass(frozen=True)
class Release:
    """One SAE of a release."""

    release: str
    sae_id: str
    repository: str
    path: str
    kind: str
    """The name of the loader that SAELens has for it."""
    input_scale: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """They replace what the files say."""


def find(release: str, sae_id: str | None, table: str | Path | None = None) -> Release | None:
    """The entry of a release and an SAE; None where ``release`` is no name of a release.

    Raises:
        FormatError: the release is known and has no such SAE; it names some that it has.
    """
    if release.startswith((".", "/", "~")) or release.count("/") > 1:
        return None
    text = table_text(table)
    entry = None if text is None else _entry(text, release)
    if entry is None:
        if "/" in release or (text is None and sae_id is None):
            return None
        if text is None:
            raise FormatError(
                f"no folder {release!r}. If it is a release of SAELens' table, its names are needed: pip install "
                f"sae-lens, or give a copy of its {TABLE} as table="
            )
        names = re.findall(r"^([\w.\-/]+):", text, flags=re.MULTILINE)
        close = get_close_matches(release, names, n=3)
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
        if sae_id is None and not close:
            return None
        raise FormatError(f"no folder and no release {release!r}{hint}")
    return _chosen(release, entry, sae_id)


def table_text(table: str | Path | None) -> str | None:
    """The table, as text: parsing all of it takes seconds."""
    if table is not None:
        path = Path(table)
        path = path / TABLE if path.is_dir() else path
        if not path.is_file():
            raise FormatError(f"no table of releases at {path}")
        return path.read_text(encoding="utf-8")
    try:
        spec = importlib.util.find_spec("sae_lens")
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    own = next((Path(place, TABLE) for place in places if Path(place, TABLE).is_file()), None)
    return None if own is None else own.read_text(encoding="utf-8")


def _entry(text: str, release: str) -> dict[str, Any] | None:
    """The part of the table that is of one release."""
    found = re.search(
        rf"^{re.escape(release)}:[ \t]*\n((?:[ \t].*\n|[ \t]*\n|- .*\n)*)", text + "\n", flags=re.MULTILINE
    )
    if found is None:
        return None
    try:
        import yaml

        entry = yaml.safe_load(found[1])
    except ImportError as error:
        raise FormatError("reading the table of releases needs pyyaml: pip install pyyaml") from error
    except yaml.YAMLError as error:
        raise FormatError(f"the table's entry of {release!r} is not readable ({error})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("saes"), list) or not entry.get("repo_id"):
        raise FormatError(f"the table's entry of {release!r} does not say where its SAEs are")
    return entry


def _chosen(release: str, entry: dict[str, Any], sae_id: str | None) -> Release:
    saes = {str(one.get("id")): one for one in entry["saes"] if isinstance(one, dict)}
    if sae_id not in saes:
        close = get_close_matches(sae_id or "", saes, n=3) or list(saes)[:3]
        asked = "which SAE is not said" if sae_id is None else f"it has no {sae_id!r}"
        raise FormatError(
            f"release {release!r} has {len(saes)} SAEs, and {asked}; write sh.load({release!r}, {close[0]!r}), or one "
            f"of {', '.join(map(repr, close))}"
        )
    one = saes[str(sae_id)]
    kind = str(entry.get("conversion_func") or "sae_lens")
    if kind in NOT_READ:
        raise FormatError(f"{release!r}, {sae_id!r} is not read: {NOT_READ[kind]}")
    path = str(one.get("path", ""))
    check_inside(path, str(entry["repo_id"]))
    scale = one.get("norm_scaling_factor")
    settings = {name: value for name, value in (entry.get("config_overrides") or {}).items() if value is not None}
    return Release(
        release,
        str(sae_id),
        str(entry["repo_id"]),
        path,
        kind,
        float(scale) if isinstance(scale, int | float) and not isinstance(scale, bool) else None,
        settings,
    )


# --------------------------------------------------------------------- reading


def read(release: Release, path: Path, wanted: Wanted) -> SparseCoder:
    """The SAE or transcoder of an entry, of the files that were fetched for it."""
    reader = KINDS.get(release.kind)
    if reader is not None:
        return reader(path, wanted)
    if release.kind not in BY_CONTENT:
        known = ", ".join(sorted({*KINDS, *BY_CONTENT}))
        raise FormatError(f"{release.release!r} needs the loader {release.kind!r}, which is not known; known: {known}")
    if wanted.input_scale is not None and not _is_scaled(release.kind, path, wanted):
        wanted = replace(wanted, input_scale=None)
    return open_file(path, wanted) if path.is_file() else open_folder(path, wanted)


BY_CONTENT = (
    "sae_lens",
    "gemma_2",
    "gemma_2_transcoder",
    "gemma_3",
    "dictionary_learning_1",
    "sparsify",
    "goodfire",
    "qwen_scope",
    "mwhanna_transcoder",
    "connor_rob_hook_z",
)
"""Kinds whose files say what they are."""


def _is_scaled(kind: str, path: Path, wanted: Wanted) -> bool:
    """Whether the files say that activations were scaled, by a factor that the table gives."""
    if kind != "sae_lens" or not (path / CONFIG).is_file():
        return False
    value = {**read_json(path / CONFIG), **wanted.settings}.get("normalize_activations")
    return value in (True, "expected_average_only_in")


def _deepseek(path: Path, wanted: Wanted) -> SparseCoder:
    return state_dicts.read_linear_layers(open_torch_file(path), str(path), **wanted.common, name=wanted.name)


def _llama_scope(path: Path, wanted: Wanted) -> SparseCoder:
    """The scale stands in the files, but for the distilled ones of R1, where the table gives it."""
    config = next(path / name for name in (openmoss.HYPERPARAMETERS, openmoss.CONFIG) if (path / name).is_file())
    found = read_json(config)
    in_file = openmoss.NORM in found or any(
        key.startswith(openmoss.NORM)
        for name in (openmoss.WEIGHTS, *openmoss.CHECKPOINTS)
        if (path / name).is_file()
        for key in open_safetensors(path / name).tensors
    )
    return openmoss.load(path, **wanted.common, input_scale=None if in_file else wanted.input_scale)


KINDS: dict[str, Callable[[Path, Wanted], SparseCoder]] = {
    "deepseek_r1": _deepseek,
    "llama_scope": _llama_scope,
    "llama_scope_r1_distill": _llama_scope,
}
"""Kinds whose files do not say what they are, or lack what the table has."""
READ = (*KINDS, *BY_CONTENT)
