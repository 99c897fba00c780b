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
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import saehooks as sh
from saehooks.demo import text as packaged_text
from saehooks.demo.data import ASSETS
from saehooks.demo.models import smollm2
from saehooks.hosts import host
from saehooks.show import figures, html, terminal

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


def picture(rows: list[dict]):
    """Cross-entropy of each SAE between the clean one and the zeroed one, and its cost against its L0."""
    figure, (bars, cost) = figures.blank(1, 2, width=11, height=0.9 + 0.42 * len(rows))
    names = [f"{row['sae']}" for row in rows]
    for i, (column, colour) in enumerate(
        (("ce_clean", figures.GREY), ("ce_spliced", figures.BLUE), ("ce_zero", figures.RED))
    ):
        places = [place + 0.27 * (i - 1) for place in range(len(rows))]
        bars.barh(places, [row[column] for row in rows], height=0.25, color=colour, label=column.removeprefix("ce_"))
    bars.set_yticks(range(len(rows)), names)
    bars.invert_yaxis()
    bars.set(xlabel="cross-entropy, nats per token", title="clean, spliced, zeroed")
    bars.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    for i, row in enumerate(rows):
        cost.scatter(row["l0"], row["ce_degradation"], color=figures.COLOURS[i % len(figures.COLOURS)])
        cost.annotate(
            row["sae"], (row["l0"], row["ce_degradation"]), fontsize=7, xytext=(4, 2), textcoords="offset points"
        )
    cost.set(xlabel="L0, latents per token", ylabel="CE degradation, nats", title="cost against L0")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="*", default=[5, 15, 25])
    parser.add_argument("--saes", nargs="*", help="folders or hub ids of SAEs that know their site; nothing is trained")
    parser.add_argument("--train-tokens", type=int, default=24_000)
    parser.add_argument("--eval-tokens", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=1152)
    parser.add_argument("--passes", type=int, default=3, help="how often a training token is used (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ce_degradation.html")
    args = parser.parse_args()
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
        rows.append({"sae": name} | {column: found[column] for column in COLUMNS} | {"n_tokens": found["n_tokens"]})
        print(terminal.render(terminal.table(rows[-1:])), flush=True)
    facts = html.Section("Held-out text").add(
        '<div class="scroll">'
        + html.table_html(rows, caption="WikiText-2; cross-entropy in nats per token")
        + "</div>",
        html.image(figures.png(picture(rows)), "cross-entropy by site and SAE"),
        html.paragraph(
            "`ce_degradation` is spliced minus clean, 0 is best; `ce_recovered` is (zero - spliced) / (zero - clean). "
            "Position 0 is not spliced and not in NMSE and L0. Sparsemax finds its own L0, TopK is given one: "
            "compare the two with that in mind."
        ),
    )
    made = f"--train-tokens {args.train_tokens} --eval-tokens {args.eval_tokens}"
    footer = f"Made by `recipes/ce_degradation.py {made}` in {time.perf_counter() - start:.0f} s."
    page = html.page("What splicing costs", [facts], lead=f"SmolLM2-135M-Instruct. {trained}", footer=footer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8")
    print(terminal.render(terminal.table(rows), width=160))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
