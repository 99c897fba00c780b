"""What does a dictionary of a million latents cost, and of sixteen, on 8 to 64 GPUs?

    python recipes/scale.py                                    # the tables below, from the figures of one GPU
    python recipes/scale.py --tflops 350 --gbytes 2500 --link 200 --d-in 4096 --rows 8192
    python recipes/scale.py --measure                          # time this machine's own products first, and use them

Every figure is arithmetic on five numbers: how fast one GPU multiplies matrices, how fast it reads memory, how fast a
collective moves bytes, the width d of the model, and the rows of a step. The defaults are those of an H100's data
sheet at a plausible share (they are assumptions, not measurements: give what you measured). Bytes sent are those that
`tests/training/test_ranks.py` counts. A step of an SAE whose dictionary is split over R ranks (`latent_ranks=R`):

- scores: 2 * rows * d * M / R operations, the only dense product; forward and backward of what was selected are sparse;
- tables: read once to score, and read and written with Adam's two means to update: 7 * 4 * M / R * d bytes a table;
- sent by each rank: rows * d floats forward, the same backward, and per row two float64 sums for each Newton step of
  sparsemax, or k candidates for top-k. It does not depend on M.

Data-parallel ranks instead send the gradients of all tables. Two other ways to a top-k of scores that are a DTensor
split over ranks; reconstruction and gradient are summed as ours are. llamascopium bisects each row's threshold: every
round sums a float32 threshold and an int64 count of each row. It sends little more than ours, in more rounds, and holds
rows * M / R dense scores and codes on each rank (see "scores held"). A plain torch.topk gathers the scores of all
latents on every rank, in float32: like the gradients of data-parallel ranks that grows with M.

Not in the tables: `fit` begins from an SAE that every process has whole, and gives each the whole one back, so that
the host of each process holds M * d floats a table (16M latents of width 4,096: 275 GB); between these moments a rank
holds its part alone. Checkpoints are written and read by every rank for its own part, three times the tables in all.
On a CPU, and where ranks also split rows, the gradients of own tables are written too, a fourth time the tables.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

NEWTON = 8
"""Newton steps of a sparsemax threshold, from the largest threshold of the parts: 4 to 9 for normally distributed
scores of 65,536 latents in 2 to 64 parts, with supports of 3 to 170."""
BISECTIONS = 25
"""Rounds of a bisection until each of 8,192 rows of a million normally distributed scores has exactly 64 above its
threshold (15 where 63 to 65 will do)."""
GB = 1e9


@dataclass(frozen=True)
class Machine:
    """What one rank can do."""

    tflops: float
    """10^12 operations a second in dense products."""
    gbytes: float
    """10^9 bytes a second of its memory."""
    link: float
    """10^9 bytes a second that a collective moves in and out of a rank."""
    memory: float
    """10^9 bytes that it holds."""


@dataclass(frozen=True)
class Plan:
    """One step of one training."""

    latents: int
    d_in: int
    rows: int
    k: int
    ranks: int
    tables: int = 1
    """1 for shared concepts, 2 for an encoder and a decoder."""
    buffer_rows: int = 32_768
    """Rows that every rank mixes, the default of `TrainConfig`."""

    @property
    def share(self) -> float:
        """Numbers in this rank's part of the tables."""
        return self.tables * self.latents / self.ranks * self.d_in

    def memory(self) -> float:
        """Bytes of a rank: parameters, two means of Adam, the shuffle buffer, rows and their gradients, codes; neither
        scores nor gradients of tables, which the fused update does not write."""
        rows = (6 * self.rows + self.buffer_rows) * self.d_in * 4
        codes = 4 * self.rows * self.k * (8 + 4) / self.ranks
        return 3 * 4 * self.share + rows + codes

    def sent(self, way: str) -> float:
        """Bytes that a rank gives to collectives in a step."""
        joined = 2 * self.rows * self.d_in * 4
        return {
            "sparsemax, split latents": joined + self.rows * (NEWTON * 16 + 8),
            "top-k, split latents": joined + self.rows * self.k * 4,
            "top-k by bisection (llamascopium)": joined + self.rows * BISECTIONS * (4 + 8),
            "torch.topk of a DTensor": joined + self.rows * self.latents / self.ranks * 4,
            "data-parallel": self.tables * self.latents * self.d_in * 4,
        }[way]

    def scores_held(self, way: str) -> float:
        """Bytes of dense scores that a rank holds at once."""
        kept = {"top-k by bisection (llamascopium)": self.latents / self.ranks, "torch.topk of a DTensor": self.latents}
        return self.rows * kept.get(way, 0) * 4

    def seconds(self, machine: Machine, way: str = "sparsemax, split latents") -> dict[str, float]:
        """Of a step, by what they are spent on; nothing is taken to overlap."""
        rows = self.rows / self.ranks if way == "data-parallel" else self.rows
        latents = self.latents if way == "data-parallel" else self.latents / self.ranks
        scored = 2 * rows * self.d_in * latents / (machine.tflops * 1e12)
        table = self.tables * latents * self.d_in * 4
        updated = 7 * table / (machine.gbytes * GB)
        sparse = 6 * self.rows / self.ranks * self.k * self.d_in * 4 / (machine.gbytes * GB)
        # A ring moves each byte twice: once to be summed, once as the sum.
        sent = 2 * self.sent(way) * (self.ranks - 1) / self.ranks / (machine.link * GB)
        return {"scores": scored, "update": updated, "sparse": sparse, "sent": sent}


WAYS = (
    "sparsemax, split latents",
    "top-k, split latents",
    "top-k by bisection (llamascopium)",
    "torch.topk of a DTensor",
    "data-parallel",
)


def bytes_table(plan: Plan) -> list[str]:
    """One line for each way of sharing a step."""
    ours = plan.sent(WAYS[0])
    lines = [
        f"| {plan.latents:,} latents, d = {plan.d_in:,}, {plan.rows:,} rows, {plan.ranks} ranks | sent | against ours "
        "| scores held |"
    ]
    lines.append("|---|---|---|---|")
    for way in WAYS:
        kept = f"{plan.scores_held(way) / GB:.1f} GB" if plan.scores_held(way) else "none"
        lines.append(f"| {way} | {plan.sent(way) / GB:.3f} GB | {plan.sent(way) / ours:.1f} | {kept} |")
    return lines


def scaling_table(latents: int, machine: Machine, chosen: argparse.Namespace) -> list[str]:
    """Memory, bytes and time from 8 to 64 ranks, and the share of the step that is spent on sending."""
    lines = [
        f"| {latents:,} latents on | memory of a rank | sent | step | tokens/s | sending |",
        "|---|---|---|---|---|---|",
    ]
    for ranks in (8, 16, 32, 64):
        plan = Plan(latents, chosen.d_in, chosen.rows, chosen.k, ranks, chosen.tables)
        spent = plan.seconds(machine)
        total = sum(spent.values())
        fits = "" if plan.memory() <= machine.memory * GB else " (does not fit)"
        lines.append(
            f"| {ranks} | {plan.memory() / GB:.1f} GB{fits} | {plan.sent(WAYS[0]) / GB:.2f} GB | {1e3 * total:.0f} ms "
            f"| {chosen.rows / total:,.0f} | {spent['sent'] / total:.0%} |"
        )
    return lines


def best_ranks(latents: int, machine: Machine, chosen: argparse.Namespace) -> int:
    """Ranks from which on sending takes longer than everything else: more of them should split rows instead."""
    ranks = 1
    while ranks < 4096:
        spent = Plan(latents, chosen.d_in, chosen.rows, chosen.k, 2 * ranks, chosen.tables).seconds(machine)
        if spent["sent"] > sum(spent.values()) / 2:
            return ranks
        ranks *= 2
    return ranks


def measured(d_in: int, memory: float, link: float) -> Machine:
    """This machine's own products and memory, timed; its link is taken from the options."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(n, d_in, device=device), torch.randn(n, d_in, device=device)
    wide = torch.randn(2**24, device=device)

    def seconds(work) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    product, copy = seconds(lambda: a @ b.T), seconds(lambda: wide.clone())
    return Machine(2 * n * n * d_in / product / 1e12, 2 * wide.numel() * 4 / copy / GB, link, memory)


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=400.0, help="of dense products on one GPU (%(default)s)")
    parser.add_argument("--gbytes", type=float, default=2500.0, help="10^9 bytes/s of its memory (%(default)s)")
    parser.add_argument("--link", type=float, default=200.0, help="10^9 bytes/s of a collective (%(default)s)")
    parser.add_argument("--memory", type=float, default=80.0, help="10^9 bytes of one GPU (%(default)s)")
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8192, help="in a step (%(default)s)")
    parser.add_argument("--k", type=int, default=64, help="latents that a token uses (%(default)s)")
    parser.add_argument(
        "--tables", type=int, default=1, help="1: shared concepts; 2: encoder and decoder (%(default)s)"
    )
    parser.add_argument("--latents", type=int, nargs="+", default=[2**20, 2**24])
    parser.add_argument("--measure", action="store_true", help="time this machine's products and memory first")
    return parser.parse_args()


def main() -> None:
    chosen = settings()
    machine = Machine(chosen.tflops, chosen.gbytes, chosen.link, chosen.memory)
    if chosen.measure:
        machine = measured(chosen.d_in, chosen.memory, chosen.link)
    kind = "measured here, but for the link" if chosen.measure else "assumed"
    print(
        "Arithmetic, not measured on a GPU. "
        f"One rank ({kind}): {machine.tflops:.1f} TFLOP/s, {machine.gbytes:.0f} GB/s, link {machine.link:.0f} GB/s.\n"
    )
    for latents in chosen.latents:
        print("\n".join(bytes_table(Plan(latents, chosen.d_in, chosen.rows, chosen.k, 8, chosen.tables))), "\n")
        print("\n".join(scaling_table(latents, machine, chosen)), "\n")
        ranks = best_ranks(latents, machine, chosen)
        print(f"Beyond {ranks} ranks more than half of a step is sending: let further ones split the rows.")
        host = chosen.tables * latents * chosen.d_in * 4 / GB
        print(f"At the start and at the end the host of each process holds the whole SAE: {host:.0f} GB.\n")


if __name__ == "__main__":
    main()
