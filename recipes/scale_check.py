"""Do several processes train the SAE that one process trains? Every cell of the grid, 200 steps, on 1, 2 and 4 ranks.

    python recipes/scale_check.py                      # all parts; writes recipes/results/scale_check.md
    python recipes/scale_check.py --part checkpoints   # one of: grid, bytes, checkpoints, kills
    python recipes/scale_check.py --part grid --cells "linear topk" --grids "2 by latents" --steps 20

- grid: each cell with 2 and 4 ranks that split the rows, and with 2 and 4 that split the latents. Losses against those
  of one process, from the same start on the same rows; and those of one process whose rows were all changed in their
  last bit, which says how far rounding alone carries a cell. With --keep what was found is not run again.
- bytes: what a rank gave to collectives in a step, counted, and by arithmetic.
- checkpoints: written by n ranks and gone on with by m, for n and m in 1, 2 and 4.
- kills: two ranks, one of them killed (SIGKILL) at ten random moments; the restarted training against one that was
  never killed.

Ranks are processes of this machine that talk over gloo. SAEs are tiny (width 16, 64 latents): what is compared is
arithmetic, not speed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import saehooks as sh
from saehooks.dictionaries import DICTIONARIES
from saehooks.training.losses import LossConfig

RESULTS = Path(__file__).parent / "results" / "scale_check.md"
D_IN, D_SAE, BATCH, STEPS, EVERY = 16, 64, 64, 200, 20
SETTINGS: dict[str, dict] = {
    "relu": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "mutual_choice": {"k": 4},
    "feature_choice": {"k": 4},
    "sparsemax": {},
    "entmax": {},
}
NUDGED = "1, rows nudged"
GRIDS = {"2 by rows": (2, 1), "4 by rows": (4, 1), "2 by latents": (2, 2), "4 by latents": (4, 4)}
STEADY = 1e-6
"""Of the loss, relative: what a nudge of the rows may change where no choice of latents changes."""
LAST = 80
"""Step at which the trainings of the parts "checkpoints" and "kills" end."""


def cells() -> dict[str, dict]:
    """Every dictionary times every activation, and settings that look at all latents of a token."""
    found = {
        f"{dictionary} {activation}": {"dictionary": dictionary, "activation": activation, **settings}
        for dictionary in DICTIONARIES
        for activation, settings in SETTINGS.items()
    }
    sparsemax = {"dictionary": "concepts", "activation": "sparsemax"}
    found["concepts sparsemax, weights"] = {**sparsemax, "values": "weight"}
    found["concepts sparsemax, refine=1"] = {**sparsemax, "refine": 1}
    learned = {"activation": "entmax", "learn_alpha": True, "values": "weight"}
    found["concepts entmax, learned alpha"] = {"dictionary": "concepts", **learned}
    found["linear topk, refine=1"] = {"dictionary": "linear", "activation": "topk", "k": 4, "refine": 1}
    found["linear topk of magnitudes"] = {
        "dictionary": "linear",
        "activation": "topk",
        "k": 4,
        "negative": "magnitude",
    }
    found["linear jumprelu, start_l0=6"] = {"dictionary": "linear", "activation": "jumprelu", "start_l0": 6}
    return found


def rows(count: int = 8192) -> torch.Tensor:
    """(count, D_IN) sparse mixtures of 48 directions, with a mean and some noise."""
    draw = torch.Generator().manual_seed(7)
    directions = torch.nn.functional.normalize(torch.randn(48, D_IN, generator=draw), dim=1)
    weights = torch.rand(count, 48, generator=draw) * (torch.rand(count, 48, generator=draw) < 0.08)
    return weights @ directions + 0.02 * torch.randn(count, D_IN, generator=draw) + 0.3


def nudged(rows: torch.Tensor) -> torch.Tensor:
    """Every value changed in its last bit, up or down at random."""
    up = torch.rand(rows.shape, generator=torch.Generator().manual_seed(8)) < 0.5
    return torch.nextafter(rows, torch.where(up, torch.inf, -torch.inf))


def made(settings: dict, seed: int) -> sh.SAE:
    torch.manual_seed(seed)
    return sh.SAE(D_IN, D_SAE, **settings)


def training(steps: int) -> dict:
    plain = {"batch_size": BATCH, "buffer_rows": 512, "warmup_steps": 20, "dead_after": 500, "progress": False}
    return {**plain, "steps": steps, "log_every": EVERY}


# ------------------------------------------------------------------- processes


def work(task: dict, rank: int, options: dict) -> dict:
    """What one rank does and keeps: the trainings of all cells, or one that writes checkpoints."""
    if task["kind"] == "train":
        torch.manual_seed(rank)
        sae = made(cells()["concepts sparsemax"], rank)
        settings = {**training(LAST), "checkpoint_every": 3, "passes": 1, **task.get("settings", {})}
        trainer = sh.fit(list(rows().split(128)), sae, out=task["out"], resume=True, **settings, **options)
        return {"state": sae.state_dict(), "history": trainer.history}
    kept, given = {}, nudged(rows()) if task.get("nudged") else rows()
    for name in task["cells"]:
        sae, steps = made(cells()[name], rank), task["steps"]
        loss = LossConfig() if task["kind"] == "bytes" else None
        settings = {**training(steps), **({"loss": loss} if loss else {})}
        if task["kind"] == "bytes":
            settings["log_every"] = 10**6
        trainer = sh.fit(given, sae, **settings, **options)
        ranks = trainer.ranks
        kept[name] = {
            "history": trainer.history,
            "state": {key: value.clone() for key, value in sae.state_dict().items()},
            "sent": ranks.sent,
            "newton": getattr(ranks, "newton_steps", 0),
        }
    return kept


def worker(task: dict, rank: int) -> None:
    """One rank, started by `start`."""
    os.dup2(os.open(Path(task["folder"], f"said.{rank}"), os.O_WRONLY | os.O_CREAT), 2)
    options = {} if task["latents"] == 1 else {"latent_ranks": task["latents"]}
    if task["ranks"] > 1:
        store = f"file://{task['folder']}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=task["ranks"])
    torch.save(work(task, rank, options), Path(task["folder"], f"kept.{rank}"))


def start(task: dict) -> list[BaseProcess]:
    """All ranks of a task, forks of this process, which has imported everything and started no thread."""
    processes = [get_context("fork").Process(target=worker, args=(task, rank)) for rank in range(task["ranks"])]
    for process in processes:
        process.start()
    return processes


def run(**task) -> list[dict]:
    """What every rank kept."""
    with tempfile.TemporaryDirectory() as folder:
        task = {"folder": folder, "latents": 1, **task}
        processes = start(task)
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("\n".join(said(folder, rank) for rank in range(task["ranks"])))
        return [torch.load(Path(folder, f"kept.{rank}")) for rank in range(task["ranks"])]


def said(folder: str | Path, rank: int) -> str:
    """What a rank wrote to its standard error."""
    return Path(folder, f"said.{rank}").read_text()


# ----------------------------------------------------------------------- parts


def worst(one: dict, other: dict) -> tuple[float, float]:
    """Largest relative difference of a loss, and of a weight in units of the largest of its tensor."""
    pairs = zip(one["history"], other["history"], strict=True)
    loss = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in pairs)
    weights = 0.0
    for name, value in one["state"].items():
        if value.is_floating_point():
            largest = value.double().abs().max().clamp(min=1e-30)
            weights = max(weights, float((value.double() - other["state"][name].double()).abs().max() / largest))
    return loss, weights


def grid(
    names: list[str] | None = None, steps: int = STEPS, grids: list[str] | None = None, keep: Path | None = None
) -> list[str]:
    """Losses of cells on grids against one process; of all, if none are named."""
    names, grids = names or list(cells()), [*(grids or GRIDS), NUDGED]
    found = json.loads(keep.read_text()) if keep and keep.exists() else {}
    for name in names:
        missing = [grid_name for grid_name in grids if f"{name}; {steps}; {grid_name}" not in found]
        if not missing:
            continue
        (alone,) = run(kind="grid", cells=[name], steps=steps, ranks=1)
        found[f"{name}; {steps}"] = alone[name]["history"][-1]["loss"]
        for grid_name in missing:
            ranks, latents = GRIDS.get(grid_name, (1, 1))
            kept = run(kind="grid", cells=[name], steps=steps, ranks=ranks, latents=latents, nudged=grid_name == NUDGED)
            each = [worst(alone[name], one[name]) for one in kept]
            found[f"{name}; {steps}; {grid_name}"] = [max(values) for values in zip(*each, strict=True)]
            if keep:
                keep.write_text(json.dumps(found, indent=1))
        print(name, "done", flush=True)
    return grid_table(names, steps, grids, found)


def grid_table(names: list[str], steps: int, grids: list[str], found: dict) -> list[str]:
    """A line for each cell."""
    lines = [
        f"## {steps} steps on several ranks against one process",
        "",
        f"Largest relative difference of the loss, over the records of every {EVERY} steps and all ranks (float32; in "
        "brackets: of a weight at the end, in units of the largest weight of its tensor). The last column is one "
        "process, all of whose rows were changed in their last bit.",
        "",
        f"| cell | loss at step {steps} | " + " | ".join(grids) + " |",
        "|---|---|" + "---|" * len(grids),
    ]
    for name in names:
        each = (found.get(f"{name}; {steps}; {one}") for one in grids)
        shown = (f"{one[0]:.0e} ({one[1]:.0e})" if one else "not run" for one in each)
        lines.append(f"| {name} | {found[f'{name}; {steps}']:.4f} | " + " | ".join(shown) + " |")
    figures = {name: [found.get(f"{name}; {steps}; {one}") for one in grids if one != NUDGED] for name in names}
    largest = {name: max(one[0] for one in each if one) for name, each in figures.items()}
    rounding = {name: found[f"{name}; {steps}; {NUDGED}"][0] for name in names}
    steady = [name for name in names if rounding[name] < STEADY]
    lines += [
        "",
        f"In {len(steady)} of {len(names)} cells rounding stays rounding (a nudge moves the loss by less than "
        f"{STEADY:.0e}): several ranks differ from one by {max(map(largest.get, steady), default=0):.1e} at most. "
        "In the others training itself makes more of it: a nudge of the rows of one process moves the loss as well. "
        "Ranks, at most, and the nudge: "
        + (", ".join(f"{largest[n]:.0e} and {rounding[n]:.0e} ({n})" for n in names if n not in steady) or "nowhere")
        + ".",
    ]
    return lines


def bytes_by_hand(name: str, ranks: int, latents: int, newton: float) -> float:
    """Bytes that a rank gives to collectives in a step, from shapes alone (no loss but the reconstruction)."""
    settings = cells()[name]
    own = BATCH // (ranks // latents)
    flag = 4.0
    if latents == 1:
        numbers = {"concepts": D_SAE * D_IN + 2 * D_IN * D_IN + D_IN, "linear": 2 * D_SAE * D_IN + D_SAE + D_IN}
        sent = numbers[settings["dictionary"]] * 4 + 8 * D_SAE + flag  # gradients; since when latents did not fire
    else:
        sent = 2 * own * D_IN * 4 + flag  # the reconstruction, and the queries' gradient
        if settings["activation"] == "topk":
            sent += own * settings["k"] * 4
        if settings["activation"] == "sparsemax":
            sent += own * 8 + newton * own * 16
    return sent + (BATCH * settings["k"] * 4 if settings["activation"] == "batchtopk" else 0)


def counted() -> list[str]:
    """Bytes of a step, counted and by hand."""
    names = ["concepts sparsemax", "linear topk", "linear batchtopk"]
    lines = [
        "## Bytes that a rank gives to collectives in a step",
        "",
        f"Width {D_IN}, {D_SAE} latents, {BATCH} rows, the reconstruction as the only loss. The arithmetic counts the "
        "Newton steps that thresholds took (one all-reduce of two float64 sums for each row).",
        "",
        "| cell | ranks | counted | by arithmetic | Newton steps |",
        "|---|---|---|---|---|",
    ]
    for grid_name, (ranks, latents) in GRIDS.items():
        few, many = (run(kind="bytes", cells=names, steps=n, ranks=ranks, latents=latents)[0] for n in (10, 30))
        for name in names:
            sent = (many[name]["sent"] - few[name]["sent"]) / 20
            newton = (many[name]["newton"] - few[name]["newton"]) / 20
            wanted = bytes_by_hand(name, ranks, latents, newton)
            if abs(sent - wanted) > 1e-6:
                raise SystemExit(f"{name}, {grid_name}: {sent} bytes were sent, the arithmetic says {wanted}")
            steps = f"{newton:.2f}" if latents > 1 else "-"
            lines.append(f"| {name} | {grid_name} | {sent:,.0f} | {wanted:,.0f} | {steps} |")
    return lines


def same(one: dict, other: dict) -> str:
    """How two trainings differ, in words."""
    states = one["state"], other["state"]
    if all(torch.equal(states[0][name], states[1][name]) for name in states[0]):
        return "bit for bit"
    return "loss {:.0e}, weights {:.0e}".format(*worst(one, other))


def checkpoints() -> list[str]:
    """Written by n ranks after half of the steps, gone on with by m."""
    sizes = (1, 2, 4)
    lines = [
        "## Checkpoints written by n ranks, gone on with by m",
        "",
        f"{LAST // 2} steps by n ranks that split the latents, then to step {LAST} by m ranks, against {LAST} steps by "
        "one process. The folder that comes out is loaded by `sh.load`, and compared with the weights in memory.",
        "",
        "| | " + " | ".join(f"m = {m}" for m in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    with tempfile.TemporaryDirectory() as root:
        rate = {"decay": 0.0}  # so that the first half has the learning rates of the whole
        (whole,) = run(kind="train", out=f"{root}/whole", ranks=1, settings=rate)
        for n in sizes:
            run(kind="train", out=f"{root}/{n}", ranks=n, latents=n, settings={"steps": LAST // 2, **rate})
            row = []
            for m in sizes:
                shutil.copytree(f"{root}/{n}", f"{root}/{n} {m}")
                kept = run(kind="train", out=f"{root}/{n} {m}", ranks=m, latents=m, settings=rate)
                loaded = sh.load(f"{root}/{n} {m}").state_dict()
                if not all(torch.equal(loaded[name], value) for name, value in kept[0]["state"].items()):
                    raise SystemExit(f"{n} to {m}: the saved SAE is not the one in memory")
                row.append(same(whole, kept[0]))
            lines.append(f"| n = {n} | " + " | ".join(row) + " |")
    return lines


def kills(times: int = 10) -> list[str]:
    """Two ranks, one killed at a random moment, and the restarted training against one that was never killed."""
    draw = random.Random(0)
    lines = [
        f"## One of two ranks killed (SIGKILL) at {times} random moments",
        "",
        f"Each time a new training of {LAST} steps with a checkpoint every 3, latents split; then the same call again, "
        "whose weights at the end are compared with those of one that was never killed.",
        "",
        "| killed | after | checkpoint of step | the other rank said | restarted, the weights are the same |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as root:
        task = {"kind": "train", "ranks": 2, "latents": 2}
        began = time.monotonic()
        whole = run(**task, out=f"{root}/whole")[0]
        lasts = time.monotonic() - began
        tries = 0
        while len(lines) < times + 6:
            tries += 1
            folder, out = f"{root}/f{tries}", Path(root, f"killed{tries}")
            Path(folder).mkdir()
            processes = start({**task, "out": str(out), "folder": folder})
            victim, after = draw.randrange(2), draw.random() * lasts
            processes[victim].join(after)
            processes[victim].kill()
            for process in processes:
                process.join()
            if processes[victim].exitcode != -signal.SIGKILL:
                continue  # it had ended
            file = out / "checkpoint.safetensors"
            reached = _step(file) if file.exists() else "none"
            text = said(folder, 1 - victim).splitlines()
            told = next((line.split(" (")[0] for line in text if "RankError: " in line), "nothing: it had ended")
            again = run(**task, out=str(out))[0]
            if left := [one.name for one in out.iterdir() if one.name.startswith(".")]:
                raise SystemExit(f"left behind in the folder: {', '.join(left)}")
            lines.append(
                f"| rank {victim} | {after / lasts:.0%} of the time | {reached} | {told.split('errors.')[-1]} "
                f"| {same(whole, again)} |"
            )
    return lines


def _step(file: Path) -> int:
    from saehooks.storage import open_safetensors

    return (open_safetensors(file).config or {})["counters"]["steps"]


PARTS = {"grid": grid, "bytes": counted, "checkpoints": checkpoints, "kills": kills}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; all if left out")
    parser.add_argument("--cells", nargs="+", choices=cells(), help="of the part grid, only these")
    parser.add_argument("--grids", nargs="+", choices=GRIDS, help="of the part grid, only these")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the part grid (%(default)s)")
    parser.add_argument("--keep", type=Path, help="of the part grid, a file of what was found before")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the page goes (%(default)s)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for settings in cells().values():  # loads what is compiled at its first use: forks have it then
        sh.fit(rows(2 * BATCH), made(settings, 0), **training(1))
    known = chosen.out.read_text().split("\n\n## ") if chosen.out.exists() else []
    sections = {text.splitlines()[0]: text for text in known[1:]}
    for name in chosen.part or PARTS:
        asked = (chosen.cells, chosen.steps, chosen.grids, chosen.keep) if name == "grid" else ()
        text = "\n".join(PARTS[name](*asked)).removeprefix("## ")
        sections = {title: one for title, one in sections.items() if title != text.splitlines()[0]}
        sections[text.splitlines()[0]] = text
        head = "# Several processes against one\n\nMade by `python recipes/scale_check.py`, on gloo."
        chosen.out.write_text("\n\n## ".join([head, *sections.values()]).rstrip() + "\n")
        print(text, flush=True)


if __name__ == "__main__":
    main()
