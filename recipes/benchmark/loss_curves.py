"""Do the fast paths train what plain torch trains? The same steps on both, and how far their losses are apart.

    python recipes/benchmark/loss_curves.py                        # cpu against reference, on SmolLM2, about 5 minutes
    python recipes/benchmark/loss_curves.py --path gpu --steps 500
    python recipes/benchmark/loss_curves.py --path screen --steps 20 --d-sae 24576

Sparsemax over concepts and TopK over a linear dictionary, d_sae 4,608, from one seed, on the same activations of the
packaged text at half depth of SmolLM2, position 0 left out. Once rounding has put one latent on the other side of the
edge of a support, trainings drift apart. So the comparison is plain torch again, on activations of which two in three
were changed by a unit in the last place. ``--path screen`` compares the CPU's kernels with their bfloat16 screen and
without, and says what both cost in this thread's own time.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

import saehooks as sh
from saehooks.demo import smollm2
from saehooks.demo import text as packaged_text
from saehooks.kernels import backend

SITE = "blocks.15.hook_resid_post"
CELLS = {
    "sparsemax, concepts": {},
    "topk 26, linear": {"dictionary": "linear", "activation": "topk", "k": 26},
}


def activations(n: int) -> Tensor:
    """(n, 576) float32, in the order of the text."""
    model, tokenizer = smollm2()
    batches = sh.TokenBatches(tokenizer, packaged_text("train"), batch_size=8, limit=n + n // 100)
    return torch.cat(list(sh.harvest(model, batches, SITE)))[:n]


def losses(path: str, rows: Tensor, d_sae: int, batch_size: int, **settings) -> Tensor:
    """(steps,) float64, the loss of each step of a training that sees each row once, made on one path of kernels."""
    torch.manual_seed(0)
    sae = sh.SAE(rows.shape[1], d_sae, **settings).to(rows.device)
    trainer = sh.Trainer(sae, sh.TrainConfig(batch_size=batch_size, buffer_rows=2 * batch_size, warmup_steps=20))
    sae.initialise(rows)
    backend.FORCED = path
    try:
        return torch.stack([trainer.step(x).total.detach().double() for x in rows.split(batch_size)])
    finally:
        backend.FORCED = None


def compare_screen(rows: Tensor, d_sae: int, batch_size: int) -> None:
    """Print losses and seconds of the same steps, screened and not."""
    from saehooks.kernels.cpu import screen

    torch.set_num_threads(1)  # so that this thread's own time is all
    for name, settings in CELLS.items():
        found: dict[str, tuple[Tensor, float]] = {}
        for mode in ("off", "on"):
            screen.MODE = mode
            losses("cpu", rows[: 2 * batch_size], d_sae, batch_size, **settings)  # compiles
            began = time.thread_time()
            found[mode] = losses("cpu", rows, d_sae, batch_size, **settings), time.thread_time() - began
        (plain, slow), (screened, fast) = found["off"], found["on"]
        print(f"{name}: loss {plain[0]:.4f} to {plain[-1]:.4f} in {len(plain)} steps of {batch_size} x {d_sae}")
        print(f"    screened to not: {differences(screened, plain)}")
        print(f"    last loss {screened[-1] / plain[-1] - 1:+.1e} of the other's, after {fast / slow:.2f} of its time")


def differences(one: Tensor, other: Tensor) -> str:
    """The relative difference of two curves in words."""
    apart = ((one - other).abs() / other).cpu()
    equal = int((apart > 3e-7).cumsum(0).eq(0).sum())
    worst = f"at most {apart.max():.1e} (step {int(apart.argmax()) + 1}), median {apart.median():.1e}"
    return f"below 3e-7 in the first {equal} steps, {worst}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="cpu", choices=["cpu", "gpu", "screen"], help="the path beside the other")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=4608)
    args = parser.parse_args()
    rows = activations(args.steps * args.batch_size).to("cuda" if args.path == "gpu" else "cpu")
    if args.path == "screen":
        compare_screen(rows, args.d_sae, args.batch_size)
        return
    units = torch.randint(-1, 2, rows.shape, generator=torch.Generator().manual_seed(100)).to(rows.device)
    nudged = rows * (1 + torch.finfo(rows.dtype).eps * units)
    for name, settings in CELLS.items():
        plain, fast, other = (
            losses(path, x, args.d_sae, args.batch_size, **settings)
            for path, x in (("reference", rows), (args.path, rows), ("reference", nudged))
        )
        print(f"{name}: loss {plain[0]:.4f} to {plain[-1]:.4f} in {len(plain)} steps; relative differences:")
        print(f"    {args.path} to reference: {differences(fast, plain)}")
        print(f"    reference on nudged activations to reference: {differences(other, plain)}", flush=True)


if __name__ == "__main__":
    main()
