"""One table of what saehooks costs on CPU beside others, in units of the fastest exact float32 product.

    .venv-peers/bin/python recipes/benchmark/table.py                # all of it, about an hour; --quick: ten minutes
    .venv-peers/bin/python recipes/benchmark/table.py --threads 1 --clock cpu    # on a machine that does more besides

Selection, encoding, forward and backward (sparsemax, also with refine=1, top-k, batch top-k, jumprelu), and reads of 1
to 512 rows, by the number of latents and the support. Medians of interleaved rounds. Each row is written to table.json
as it is done, and a run that was stopped goes on where it was (``--anew`` starts again). Peers take part where they are
installed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from common import Bench, Case, Job, arguments, as_table, concept_sae, dense_products, machine, per_fastest
from common import queries_and_keys as random_queries
from peers import PACKAGES, PLAIN, published_sparsemax
from selection import sort_sparsemax
from train_step import LINEAR, forward_backward, linear, ours

from saehooks import SAE, kernels
from saehooks.kernels import BatchTopK, RowRule, Sparsemax, Step, Threshold, TopK
from saehooks.kernels.step import ScreenTables

LATENTS = (24576, 49152, 3072, 262144)
SUPPORTS = (64, 16, 200)
READS = (1, 16, 128, 512)
QUICK = {"latents": (24576, 49152, 3072), "supports": (64,), "reads": (1, 16, 512), "repeats": 3}


class Row(NamedTuple):
    """One row of the table."""

    section: str
    case: Case
    jobs: Callable[[Case], dict[str, Job]]


def selection(case: Case) -> dict[str, Job]:
    """The threshold, from given scores."""
    queries, keys = random_queries(case, torch.device("cpu"))
    scores, k = queries @ keys.T, min(case.support, case.d_sae)
    return dense_products(queries, keys) | {
        "sparsemax": lambda: kernels.select_rows(scores, Sparsemax()),
        "top-k": lambda: kernels.select_rows(scores, TopK(k)),
        "torch.topk": lambda: scores.topk(k, dim=1),
        "sparsemax by sorting": lambda: sort_sparsemax(scores),
    }


def encode(case: Case) -> dict[str, Job]:
    """Product and selection together, as an SAE in use selects, which keeps its copy of the keys."""
    queries, keys = random_queries(case, torch.device("cpu"))
    k = min(case.support, case.d_sae)
    theta = float(kernels.select(queries, keys, TopK(k)).threshold.median())
    rules: dict[str, RowRule | BatchTopK] = {
        "sparsemax": Sparsemax(), "top-k": TopK(k), "batch top-k": BatchTopK(k), "threshold": Threshold(theta),
    }  # fmt: skip
    step = Step(screen_tables=ScreenTables())
    jobs = {name: partial(kernels.select, queries, keys, rule, step=step) for name, rule in rules.items()}
    return dense_products(queries, keys) | jobs


def read(case: Case) -> dict[str, Job]:
    """Encoding by a whole SAE in use, without gradients."""
    x = torch.randn(case.rows, case.d_in, generator=torch.Generator().manual_seed(0))
    sae, _ = concept_sae(case, x)
    sae = sae.eval().requires_grad_(False)
    k = min(case.support, case.d_sae)
    several = torch.randn(256, case.d_in, generator=torch.Generator().manual_seed(1))  # b_dec is not the row itself
    topk = linear(case, several, activation="topk").eval().requires_grad_(False)
    jobs = dense_products(x, sae.dictionary.C)
    again = refined(sae).eval().requires_grad_(False)
    jobs |= {"sparsemax, concepts": lambda: sae.encode(x), "sparsemax, refined": lambda: again.encode(x)}
    jobs |= {"topk, linear": lambda: topk.encode(x)}
    for name, make in (PACKAGES if case.d_sae <= 49152 else {}).items():
        if name in ("SAELens TopK", "sparsify TopK"):
            jobs[name] = _encode_of(make, case, k, x)
    return jobs


def refined(sae: SAE) -> SAE:
    """The same SAE with one refinement of its values."""
    found = SAE(sae.d_in, sae.d_sae, sae.cfg.dictionary, sae.cfg.activation, **sae.cfg.settings, refine=1)
    found.load_state_dict(sae.state_dict(), strict=False)
    return found


def _encode_of(make: Callable[..., Any], case: Case, k: int, x: torch.Tensor) -> Job:
    """A peer's own encoding; a package that is missing raises when it is first run."""
    made: list[Any] = []

    def job() -> None:
        if not made:
            made.append(make(case.d_in, case.d_sae, k, x.device).model.requires_grad_(False).eval())
        made[0].encode(x)

    return job


def step(case: Case, with_peers: bool = False) -> dict[str, Job]:
    """Forward and backward of a training step."""
    x = torch.randn(case.rows, case.d_in, generator=torch.Generator().manual_seed(0))
    sae, scale = concept_sae(case, x)
    keys, k = sae.dictionary.C.detach(), min(case.support, case.d_sae)
    jobs = dense_products(x, keys) | {"sparsemax, concepts": ours(sae, x), "sparsemax, refined": ours(refined(sae), x)}
    jobs |= {f"{name}, linear": ours(linear(case, x, **settings), x) for name, settings in LINEAR.items()}
    others = {**PACKAGES, **PLAIN} if with_peers else {}
    for name, make in others.items():
        jobs[name] = _step_of(partial(make, case.d_in, case.d_sae, k, x.device), x)
    if others:
        jobs["published sparsemax"] = _step_of(partial(published_sparsemax, keys, scale), x)
    return jobs


def _step_of(make: Callable[[], Any], x: torch.Tensor) -> Job:
    made: list[Job] = []

    def job() -> None:
        if not made:
            peer = make()
            made.append(forward_backward(peer.model, x, peer.loss))
        made[0]()

    return job


def rows(quick: bool) -> Iterator[Row]:
    """The table's rows, what matters most first."""
    latents = QUICK["latents"] if quick else LATENTS
    supports = QUICK["supports"] if quick else SUPPORTS
    reads = QUICK["reads"] if quick else READS
    for support in supports:
        if support == 64:
            yield Row("forward and backward", Case(2048, 4608), step)
            yield Row("encode", Case(2048, 4608), encode)
        for d_sae in latents:
            many = 2048 if d_sae <= 24576 else 512
            # The others' steps take minutes.
            with_peers = support == 64 and d_sae <= (4608 if quick else 24576)
            yield Row("forward and backward", Case(many, d_sae, support=support), partial(step, with_peers=with_peers))
            for few in reads if support == 64 else ():
                yield Row("read", Case(few, d_sae), read)
            yield Row("encode", Case(many, d_sae, support=support), encode)
        for d_sae in latents if not quick else (24576, 3072):
            yield Row("selection", Case(512 if d_sae <= 49152 else 128, d_sae, support=support), selection)


def main() -> None:
    args = arguments(__doc__.splitlines()[0], lambda p: p.add_argument("--anew", action="store_true"))
    if args.quick:
        args.repeats = min(args.repeats, QUICK["repeats"])
    bench = Bench(args)
    where = args.out / "table.json"
    kept = json.loads(where.read_text())["sections"] if where.exists() and not args.anew else {}
    done = {(name, *(row[key] for key in Case._fields)) for name, found in kept.items() for row in found}
    bench.rows = kept
    wanted = list(rows(args.quick))
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    for i, (section, case, make) in enumerate(wanted):
        if (section, *case) in done:
            continue
        print(f"[{i + 1}/{len(wanted)}, {time.perf_counter() - began:.0f} s] ", end="", flush=True)
        jobs = make(case)
        products = [name for name in jobs if name in ("torch.mm", "oneDNN")]
        times = per_fastest(bench.time(jobs, "torch.mm"), products)
        bench.add(section, case, times, load=machine(args).get("load_average"))
        where.write_text(json.dumps({"machine": machine(args), "sections": bench.rows}, indent=1) + "\n")
    for section, found in bench.rows.items():
        print(f"\n{section}\n{as_table(found)}")
    print(f"\nwritten: {where}")


if __name__ == "__main__":
    main()
