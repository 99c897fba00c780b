"""Files of a hub: downloaded one by one into the hub's cache, only from their repository; and uploads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from saehooks.errors import FormatError

FILES = (
    "cfg.json",
    "config.json",
    "hyperparams.json",
    "sae_weights.safetensors",
    "sae.safetensors",
    "params.npz",
    "params.safetensors",
    "ae.pt",
    "weights.pt",
    "checkpoints/final.safetensors",
    "checkpoints/pruned.safetensors",
)
"""What an SAE's folder may hold; nothing else of a repository is fetched."""


def split(hub_id: str, below: str | None = None) -> tuple[str, str]:
    """Repository and folder of an id such as ``"user/name/layers.5"``.

    Raises:
        FormatError: no such id.
    """
    parts = hub_id.split("/")
    if len(parts) < 2 or hub_id.startswith((".", "/", "~")) or not all(parts):
        raise FormatError(
            f"no folder {hub_id!r}; give a folder that holds an SAE, a hub id such as 'user/name', or a release and "
            "its SAE, such as ('gpt2-small-res-jb', 'blocks.8.hook_resid_pre')"
        )
    folder = "/".join([*parts[2:], *([below] if below else [])])
    check_inside(folder, hub_id)
    return "/".join(parts[:2]), folder


def check_inside(path: str, where: str) -> None:
    """Raise FormatError for a path that leads out of its folder."""
    parts = PurePosixPath(path).parts
    if ".." in parts or PurePosixPath(path).is_absolute() or "\\" in path or "\0" in path:
        raise FormatError(f"{path!r} leads out of {where}, which is not followed")


def inside(folder: Path, below: str) -> Path:
    """A place in a folder.

    Raises:
        FormatError: it lies elsewhere, or does not exist.
    """
    check_inside(below, str(folder))
    path = folder / below
    if not path.exists():
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
        raise FormatError(f"no {below!r} in {folder}; it holds {', '.join(found) or 'nothing'}")
    return path


def fetch(repository: str, path: str, revision: str | None = None) -> Path:
    """A folder or a file of a repository, on disk.

    Raises:
        FormatError: the hub did not give it, saying what to do.
    """
    check_inside(path, repository)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FormatError(
            f"no folder '{repository}', and huggingface_hub is not installed to look on the hub: pip install "
            "huggingface_hub"
        ) from error
    is_file = PurePosixPath(path).suffix in (".pt", ".pth", ".npz", ".safetensors", ".gz", ".pkl", ".bin")
    patterns = _file_patterns(path) if is_file else ["/".join(filter(None, [path, name])) for name in FILES]
    try:
        root = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise FormatError(_failed(repository, path, error)) from error
    found = root.joinpath(*PurePosixPath(path).parts)
    if not found.exists():
        raise FormatError(
            f"the repository {repository} holds no {path!r} with an SAE in it; see "
            f"https://huggingface.co/{repository}/tree/{revision or 'main'}"
        )
    return found


def _file_patterns(path: str) -> list[str]:
    """The file, and the configs that may stand beside it."""
    parent = str(PurePosixPath(path).parent)
    beside = [name if parent == "." else f"{parent}/{name}" for name in ("config.json", "cfg.json", "config.yaml")]
    return [path, path.removesuffix(".pt") + "_cfg.json", *beside]


def _failed(repository: str, path: str, error: Exception) -> str:
    """What happened, and what to do."""
    kind, what = type(error).__name__, f"{repository}/{path}".rstrip("/")
    offline = ("LocalEntryNotFound", "OfflineMode", "ConnectionError", "ConnectError", "Timeout")
    if any(word in kind for word in offline):
        return (
            f"no folder {what!r}, and the hub could not be asked ({kind}). Without a network, download it elsewhere "
            f"(huggingface-cli download {repository} --local-dir FOLDER) and write sh.load('FOLDER/{path}')"
        )
    if "GatedRepo" in kind:
        return f"{repository} asks for an agreement first: accept it at https://huggingface.co/{repository}, and log in"
    if "RepositoryNotFound" in kind or "RevisionNotFound" in kind:
        return f"no folder {what!r}, and the hub has no such repository or revision ({error})"
    return f"no folder {what!r}, and the hub did not give it: {error}"


def publish(
    repository: str,
    write: Callable[[Path], None],
    card: str,
    *,
    subfolder: str = "",
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload an SAE",
    token: str | bool | None = None,
) -> str:
    """Upload what ``write`` writes into a folder, and a model card where the repository has none of its own there.

    Returns:
        The address of the commit.
    Raises:
        FormatError: the hub did not take it, saying what to do.
    """
    check_inside(subfolder, repository)
    if len(repository.split("/")) != 2 or not all(repository.split("/")):
        raise FormatError(f"{repository!r} is no repository; write 'user/name'")
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise FormatError("huggingface_hub is not installed: pip install huggingface_hub") from error
    with tempfile.TemporaryDirectory() as room:
        write(Path(room))
        (Path(room) / "README.md").write_text(card, encoding="utf-8")
        api = HfApi(token=token)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            info = api.upload_folder(
                repo_id=repository,
                folder_path=room,
                path_in_repo=subfolder or None,
                revision=revision,
                commit_message=message,
            )
        except Exception as error:
            raise FormatError(
                f"the hub did not take {repository!r}: {error}. Log in with `hf auth login`, or pass token=, with the "
                "right to write there"
            ) from error
    return str(info)


def model_card(config: Mapping[str, Any], repository: str, subfolder: str = "") -> str:
    """A page about an SAE, from its config and metadata.

    Args:
        config: of `saehooks.SAEConfig.to_dict`.
        repository: where it will lie.
        subfolder: in it.
    """
    known = dict(config.get("metadata") or {})
    training, metrics = known.get("training") or {}, known.get("metrics") or {}
    below = f", subfolder={subfolder!r}" if subfolder else ""
    settings = ", ".join(f"{name}={value!r}" for name, value in (config.get("settings") or {}).items())
    about = {
        "model": known.get("model_name"),
        "site": " to ".join(str(known[name]) for name in ("hook_name", "hook_name_out") if known.get(name)) or None,
        "head": known.get("head"),
        "latents": f"{config['d_sae']} of width {config['d_in']}",
        "architecture": f"{config['dictionary']} x {config['activation']}{f' ({settings})' if settings else ''}",
        "processing": ", ".join(f"{k}={v}" for k, v in (known.get("processing") or {}).items()) or None,
    }
    lines = ["---", "library_name: saehooks", "tags:", "- sparse-autoencoder", "- interpretability"]
    if known.get("model_name") and "/" in str(known["model_name"]):
        lines.append(f"base_model: {known['model_name']}")
    lines += ["---", "", f"# {repository.split('/')[-1]}{f', {subfolder}' if subfolder else ''}", ""]
    lines += [
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in about.items() if value is not None),
        "",
    ]
    lines += ["```python", "import saehooks as sh", "", f"sae = sh.load({repository!r}{below})"]
    lines += ["with sh.read(model, sae) as trace:", "    model(tokens)", "```", ""]
    for title, facts in (("Training", training), ("Metrics", metrics)):
        rows = [f"| {name} | {value} |" for name, value in _flat(facts)]
        lines += [f"## {title}", "", "| | |", "|---|---|", *rows, ""] if rows else []
    return "\n".join(lines)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Names and values of nested facts, floats to four digits."""
    found: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            found.append((prefix + str(name), f"{value:.4g}"))
        elif isinstance(value, str | int):
            found.append((prefix + str(name), value))
    return found
