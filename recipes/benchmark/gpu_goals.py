"""What was asked for, what was measured, and for each goal that was missed where its time went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gpu_report import ratio

Row = dict[str, Any]


class Goal(NamedTuple):
    """A limit on one measured number, at the reference size and wherever else it was measured."""

    what: str
    section: str
    value: Callable[[Row], float | None]
    limit: float
    at_least: bool = False
    parts: tuple[str, ...] = ()
    """Beginnings of the names of the profile's parts that make it up; none: all of them."""
    among: Callable[[Row], bool] = lambda row: True
    """The rows of the section that it is about."""
    otherwise: str = ""
    """What a miss says, where the profile's parts do not."""
    everywhere: bool = False
    """Whether the worst of all rows counts, not that of the reference size."""

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def _peer(name: str) -> Callable[[Row], bool]:
    return lambda row: row["who"] == name


SELECTION = ("selection",)
ENCODING = ("operands", "product", "selection")
GOALS = (
    Goal("sparsemax on given scores / torch.topk(64)", "select", lambda row: row["/ topk"], 0.35, parts=SELECTION),
    Goal("sparsemax on given scores / torch.amax", "select", lambda row: row["/ amax"], 1.3, parts=SELECTION),
    Goal("encode and select / product alone", "encode", lambda row: row["best / product"], 1.15, parts=ENCODING),
    Goal("the same, stretch", "encode", lambda row: row["best / product"], 1.05, parts=ENCODING),
    Goal(
        "forward and backward / encoder product, 49,152 latents",
        "step",
        lambda row: row["fb / product"],
        2.5,
        among=lambda row: row["d_sae"] == 49_152,
    ),
    Goal("step with Adam, M tokens/s", "step", lambda row: row["M tokens/s"], 2.0, at_least=True),
    Goal(
        "SAELens TopK step / ours",
        "others",
        lambda row: row.get("step / ours"),
        5.0,
        at_least=True,
        among=_peer("SAELens TopK"),
    ),
    Goal(
        "published sparsemax step / ours",
        "others",
        lambda row: row.get("step / ours"),
        15.0,
        at_least=True,
        among=_peer("published sparsemax"),
    ),
    Goal(
        "peak memory of a step / its scores",
        "step",
        lambda row: ratio(row.get("peak MB"), row.get("scores MB")),
        1.0,
        otherwise="scores are written in chunks of at most 1 GiB; above `gpu_plan.UNWRITTEN_FROM` they are not written",
    ),
    Goal(
        "a read or splice adds / (1.3 encoder products + 3% of the forward)",
        "attach",
        lambda row: row["added / allowed"],
        1.0,
        among=lambda row: row["SAE"] != "float32, scored in float32",
        otherwise="see which of float32 and bfloat16, capacity or none, it is in the table",
        everywhere=True,
    ),
    Goal(
        "waits of a forward with an SAE, given a capacity",
        "attach",
        lambda row: row["waits"],
        0.0,
        among=lambda row: row["capacity"] == "yes",
        otherwise="the lines that wait are in the table",
        everywhere=True,
    ),
    Goal(
        "waits of a Trainer.step",
        "trainer",
        lambda row: row.get("waits a step"),
        1.0,
        otherwise="the lines that wait are in the table; a record in the history, every tenth step, may wait",
    ),
)

NEXT = {
    "operands": "write the half-precision copy inside Adam's update, which has the row at hand",
    "product": "do not write the scores: see the product plans for the best launch shape and UNWRITTEN_FROM",
    "selection: collect": "see the select plans: another tile or more warps; below that, fuse it into the product",
    "selection: finish": "a shorter candidate list, or finish and fill in one launch",
    "decode": "tokens in an order that shares latents, so that gathered rows are met in the L2 cache",
    "codes' gradient": "one launch with the queries' gradient, which gathers the same rows",
    "queries' gradient": "one launch with the codes' gradient, which gathers the same rows",
    "order by column": "count and place instead of a radix sort of 32 bits: latents need 16 to 18",
    "table's gradient": "running means in half precision take a third off; latents without entries still decay",
    "five products": "a linear dictionary has none of them",
    "the rest": "see the kernels by time: what is small and many can be fused",
}
"""What would be next for each part of the profile, by the beginning of its name."""


def judged(found: dict[str, Any]) -> list[Row]:
    """A row a goal: at the reference size and support, and in how many other rows it was met."""
    rows = []
    for goal in GOALS:
        candidates = [row for row in found.get(goal.section, []) if goal.among(row)]
        values = [(row, goal.value(row)) for row in candidates]
        measured = [(row, value) for row, value in values if value is not None]
        here, others = _split(measured, {} if goal.everywhere else found["reference"])
        row: Row = {"goal": goal.what, "wanted": f"{'>=' if goal.at_least else '<='} {goal.limit:g}"}
        worst = (min if goal.at_least else max)((value for _, value in here), default=None)
        row["measured"] = worst
        row["met"] = "not measured" if worst is None else "yes" if goal.met(worst) else "NO"
        row["elsewhere"] = _elsewhere(goal, [value for _, value in others])
        rows.append(row)
    return rows


def _split(measured: list[tuple[Row, float]], reference: Row) -> tuple[list, list]:
    """Rows that agree with the reference in whatever of it they name, and the others."""
    here, others = [], []
    for row, value in measured:
        same = all(row[key] == wanted for key, wanted in reference.items() if key in row)
        (here if same else others).append((row, value))
    return here, others


def _elsewhere(goal: Goal, values: list[float]) -> str:
    if not values:
        return ""
    met = sum(goal.met(value) for value in values)
    return f"met in {met} of {len(values)}, {min(values):.3g} to {max(values):.3g}"


def explained(found: dict[str, Any]) -> list[str]:
    """For each missed goal: the profile's parts that take longest beyond their floor, and what would be next."""
    lines = []
    profile = [row for row in found.get("profile", []) if row["ms"] is not None]
    for goal, verdict in zip(GOALS, judged(found), strict=True):
        if verdict["met"] != "NO":
            continue
        lines.append(f"- **{goal.what}**: {verdict['measured']:.3g}, wanted {verdict['wanted']}.")
        if goal.otherwise:
            lines.append(f"    - {goal.otherwise}.")
            continue
        if goal.section == "others":
            lines.append("    - both launched from Python; beside our CUDA graph: the column `step / our graph`.")
        parts = [row for row in profile if _belongs(row["part"], goal.parts)]
        parts.sort(key=lambda row: -(row["ms"] - (row.get("floor ms") or 0)))
        for row in parts[:3]:
            floor = row.get("floor ms")
            beyond = "" if floor is None else f", {row['/ floor']:.2f} of its floor {floor:.3f}"
            lines.append(f"    - {row['part']}: {row['ms']:.3f} ms{beyond}. Next: {_next(row['part'])}.")
    return lines


def _belongs(part: str, beginnings: tuple[str, ...]) -> bool:
    return part.startswith(beginnings) if beginnings else not part.startswith("the whole")


def _next(part: str) -> str:
    return next((what for beginning, what in NEXT.items() if part.startswith(beginning)), "its own profile")
