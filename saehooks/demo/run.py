"""The demo: the whole library at work on two real models, ending in one HTML page."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from saehooks.demo.data import ASSETS
from saehooks.demo.language import Budget, Language
from saehooks.demo.models import small_clip, smollm2
from saehooks.demo.report import Report
from saehooks.demo.vision import PICTURED, Vision
from saehooks.errors import ConfigError, FormatError
from saehooks.formats import load
from saehooks.sae import SAE

SAE_FOLDER, CLIP_SAE_FOLDER = ASSETS / "sae-smollm2-l15", ASSETS / "sae-tinyclip-l4"
NEEDED = ("transformer_lens", "transformers", "open_clip", "matplotlib", "gguf")
LEAD = (
    "Every number and picture on this page was made when the page was written, on the machine that wrote it, by SAEs "
    "attached to real models with a `with`-block. The language model is SmolLM2-135M-Instruct."
)


def run(
    out: str | Path = "out/demo.html",
    *,
    sae: str | Path | None = None,
    clip_sae: str | Path | None = None,
    budget: Budget | None = None,
    console: Console | None = None,
) -> Path:
    """Run the demo and write its page.

    Args:
        out: the HTML file to write.
        sae, clip_sae: folders of other SAEs than the packaged ones.
        budget: how much to do.
        console: where to print.
    Returns:
        The file written.
    Raises:
        ConfigError: a package of the extra ``demo`` is not installed.
        FormatError: the language model's wheel is not installed, or an SAE cannot be read.
    """
    _require()
    report, budget = Report(console), budget or Budget()
    with warnings.catch_warnings():  # of other libraries; our own stay
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"saehooks\..*")
        return _run(report, budget, Path(out), sae, clip_sae)


def _require() -> None:
    """Name what is not installed, before anything is loaded."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f'the demo needs {", ".join(missing)}; write: pip install "saehooks[demo]"')


def _run(report: Report, budget: Budget, out: Path, sae: str | Path | None, clip_sae: str | Path | None) -> Path:
    report.console.print("[bold]saehooks demo[/]: loading SmolLM2-135M-Instruct and a small CLIP")
    language_sae, vision_sae = _load(sae or SAE_FOLDER), _load(clip_sae or CLIP_SAE_FOLDER)
    model, tokenizer = smollm2()
    clip, preprocess, clip_tokenizer = small_clip()
    for part in (model, clip):  # attribution needs gradients at latents, not at the model's weights
        part.requires_grad_(False)
    report.console.print(f"{language_sae}\n{vision_sae}")
    language = Language(model, tokenizer, language_sae, report, budget)
    language.support_sizes()
    language.degradation()
    index = language.index()
    language.ablation(index)
    language.steering(index)
    language.training()
    pictured = PICTURED if clip_sae is None else ()
    Vision(clip, preprocess, clip_tokenizer, vision_sae, report, budget, pictured).run()
    _origin(report, {"SmolLM2": language_sae, "small CLIP": vision_sae})
    return report.write(out, "saehooks at work", LEAD)


def _load(folder: str | Path) -> SAE:
    if not Path(folder).is_dir():
        raise FormatError(f"the demo's SAE is not at {folder}; train one with 'saehooks fit' and give it with --sae")
    found = load(folder).eval()
    if not isinstance(found, SAE):
        raise FormatError(f"the demo needs an SAE, and {folder} holds a {type(found).__name__.lower()}")
    return found


def _origin(report: Report, saes: dict[str, SAE]) -> None:
    """Where the SAEs come from."""
    report.begin("Where the SAEs come from", "What their folders say of themselves (`saehooks info FOLDER`).")
    rows: list[dict[str, Any]] = []
    for name, sae in saes.items():
        training = sae.cfg.metadata.get("training", {})
        rows.append(
            {
                "model": name,
                "site": sae.hook_name,
                "kind": f"{sae.cfg.activation} over {sae.cfg.dictionary}",
                "d_in": sae.d_in,
                "d_sae": sae.d_sae,
                "steps": training.get("steps"),
                "activations": training.get("rows"),
            }
        )
    report.table(rows)
