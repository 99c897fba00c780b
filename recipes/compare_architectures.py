"""Train every architecture of the grid side by side on one stream of activations, and compare.

    python recipes/compare_architectures.py --smoke                 # two minutes, to see it work
    python recipes/compare_architectures.py                         # SmolLM2, d_sae 1536 and 3072
    python recipes/compare_architectures.py --model gpt2 --at blocks.8.hook_resid_pre --d-sae 6144
    python recipes/compare_architectures.py --at blocks.7.hook_resid_post blocks.15.hook_resid_post --seeds 0 1 \
        --rates .5 1 1.5                                            # two sites, two seeds, each arm at its own rate

The model is run over the text once a site; its activations are kept in --out and every preset trains on the same
batches in the same order. Kill it whenever you like: the same command goes on where it was, and the tables are written
again after each site and seed: table.csv, table.md and a comparison.png for each site. One schedule for all; presets
with a k get --k, and the penalties of relu, gated and transformer_relu (their l1) and jumprelu (its l0 target) follow
the same --k by rule. With --rates every arm tries each multiple of --lr, at the first seed and the smallest dictionary,
and keeps the one that is best by token on validation text, beside TopK at its L0.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from compare_table import CURVE, at_same_l0, draw, on_curve, write_tables
from torch import Tensor

import saehooks as sh
from saehooks import presets
from saehooks.demo.open import open_model
from saehooks.metrics import token_nmse
from saehooks.storage import read_safetensors
from saehooks.streams import TokenBatches, harvest
from saehooks.training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from saehooks.training.losses import LossConfig, default_loss
from saehooks.training.trainer import TrainConfig, Trainer
from saehooks.where import past_first

# One line an arm: preset, settings of the SAE ("k" stands for --k), terms of the loss that differ from the preset's.
ARMS = {
    "topk, k/2": ("topk", {"k": 0.5}, {}),
    "topk": ("topk", {"k": 1.0}, {}),
    "topk, 2k": ("topk", {"k": 2.0}, {}),
    "topk, k/2, without aux_k": ("topk", {"k": 0.5}, {"aux_k": 0.0}),
    "batchtopk": ("batchtopk", {"k": 1.0}, {}),
    "mutual_choice": ("mutual_choice", {"k": 1.0}, {}),
    "mutual_choice, k/2": ("mutual_choice", {"k": 0.5}, {}),
    "mutual_choice, k/2, without aux_zipf": ("mutual_choice", {"k": 0.5}, {"aux_zipf": 0.0}),
    "feature_choice": ("feature_choice", {"k": 1.0}, {}),
    "relu": ("relu", {}, {"l1": "matched"}),
    "gated": ("gated", {}, {"l1": "matched"}),
    "jumprelu": ("jumprelu", {"start_l0": 2.0}, {"l0": 1.0, "l0_target": 1.0}),
    "transformer_relu": ("transformer_relu", {}, {"l1": "matched"}),
    "mlp_sparsemax": ("mlp_sparsemax", {}, {}),
    "sparsemax": ("one_pass_sparsemax", {}, {}),
    "entmax 1.5": ("entmax", {}, {}),
    "kron": ("kron", {"k": 1.0}, {}),
    "topk, refined": ("topk", {"k": 1.0, "refine": 1, "refine_rate": 0.3}, {}),
    "topk, chosen twice": ("topk", {"k": 2.0, "reselect": 1.0, "refine": 2, "refine_rate": 0.4}, {"energy": 0.0}),
    "batchtopk, refined": ("batchtopk", {"k": 1.0, "refine": 1, "refine_rate": 0.3}, {}),
    "mutual_choice, refined": ("mutual_choice", {"k": 1.0, "refine": 1, "refine_rate": 0.3}, {}),
    "jumprelu, refined": (
        "jumprelu",
        {"start_l0": 2.0, "refine": 1, "refine_rate": 0.3},
        {"l0": 1.0, "l0_target": 1.0},
    ),
    "kron, refined": ("kron", {"k": 1.0, "refine": 1, "refine_rate": 0.3}, {}),
    "sparsemax, refined": ("one_pass_sparsemax", {"refine": 1, "refine_rate": 0.3}, {}),
    "sparsemax, chosen twice": (
        "sparsemax",
        {"key_scale": 0.8, "value_scale": 1.25, "refine": 2, "refine_method": "gradient"},
        {"energy": 0.0},
    ),
    "sparsemax, chosen twice, wider": ("sparsemax", {"refine": 2, "refine_method": "gradient"}, {"energy": 0.0}),
    "sparsemax, chosen twice, wider, three steps": ("sparsemax", {"refine_method": "gradient"}, {"energy": 0.0}),
    "sparsemax, the default": ("sparsemax", {}, {}),
    "topk, energy": ("topk", {"k": 1.0}, {"energy": 0.02}),
    "topk, chosen twice, energy": ("topk", {"k": 2.0, "reselect": 1.0, "refine": 2, "refine_rate": 0.4}, {}),
}
# An l1 that follows --k: each step times exp(rate * e), e the log of L0 / k that is to be expected a while ahead.
L1_START, L1_RATE, L1_AHEAD = 0.03, 0.03, 60


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or a Hugging Face name")
    parser.add_argument("--at", nargs="+", default=["blocks.15.hook_resid_post"], help="one site or several")
    parser.add_argument("--d-sae", type=int, nargs="+", default=[1536, 3072], help="dictionary sizes")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help="which arms")
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens to train on")
    parser.add_argument("--passes", type=int, default=2, help="how often each activation is used")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=4e-3, help="of 2, 4 and 6e-3 the best for all arms tried")
    parser.add_argument("--rates", type=float, nargs="+", help="multiples of --lr, of which each arm keeps its best")
    parser.add_argument("--k", type=int, default=32, help="latents per token where an arm has such a number")
    parser.add_argument("--eval-tokens", type=int, default=16_384, help="held-out tokens for NMSE and L0")
    parser.add_argument("--ce-tokens", type=int, default=4096, help="of which so many for cross-entropy")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("out/compare"))
    parser.add_argument("--smoke", action="store_true", help="small everything, two minutes")
    chosen = parser.parse_args()
    if chosen.smoke:
        chosen.d_sae, chosen.tokens, chosen.passes, chosen.batch_size = [768], 16_384, 1, 512
        chosen.eval_tokens, chosen.ce_tokens, chosen.out = 2048, 512, Path("out/compare-smoke")
    return chosen


# ------------------------------------------------------------------------- the stream


def stream(options: argparse.Namespace, opened, split: str, tokens: int) -> Tensor:
    """Activations of one split, (n, d_in) float16: harvested once, in parts, so that a killed run goes on."""
    folder = options.out / "stream"
    folder.mkdir(parents=True, exist_ok=True)
    batches = opened.batches(argparse.Namespace(context=256, sequences=8), split, None, None, tokens)
    parts, size = [], 16
    for start in range(0, len(batches), size):
        file = folder / f"{split}-{tokens}-{start:05d}.npy"
        if not file.exists():
            some = list(batches)[start : start + size]
            rows = torch.cat(list(harvest(opened.model, some, options.at))).half().numpy()
            np.save(file.with_suffix(".part.npy"), rows)
            file.with_suffix(".part.npy").rename(file)
            print(f"{split}: {min(start + size, len(batches))} of {len(batches)} batches", flush=True)
        parts.append(torch.from_numpy(np.load(file)))
    return torch.cat(parts)


def batch_of(rows: Tensor, step: int, options: argparse.Namespace) -> Tensor:
    """The batch of a step: each pass is a permutation of its own, the same for every arm."""
    per_pass = len(rows) // options.batch_size
    order = np.random.default_rng((options.seed, step // per_pass)).permutation(len(rows))
    start = step % per_pass * options.batch_size
    return rows[order[start : start + options.batch_size]].float()


# --------------------------------------------------------------------------- the arms


@dataclass
class Arm:
    """One SAE in training."""

    name: str
    d_sae: int
    rate: float
    """Its learning rate, in units of --lr."""
    trainer: Trainer
    folder: Path
    follows_k: bool
    """Whether its l1 coefficient is moved so that L0 nears --k."""

    def step(self, x: Tensor, k: int) -> None:
        loss = self.trainer.step(x)
        if self.follows_k:
            excess = math.log(max(1e-3, float(loss.stages.codes.sizes.double().mean())) / k)
            memory = self.trainer.sae.cfg.metadata  # saved with the checkpoint, so that a killed run goes on alike
            before, slope = memory.get("l1_follows", (excess, 0.0))
            slope += 0.1 * (excess - before - slope)
            memory["l1_follows"] = (excess, slope)
            config = self.trainer.loss_config
            rate = math.exp(L1_RATE * max(-1.0, min(1.0, excess + L1_AHEAD * slope)))
            self.trainer.loss_config = replace(config, l1=config.l1 * rate)


def make_arm(name: str, d_sae: int, rate: float, steps: int, sample: Tensor, options: argparse.Namespace) -> Arm:
    """A new arm for activations like the sample, or one that goes on from its checkpoint."""
    preset, given, terms = ARMS[name]
    in_latents = ("k", "start_l0", "reselect") if "k" in given else ("start_l0",)
    given = {key: round(value * options.k) if key in in_latents else value for key, value in given.items()}
    torch.manual_seed(options.seed)
    sae = presets.PRESETS[preset](sample.shape[1], d_sae, **given)
    follows_k = terms.get("l1") == "matched"
    terms = {**terms, **({"l1": L1_START} if follows_k else {})}
    if "l0_target" in terms:
        terms["l0_target"] *= options.k
    loss = replace(default_loss(sae), dead_after=min(50_000, steps * options.batch_size // 16), **terms)
    lr = options.lr * rate
    config = TrainConfig(lr=lr, batch_size=options.batch_size, steps=steps, seed=options.seed, loss=loss)
    trainer = Trainer(sae, replace(config, buffer_rows=2 * options.batch_size, warmup_steps=min(50, steps // 10)))
    plain = name.replace(" ", "_").replace("/", "").replace(",", "")
    folder = options.out / "arms" / f"{plain}-{d_sae}-seed{options.seed}-x{rate:g}"
    if (folder / CHECKPOINT).exists():
        facts = read_safetensors(folder / CHECKPOINT)[1] or {}
        trainer.loss_config = LossConfig(**facts["config"]["loss"])
        sae.cfg.metadata.update(facts["sae"]["metadata"])
        load_checkpoint(trainer, folder)
    else:
        sae.initialise(sample)
    return Arm(name, d_sae, rate, trainer, folder, follows_k)


def peak_mb(arm: Arm, rows: Tensor, options: argparse.Namespace) -> float:
    """MB by which a process grows, at most, to make this SAE and train two steps; not a number where unknown."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saehooks.presets", "saehooks.training.trainer", "saehooks.kernels.cpu"])
    with context.Pool(1) as pool:
        return pool.apply(probe, (arm.name, arm.d_sae, rows[: options.batch_size].float().numpy(), options))


def probe(name: str, d_sae: int, rows: np.ndarray, options: argparse.Namespace) -> float:
    """The memory of `peak_mb`, in a process of its own."""
    x, elsewhere = torch.from_numpy(rows), changed(options, out=Path("nowhere"))
    make_arm(name, max(128, 2 * options.k), 1.0, 1, x, elsewhere).step(x, options.k)  # loads what code there is
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        arm = make_arm(name, d_sae, 1.0, 2, x, elsewhere)
        for _ in range(2):
            arm.step(x, options.k)
        return memory("VmHWM") - before
    except OSError:
        return math.nan


def memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def train(arms: list[Arm], rows: Tensor, steps: int, options: argparse.Namespace) -> None:
    """All arms through the same batches, checkpoints on the way."""
    started, first = time.perf_counter(), min(arm.trainer.steps for arm in arms)
    for step in range(first, steps):
        x = batch_of(rows, step, options)
        for arm in arms:
            if arm.trainer.steps <= step:
                arm.step(x, options.k)
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == steps:
            for arm in arms:
                save_checkpoint(arm.trainer, arm.folder)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            left = (time.perf_counter() - started) / (step + 1 - first) * (steps - step - 1)
            print(f"step {step + 1} of {steps}, {left / 60:.1f} minutes left", flush=True)


# ------------------------------------------------------------------------- measuring


def held_out(arm: Arm, rows: Tensor) -> dict:
    """NMSE, FVU, L0 with its distribution and dead latents on held-out rows."""
    errors = []
    sae = arm.trainer.sae.frozen()
    with torch.no_grad():
        for part in rows.split(4096):
            errors.append(token_nmse(part.float(), sae(part.float()).recons) * len(part))
    return {**arm.trainer.evaluate(rows.float()), "token_nmse": sum(errors) / len(rows)}


def evaluate(arm: Arm, rows: Tensor) -> dict:
    """Figures of one row of the table: errors on held-out rows, and the cost of a step."""
    found = held_out(arm, rows)
    seconds = arm.trainer.seconds["sae"] + arm.trainer.seconds["optimizer"]
    sae = arm.trainer.sae
    encoder = sum(p.numel() for name, p in sae.dictionary.named_parameters() if name in ("W_enc", "P", "Q", "C", "W_k"))
    return {
        **found,
        "dead_in_training": arm.trainer.dead,
        "dead_share": found["dead"] / arm.d_sae,
        "ms_per_step": 1000 * seconds / max(1, arm.trainer.steps),
        "encode_ms": encode_ms(sae, rows),
        "encoder_parameters": encoder,
        "l1": arm.trainer.loss_config.l1,
        "steps": arm.trainer.steps,
    }


def encode_ms(sae: sh.SAE, rows: Tensor, n: int = 1024) -> float:
    """Milliseconds of one core to encode 1024 rows, the best of five: processor time, so other programs count less."""
    x, times, threads = rows[:n].float(), [], torch.get_num_threads()
    torch.set_num_threads(1)
    frozen = sae.frozen()
    with torch.no_grad():
        for _ in range(5):
            started = time.process_time()
            frozen.encode(x)
            times.append(time.process_time() - started)
    torch.set_num_threads(threads)
    return 1000 * min(times)


# ---------------------------------------------------------------------- all of it


def best_rates(options: argparse.Namespace, rows: Tensor, valid: Tensor, steps: int) -> dict[str, float]:
    """Of --rates, for each arm, the one of the least error by token on validation text, beside TopK's at its L0."""
    file = options.out / "rates.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if all(name in known for name in options.arms):
        return known
    frontier: list[tuple[float, float]] = []
    for name in [*CURVE, *(name for name in options.arms if name not in (*CURVE, *known))]:
        errors, tried = {}, {}
        for rate in options.rates:
            (arm,) = trained([name], min(options.d_sae), {name: rate}, rows, steps, options)
            found = held_out(arm, valid)
            tried[rate] = found["l0"], found["token_nmse"]
            errors[rate] = found["token_nmse"] / (1.0 if name in CURVE else on_curve(found["l0"], frontier))
            print(f"{name}, {rate:g} times --lr: {found['token_nmse']:.4f} @ {found['l0']:.1f}", flush=True)
        known[name] = min(errors, key=errors.__getitem__)
        if name in CURVE:
            frontier = sorted([*frontier, tried[known[name]]])
        file.write_text(json.dumps(known, indent=1))
    return known


def trained(
    names: list[str], d_sae: int, rates: dict[str, float], rows: Tensor, steps: int, options: argparse.Namespace
) -> list[Arm]:
    """These arms, side by side, to the end of their training."""
    sample = batch_of(rows, 0, changed(options, batch_size=min(8192, len(rows))))
    arms = [make_arm(name, d_sae, rates.get(name, 1.0), steps, sample, options) for name in names]
    train(arms, rows, steps, options)
    return arms


def results(opened, options: argparse.Namespace) -> list[dict]:
    """One row of figures for each arm and size, of one site and one seed."""
    rows = stream(options, opened, "train", options.tokens)
    both = stream(options, opened, "eval", 2 * options.eval_tokens)
    eval_rows, valid = both[: len(both) // 2], both[len(both) // 2 :]
    steps = len(rows) // options.batch_size * options.passes
    print(f"{options.at}, seed {options.seed}: {len(rows)} activations, {steps} steps for each arm", flush=True)
    first = changed(options, seed=options.seeds[0])
    rates = best_rates(first, rows, valid, steps) if options.rates else {}
    batches, found = list(eval_batches(opened, options)), []
    for d_sae in options.d_sae:
        for arm in trained(options.arms, d_sae, rates, rows, steps, options):
            file = arm.folder / "result.json"
            if not file.exists():
                peak = peak_mb(arm, eval_rows, options)
                cost = sh.measure(opened.model, arm.trainer.sae, batches, options.at, where=past_first)
                kept = {name: value for name, value in cost.items() if name.startswith("ce_")}
                file.write_text(json.dumps({**kept, "peak_mb": peak, **evaluate(arm, eval_rows)}))
            known = {
                "arm": arm.name,
                "at": options.at,
                "seed": options.seed,
                "d_sae": d_sae,
                "lr": arm.rate * options.lr,
            }
            found.append(known | json.loads(file.read_text()))
            figures = f"NMSE {found[-1]['token_nmse']:.4f} by token  L0 {found[-1]['l0']:.1f}  "
            print(f"{arm.name:32s} {d_sae:6d}  {figures}CE +{found[-1]['ce_degradation']:.4f}", flush=True)
    return found


def main() -> None:
    options = settings()
    options.out.mkdir(parents=True, exist_ok=True)
    opened = open_model(options.model)
    rows: list[dict] = []
    for seed in options.seeds:
        for site in options.at:
            folder = options.out / site
            folder.mkdir(exist_ok=True)
            rows += results(opened, changed(options, at=site, seed=seed, out=folder))
            at_same_l0(rows)
            write_tables(rows, facts(options), options.out)
            for one in options.at:
                if any(row["at"] == one for row in rows):
                    draw([row for row in rows if row["at"] == one], options.out / one / "comparison.png")
            (options.out / "settings.json").write_text(json.dumps(vars(options), indent=2, default=str))
            print(f"wrote {options.out / 'table.md'} and table.csv", flush=True)


def facts(options: argparse.Namespace) -> dict[str, str]:
    """What stands above the table."""
    tried = f"each arm's own of {options.rates} times " if options.rates else ""
    return {
        "model": f"{options.model}, positions 1..",
        "training": f"{options.tokens} tokens, {options.passes} passes, batches of {options.batch_size}, "
        f"Adam lr {tried}{options.lr}, k {options.k}",
        "held out": f"{options.eval_tokens} tokens of the evaluation text; as many that follow choose the rates; "
        f"cross-entropy on {options.ce_tokens} tokens",
        "topk_...": "the same figure for TopK at this row's own L0, from its three arms there",
        "token_nmse": "mean over tokens of squared error over squared norm; nmse is one ratio of sums, so that the few "
        "tokens of huge norm weigh most in it",
        "columns": "dead: latents that fired on none of the held-out tokens; "
        "peak_mb: memory that making the SAE and training two steps takes",
    }


def changed(options: argparse.Namespace, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), **changes})


def eval_batches(opened, options: argparse.Namespace) -> TokenBatches:
    return opened.batches(argparse.Namespace(context=256, sequences=8), "eval", None, None, options.ce_tokens)


if __name__ == "__main__":
    main()
