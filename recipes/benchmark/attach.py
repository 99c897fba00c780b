"""What an attachment adds to a model's forward: reading, splicing, an edit, in encoder products and in forwards.

    python recipes/benchmark/attach.py [--quick] [--device cuda]

One model (12 blocks of width 576, random weights), one site at half depth, in turn: the plain forward, each verb, and
a PyTorch hook that does nothing. A read costs the encoder's product and the selection; a splice adds the decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Decoder, arguments, figure, interleaved, machine, save, summary, table
from train_step import WIDTH, concepts

import saehooks as sh

SITE = "blocks.6"


def case(batch: int, context: int, d_sae: int, args: Any) -> dict[str, Any]:
    """Time the forwards of one size."""
    torch.manual_seed(0)
    model = Decoder(WIDTH, layers=4 if args.quick else 12).to(args.device).eval()
    site = SITE if not args.quick else "blocks.2"
    tokens = torch.randint(0, 8192, (batch, context), device=args.device)
    sae, _ = concepts(d_sae, torch.randn(256, WIDTH, device=args.device))
    queries, keys = torch.randn(batch * context, WIDTH, device=args.device), sae.dictionary.C.detach()
    scores = queries.new_empty(batch * context, d_sae)

    def hooked() -> None:
        handle = model.get_submodule(site).register_forward_hook(lambda *_: None)
        model(tokens)
        handle.remove()

    def within(verb: Callable[..., Any], *given: Any) -> Callable[[], None]:
        def job() -> None:
            with verb(model, sae, *given, at=site):
                model(tokens)

        return job

    jobs: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(tokens),
        "product": lambda: torch.mm(queries, keys.T, out=scores),
        "empty hook": hooked,
        "read": within(sh.read),
        "splice": within(sh.splice),
        "ablate": within(sh.ablate, [0, 1, 2]),
    }
    with torch.no_grad():
        times = interleaved(jobs, args)
    found = summary(times, "forward")
    product = times["product"]
    for name in ("empty hook", "read", "splice", "ablate"):
        extra = [a - b for a, b in zip(times[name], times["forward"], strict=False)]
        ratios = sorted(e / p for e, p in zip(extra, product, strict=False))
        found[name]["extra_products"] = ratios[len(ratios) // 2]
    return {"batch": batch, "context": context, "d_sae": d_sae, "times": found}


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    print(machine(args))
    sizes = [(2, 64, 3072)] if args.quick else [(1, 1, 24576), (1, 128, 24576), (4, 128, 3072), (4, 128, 24576)]
    cases = [case(*size, args) for size in sizes]
    names = ("empty hook", "read", "splice", "ablate")
    print("\nForwards with an attachment, in units of the plain forward, and what they add, in encoder products:")
    rows = []
    for c in cases:
        times = c["times"]
        cells = [times[name][key] for key in ("ratio", "extra_products") for name in names]
        rows.append((f"{c['batch']} x {c['context']}", c["d_sae"], times["product"]["ratio"], *cells))
    print(table(rows, ("tokens", "latents", "product", *names, *(f"{name}, added" for name in names))))
    save("attach", {"width": WIDTH, "cases": cases}, args)

    def draw(axis: Any) -> None:
        labels = [f"{c['batch']}x{c['context']}\n{c['d_sae']}" for c in cases]
        for i, name in enumerate(names):
            places = [j + 0.2 * (i - 1.5) for j in range(len(cases))]
            axis.bar(places, [c["times"][name]["ratio"] for c in cases], width=0.2, label=name)
        axis.axhline(1, color="k", lw=0.5)
        axis.set(xticks=range(len(cases)), xticklabels=labels, ylabel="forwards", xlabel="tokens, latents")
        axis.legend(fontsize=7)

    figure("attach", args, draw)


if __name__ == "__main__":
    main()
