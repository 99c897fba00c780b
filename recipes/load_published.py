"""Load a checkpoint of the Sparsemax SAE's authors, look at it on a few inputs, and keep it as a folder of ours.

    python recipes/load_published.py --demo                                  # builds such a file first: no download
    python recipes/load_published.py sae.pt --out saes/published --at visual.blocks.10.hook_resid_post

The file is a pickle; it is read without running anything in it (see `saehooks.formats.pickles`). Saved again as a
folder of `cfg.json` and safetensors it needs no pickle any more, and works with every verb:
`with sh.read(clip, sh.load("saes/published")) as trace: ...`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from saehooks.formats import sparsemax_sae
from saehooks.metrics import l0


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="the authors' .pt, .pkl or .pkl.gz")
    parser.add_argument("--demo", action="store_true", help="write a small file in their format and load that")
    parser.add_argument("--at", help="the site it was trained on; CLIP checkpoints know theirs")
    parser.add_argument("--out", type=Path, help="folder to save it to")
    chosen = parser.parse_args()
    if chosen.demo == (chosen.file is not None):
        parser.error("give a file, or --demo")
    return chosen


def write_demo(path: Path) -> Path:
    """A file as the authors' `save_model` writes it: CLIP ViT-B/16 width, random tables, unused weights."""
    torch.manual_seed(0)
    d_in, d_sae = 768, 6144
    state = {
        "concept": torch.randn(d_sae, d_in) / d_in**0.5,
        "k": torch.eye(d_in) + torch.randn(d_in, d_in) / 30,
        "v": torch.eye(d_in) + torch.randn(d_in, d_in) / 30,
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_in),
        "log_threshold": torch.tensor(0.0),
    }
    cfg = {"d_in": d_in, "model_name": "openai/clip-vit-base-patch16", "module_name": "resid", "block_layer": 10}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"cfg": cfg, "state_dict": state}, path)
    return path


def main() -> None:
    options = settings()
    file = write_demo(Path("out/published/demo.pt")) if options.demo else options.file
    sae = sparsemax_sae.load(file, hook_name=options.at)
    print(sae)
    print("the authors' settings:", sae.cfg.metadata["source"]["cfg"])
    with torch.no_grad():
        recons, codes = sae(torch.randn(64, sae.d_in))
    print(f"on random directions: {codes}, support sizes (5/50/95%) {l0(codes)}")
    print(f"norm of the reconstructions: {float(recons.norm(dim=1).mean()):.2f} of {sae.d_in**0.5:.2f}")
    if options.out or options.demo:
        folder = options.out or Path("out/published/folder")
        sae.save(folder)
        print(f"saved {folder}; from now on: sh.load({str(folder)!r})")


if __name__ == "__main__":
    main()
