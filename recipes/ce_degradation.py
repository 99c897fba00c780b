"""What splicing an SAE in costs a language model: cross-entropy over sites and SAEs, with a live panel and a picture.

    python recipes/ce_degradation.py                            # 3 sites x 2 SAEs, trained here, and the packaged one
    python recipes/ce_degradation.py --train-tokens 200000 --blocks 5 10 15 20 25
    python recipes/ce_degradation.py --saes saes/a saes/b       # SAEs of your own, none trained here

All SAEs are trained in one pass of the model over the text: `sh.train` blocks nest, and each forward stops at the
last site. Then each is measured on held-out text: cross-entropy clean, spliced and with the site zeroed, and beside
them NMSE and L0, without which a cross-entropy says little. Position 0 (an attention sink) is neither trained on nor
spliced.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import saehooks as sh
from saehooks.demo import text as packaged_text
from saehooks.demo.data import ASSETS
from saehooks.demo.models import smollm2
from saehooks.hosts import host
from saehooks.show import charts, html, terminal

KINDS = {
    "sparsemax": {},
    "topk": {"dictionary": "linear", "activation": "topk", "k": 24},
}
COLUMNS = ("nmse", "fvu", "l0", "ce_clean", "ce_spliced", "ce_zero", "ce_degradation", "ce_recovered", "kl")


def train_all(model, tokenizer, blocks: list[int], n_tokens: int, d_sae: int, passes: int) -> dict[str, sh.SAE]:
    """One SAE of each kind at the output of each block, all of them trained by the same forwards."""
    batches = sh.TokenBatches(tokenizer, packaged_text("train"), context=128, batch_size=8, limit=n_tokens)
    source, width = host(model), model.cfg.d_model
    torch.manual_seed(0)
    saes = {
        f"{kind}, block {block}": sh.SAE(width, d_sae, hook_name=f"blocks.{block}.hook_resid_post", **settings)
        for block in blocks
        for kind, settings in KINDS.items()
    }
    steps = int(0.95 * n_tokens * passes / 512)
    config = sh.TrainConfig(lr=2e-3, batch_size=512, warmup_steps=30, steps=steps, passes=passes, buffer_rows=8192)
    with ExitStack() as stack:
        for sae in saes.values():
            stack.enter_context(sh.train(model, sae, at=sae.hook_name, config=config))
        stack.enter_context(source.stop_at(source.site(f"blocks.{max(blocks)}.hook_resid_post")))
        for i, tokens in enumerate(batches):
            with torch.no_grad():
                source.run(tokens)
            if i % 10 == 0:
                print(f"trained on {(i + 1) * tokens.numel():,} of {batches.tokens.numel():,} tokens", flush=True)
    return saes


def measured(model, sae: sh.SAE, batches: sh.TokenBatches) -> dict[str, float]:
    """The figures of one SAE; in a terminal a panel follows them."""
    with torch.no_grad(), sh.measure(model, sae) as live:
        for tokens in batches:
            model(tokens)
    return live.summary()


SHOWN = ("sae", "nmse", "fvu", "l0", "ce_spliced", "ce_degradation", "ce_recovered", "kl", "n_tokens")
"""Columns of the page's table; the clean and the zeroed cross-entropy stand above it."""


def page(rows: list[dict], lead: str, footer: str) -> str:
    """One HTML page: what each SAE costs at each site, sparsemax highlighted; all figures below."""
    groups: dict[str, dict[str, float]] = {}
    sizes: dict[str, dict[str, float]] = {}
    for row in rows:
        name, _, place = row["sae"].partition(", ")
        for found, column in ((groups, "ce_degradation"), (sizes, "l0")):
            found.setdefault(place, {})[name] = float(row[column])
    ours = {row["sae"].partition(", ")[0] for row in rows if row["activation"] == "sparsemax"}
    between = [f"{name} {_range([float(row[column]) for row in rows])}" for name, column in
               (("clean", "ce_clean"), ("with the site zeroed", "ce_zero"))]  # fmt: skip
    section = html.Section("Held-out text").add(
        charts.bars_html(
            groups,
            highlight=ours,
            caption="CE degradation: spliced minus clean, in nats; 0 is best; blue: sparsemax",
        ),
        html.paragraph(f"For scale: the cross-entropy is {between[0]} and {between[1]}."),
        charts.bars_html(sizes, highlight=ours, caption="L0, latents on a token"),
        html.paragraph("Sparsemax finds its own L0, TopK is given one: compare the two with that in mind."),
    )
    figures = html.Section("All figures").add(
        html.table_html([{name: row[name] for name in SHOWN} for row in rows]),
        html.paragraph(
            "WikiText-2; cross-entropies and KL in nats. `ce_recovered` is (zero - spliced) / (zero - clean). "
            "Position 0 is not spliced and not in NMSE and L0."
        ),
    )  # fmt: skip
    return html.page("What splicing costs", [section, figures], lead=lead, footer=footer)


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"


def write(rows: list[dict], lead: str, footer: str, out: Path) -> None:
    """The page, and beside it its rows and words as JSON, from which ``--draw`` makes the page again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"lead": lead, "footer": footer, "rows": rows}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    out.write_text(page(rows, lead, footer), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="*", default=[5, 15, 25])
    parser.add_argument("--saes", nargs="*", help="folders or hub ids of SAEs that know their site; nothing is trained")
    parser.add_argument("--train-tokens", type=int, default=24_000)
    parser.add_argument("--eval-tokens", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=1152)
    parser.add_argument("--passes", type=int, default=3, help="how often a training token is used (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ce_degradation.html")
    parser.add_argument("--draw", type=Path, help="draw the page again, from the JSON beside it; nothing is run")
    args = parser.parse_args()
    if args.draw:
        kept = json.loads(args.draw.read_text(encoding="utf-8"))
        args.out.write_text(page(kept["rows"], kept["lead"], kept["footer"]), encoding="utf-8")
        return
    start = time.perf_counter()
    model, tokenizer = smollm2()
    if args.saes:
        saes = {Path(one).name: sh.load(one) for one in args.saes}
        trained = "SAEs as given."
    else:
        saes = train_all(model, tokenizer, args.blocks, args.train_tokens, args.d_sae, args.passes)
        saes["packaged, block 15"] = sh.load(ASSETS / "sae-smollm2-l15")
        trained = (
            f"The SAEs of d_sae {args.d_sae} were trained here on only {args.train_tokens:,} tokens of Wikipedia, "
            f"{args.passes} times each, all in one pass of the model; the packaged one (d_sae 4,608) on 520,710."
        )
    batches = sh.TokenBatches(tokenizer, packaged_text("eval"), context=128, batch_size=4, limit=args.eval_tokens)
    rows = []
    for name, sae in saes.items():
        found = measured(model, sae, batches)
        rows.append(
            {"sae": name, "activation": sae.cfg.activation}
            | {column: found[column] for column in COLUMNS}
            | {"n_tokens": found["n_tokens"]}
        )
        print(terminal.render(terminal.table(rows[-1:])), flush=True)
    made = f"--train-tokens {args.train_tokens} --eval-tokens {args.eval_tokens}"
    footer = f"Made by `recipes/ce_degradation.py {made}` in {time.perf_counter() - start:.0f} s."
    write(rows, f"SmolLM2-135M-Instruct. {trained}", footer, args.out)
    print(terminal.render(terminal.table(rows), width=160))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
