"""What every latent of the packaged SAEs stands for: a survey and its page.

    python recipes/latents.py                                  # SmolLM2, 49,152 tokens of Wikipedia
    python recipes/latents.py --model tinyclip                 # the small CLIP, 700 photos
    python recipes/latents.py --text wikipedia.txt --tokens 1000000 --folder out/index --resume

Writes results/latents_<model>.html, and the index itself where ``--folder`` says.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import saehooks as sh
from saehooks.demo import packaged_sae, photos, small_clip, smollm2, text
from saehooks.streams import read_text

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "tinyclip"), default="smollm2")
    parser.add_argument("--sae", type=Path, help="by default the packaged one")
    parser.add_argument("--text", type=Path, help="by default the packaged slice of Wikipedia")
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--contexts", type=int, default=5, help="strongest contexts of each latent on the page")
    parser.add_argument("--sampled", type=int, default=4, help="contexts drawn at random on the page")
    parser.add_argument("--folder", type=Path, help="where to save the index")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted survey in --folder")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sae = sh.load(args.sae) if args.sae else packaged_sae(args.model)
    labels = None
    if args.model == "smollm2":
        model, tokenizer = smollm2()
        words = read_text([args.text]) if args.text else text("train")
        batches = sh.TokenBatches(tokenizer, words, context=128, batch_size=8, limit=args.tokens)
    else:
        model, preprocess, _ = small_clip()
        shots = [photos("train"), photos("test")]
        batches = sh.ImageBatches(preprocess, np.concatenate([part.images for part in shots]))
        labels = [part.class_names[int(label)] for part in shots for label in part.labels]
    start = time.perf_counter()
    index = sh.survey(model, sae, batches, labels=labels, folder=args.folder, resume=args.resume)
    print(index, f"\nin {time.perf_counter() - start:.0f} s")
    out = args.out or RESULTS / f"latents_{args.model}.html"
    index.page(out, title=f"Latents of {args.model}", contexts=args.contexts, sampled=args.sampled)
    print(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
