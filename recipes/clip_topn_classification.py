"""How many of a class's latents does CLIP need? Top-n concept classification, zero-shot.

    python recipes/clip_topn_classification.py                       # packaged photos, SAEs trained on them
    python recipes/clip_topn_classification.py --data photos.npz --saes saes/a saes/b
    python recipes/clip_topn_classification.py --model open_clip:ViT-B-16/openai --data imagenet/ \\
        --at visual.blocks.10.hook_resid_post --templates "a photo of a {}." "a drawing of a {}."

The protocol of the Sparsemax SAE paper: for each class, rank latents by how often they fire on its training photos
(or how strongly, or how much more often than on other classes: --rank). On held-out photos put the reconstruction in
the site's place with only the class's top n latents ("on"), or with all but them ("off"), at the class token and all
patches, and classify by prompts.

"On" is told the right class, since it chooses the latents. So the same is done with the latents of another class:
"drawn" is the share of photos that CLIP then gives to that other class. Accuracy that comes from the latents alone,
whatever the photo, would show up there.

Each SAE is measured as it is, and with its values refined afterwards, which is how the package carries its own.

Writes OUT/clip_topn.md, .csv and .png; each SAE's rows as soon as they are there, so an interrupt keeps the others.
Rows that OUT/clip_topn.csv has already are kept, and not measured again: SAEs can be added to a table.
"""

from __future__ import annotations

import argparse
import csv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from clip_common import SITE, Photos, load_photos, open_clip_model, parser_of, say, train_saes
from torch import Tensor
from torch.nn import functional as F

import saehooks as sh
from saehooks.errors import ConfigError
from saehooks.evaluation.embeddings import class_embeddings
from saehooks.hosts import host
from saehooks.metrics import ReconstructionMeter
from saehooks.show import figures

CELLS: dict[str, dict[str, Any]] = {
    "sparsemax": {"dictionary": "concepts", "activation": "sparsemax", "key_scale": 2.0},
    "sparsemax-refined": {
        "dictionary": "concepts",
        "activation": "sparsemax",
        "key_scale": 1.4,
        "value_scale": 0.7,
        "refine": 1,
        "refine_rate": 0.3,
    },
    "sparsemax-twice": {
        "dictionary": "concepts",
        "activation": "sparsemax",
        "key_scale": 1.6,
        "value_scale": 0.625,
        "refine": 2,
        "refine_rate": 0.4,
        "reselect": 0.8,
    },
    "topk": {"dictionary": "linear", "activation": "topk", "k": 24},
    "topk-refined": {"dictionary": "linear", "activation": "topk", "k": 24, "refine": 1, "refine_rate": 0.3},
    "relu": {"dictionary": "linear", "activation": "relu"},
    "mlp-sparsemax": {"dictionary": "linear", "activation": "sparsemax"},
    "transformer-relu": {"dictionary": "concepts", "activation": "relu"},
}
"""What can be trained here, by the paper's names; each with the loss that goes with its activation."""

RANKS = ("frequency", "strength", "contrast")


def settings(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--at", default=SITE, help="the site, where SAEs are trained here")
    parser.add_argument("--saes", nargs="*", help="folders of SAEs to compare; default: train --train ones")
    parser.add_argument("--train", nargs="*", default=["sparsemax", "topk", "relu"], choices=list(CELLS))
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--l1", type=float, help="l1 coefficient of relu SAEs; default: that of the library")
    parser.add_argument("--k", type=int, default=CELLS["topk"]["k"], help="k of topk")
    parser.add_argument("--copies", type=int, help="how often a training photo is shown; default: 9,000 in all")
    parser.add_argument("--passes", type=int, default=3, help="how often an activation is trained on")
    parser.add_argument(
        "--afterwards", type=int, default=3, metavar="STEPS", help="of sae.refined, for more rows; 0: none"
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 5, 10, 50])
    parser.add_argument("--rank", nargs="+", default=["frequency", "contrast"], choices=RANKS)
    parser.add_argument("--templates", nargs="+", default=["a photo of a {}."])
    parser.add_argument("--limit", type=int, help="at most so many training and test photos")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of results; trained SAEs go to OUT/saes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = settings(argv)
    opened = open_clip_model(args.model)
    clip = opened.model
    train = load_photos(args.data, "train", opened.preprocess).first(args.limit)
    test = load_photos(args.data, "test", opened.preprocess).first(args.limit)
    if train.names != test.names:
        raise ConfigError(f"train and test must have the same classes: {train.names[:5]} ... and {test.names[:5]} ...")
    prompts = [[template.format(name) for template in args.templates] for name in test.names]
    classes = class_embeddings(clip, prompts, opened.tokenizer)

    saes = load_or_train(clip, train, args)
    if args.afterwards:
        plain = {name: sae for name, sae in saes.items() if not sae.refinement.steps}
        saes |= {f"{name}, refined afterwards": sae.refined(args.afterwards) for name, sae in plain.items()}
    setting = {"model": args.model, "data": Path(args.data).name if args.data else "packaged", "limit": str(args.limit)}
    rows = measured_before(args.out / "clip_topn.csv", setting, args.counts)
    done = {(row["SAE"], row["rank"]) for row in rows}
    saes = {name: sae for name, sae in saes.items() if any((name, rank) not in done for rank in args.rank)}
    if rows:
        write(rows, args, len(test), len(train))
    scores = score_latents(clip, saes, train) if saes else {}
    for name, sae in saes.items():
        quality = reconstruction(clip, sae, test)
        for rank in args.rank:
            if (name, rank) in done:
                continue
            say(f"{name}, latents ranked by {rank}")
            found = classify(clip, sae, scores[name][rank], test, classes, args.counts)
            rows.append({"SAE": name, "rank": rank, **setting, **quality, **found})
            write(rows, args, len(test), len(train))
            if not found["complete"]:
                say("interrupted: the table holds what was done")
                return


# ------------------------------------------------------------------------- SAEs


def load_or_train(clip: Any, train: Photos, args: argparse.Namespace) -> dict[str, sh.SAE]:
    """The SAEs given, or those trained before in the output folder, or new ones."""
    if args.saes:
        return {Path(folder).name: sh.load(folder) for folder in args.saes}
    saes, new = {}, {}
    width = host(clip).site(args.at).width
    for name in args.train:
        folder = args.out / "saes" / name
        if (folder / "cfg.json").exists():
            saes[name] = sh.load(folder)
            continue
        settings = CELLS[name] | ({"k": args.k} if name.startswith("topk") else {})
        torch.manual_seed(0)
        saes[name] = new[name] = sh.SAE(width, args.d_sae, hook_name=args.at, **settings)
    if new:
        copies = args.copies or max(1, 9000 // len(train))
        say(f"training {', '.join(new)} on {len(train)} photos, {copies} times")
        losses = {name: sh.LossConfig(l1=args.l1) for name in new if "relu" in name and args.l1 is not None}
        train_saes(clip, new, train, losses=losses, at=args.at, copies=copies, passes=args.passes)
    for name, sae in new.items():
        sae.cfg.metadata["training"]["data"] = Path(args.data).name if args.data else "saehooks photos (CIFAR-10)"
        sae.save(args.out / "saes" / name, dtype=torch.float16)
    return saes


# ---------------------------------------------------------------------- ranking


def score_latents(clip: Any, saes: dict[str, sh.SAE], train: Photos) -> dict[str, dict[str, Tensor]]:
    """For each SAE and each way of ranking: (classes, d_sae) scores, NaN for classes without training photos."""
    n = len(train.names)
    fired = {name: torch.zeros(n, sae.d_sae, dtype=torch.float64) for name, sae in saes.items()}
    strong = {name: torch.zeros(n, sae.d_sae, dtype=torch.float64) for name, sae in saes.items()}
    positions = torch.zeros(n, dtype=torch.float64)
    done = 0
    for pixels in train.batches():
        labels = train.labels[done : done + len(pixels)]
        done += len(pixels)
        with ExitStack() as blocks, torch.no_grad():
            traces = {name: blocks.enter_context(sh.read(clip, sae)) for name, sae in saes.items()}
            clip.encode_image(pixels)
        for i, (name, sae) in enumerate(saes.items()):
            codes = traces[name].codes
            of = labels.repeat_interleave(codes.shape[1])
            cell = of[codes.rows] * sae.d_sae + codes.indices
            force = codes.values.relu() * sae.directions(list(range(sae.d_sae))).norm(dim=1).detach()[codes.indices]
            if codes.scale is not None:
                force = force * codes.scale[codes.rows]
            fired[name] += torch.bincount(cell, minlength=n * sae.d_sae).reshape(n, -1)
            strong[name] += torch.bincount(cell, weights=force.double(), minlength=n * sae.d_sae).reshape(n, -1)
            if i == 0:
                positions += torch.bincount(of, minlength=n)
    scores = {}
    for name in saes:
        often, strongly = fired[name] / positions[:, None], strong[name] / positions[:, None]
        others = (often.nansum(0) - often.nan_to_num()) / max(1, int((positions > 0).sum()) - 1)
        scores[name] = {"frequency": often, "strength": strongly, "contrast": often - others}
    return scores


def top(scores: Tensor, n: int) -> list[int]:
    """The best n latents of a class; fewer where fewer ever fire on it."""
    best = scores.topk(min(n, len(scores)))
    return best.indices[best.values > 0].tolist()


# --------------------------------------------------------------------- measuring


def reconstruction(clip: Any, sae: sh.SAE, test: Photos) -> dict[str, float]:
    """NMSE, FVU and L0 on the test photos, all positions."""
    meter, token = ReconstructionMeter(sae.d_in, sae.d_sae), ReconstructionMeter(sae.d_in, sae.d_sae)
    for pixels in test.batches():
        with torch.no_grad(), sh.read(clip, sae) as trace:
            clip.encode_image(pixels)
        meter.update(trace.acts, trace.recons, trace.codes)
        token.update(trace.acts[:, 0], trace.recons[:, 0], trace.codes[:, 0])
    found, first = meter.summary(), token.summary()
    return {
        "L0": found["l0"],
        "NMSE": found["nmse"],
        "FVU": found["fvu"],
        "dead": found["dead"],
        "L0 CLS": first["l0"],
        "NMSE CLS": first["nmse"],
    }


def classify(
    clip: Any, sae: sh.SAE, scores: Tensor, test: Photos, classes: Tensor, counts: list[int]
) -> dict[str, Any]:
    """Accuracy clean, spliced, with each class's top n on and off, and with another class's on; mean over photos."""

    def prediction(embedding: Tensor) -> Tensor:
        return (F.normalize(embedding.float(), dim=-1) @ classes.T).argmax(-1).double()

    hits: dict[str, list[float]] = {}
    ranked = [label for label in range(len(test.names)) if not scores[label].isnan().any()]
    for label in range(len(test.names)):
        own = (test.labels == label).nonzero()[:, 0]
        if not len(own) or label not in ranked:
            continue
        other = ranked[(ranked.index(label) + 1) % len(ranked)]
        keep = {f"on {n}": top(scores[label], n) for n in counts}
        keep |= {f"drawn {n}": top(scores[other], n) for n in counts}
        drop = {"spliced": []} | {f"off {n}": top(scores[label], n) for n in counts}
        found = sh.causal.ablate_sets(
            clip, sae, test.pixels(own), prediction, ablate=drop, keep=keep, error="drop", progress=False
        )
        done = ~found.clean.isnan()
        hits.setdefault("clean", []).extend((found.clean[done] == label).tolist())
        for name, values in zip(found.names, found.values, strict=True):
            wanted = other if name.startswith("drawn") else label
            hits.setdefault(name, []).extend((values[done] == wanted).tolist())
        if not bool(done.all()):
            break
    names = ["clean", "spliced", *(f"{kind} {n}" for kind in ("on", "off", "drawn") for n in counts)]
    shares = {name: 100 * sum(hits[name]) / len(hits[name]) for name in names}
    return shares | {"photos": len(hits["clean"]), "complete": bool(done.all())}


# ----------------------------------------------------------------------- writing


def measured_before(path: Path, setting: dict[str, str], counts: list[int]) -> list[dict[str, Any]]:
    """Complete rows of an earlier table of the same model, data and counts."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    words = {"SAE", "rank", "complete", *setting}
    found = [{key: row[key] if key in words else float(row[key]) for key in row} for row in rows]
    wanted = setting | {"complete": "True"}
    return [row for row in found if wanted.items() <= row.items() and all(f"on {n}" in row for n in counts)]


def write(rows: list[dict[str, Any]], args: argparse.Namespace, n_test: int, n_train: int) -> None:
    """The table as Markdown and CSV, and a picture."""
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "clip_topn.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "# Top-n concept classification",
        "",
        f"Model `{args.model}`, data `{Path(args.data).name if args.data else 'packaged photos'}`: latents ranked on "
        f"{n_train} training photos, accuracy in % on {n_test} held-out photos, {len(args.templates)} prompt "
        "template(s). "
        "NMSE is over all positions, class token and patches.",
        "",
    ]
    for rank in args.rank:
        chosen = [row for row in rows if row["rank"] == rank]
        if chosen:
            lines += [f"## Latents ranked by {rank}", "", *markdown(chosen, args.counts), ""]
    lines += [
        '"on n": only the class\'s top n latents; "off n": all but them; "drawn n": only the top n of another class, '
        "share of photos given to that class.",
        "",
    ]
    (args.out / "clip_topn.md").write_text("\n".join(lines), encoding="utf-8")
    picture(rows, args).savefig(args.out / "clip_topn.png", dpi=80)
    print("\n".join(lines))


def markdown(rows: list[dict[str, Any]], counts: list[int]) -> list[str]:
    """Lines of a Markdown table."""
    kinds = [f"{kind} {n}" for kind in ("on", "off", "drawn") for n in counts]
    heads = ["SAE", "L0", "NMSE", "FVU", "L0 CLS", "NMSE CLS", "clean", "spliced", *kinds]
    shown = {"L0": ".1f", "NMSE": ".3f", "FVU": ".3f", "L0 CLS": ".1f", "NMSE CLS": ".3f"}
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [str(row[head]) if head == "SAE" else format(row[head], shown.get(head, ".1f")) for head in heads]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def picture(rows: list[dict[str, Any]], args: argparse.Namespace) -> Any:
    """Accuracy over n, a line for each SAE; on and off side by side, a row for each way of ranking."""
    ranks = [rank for rank in args.rank if any(row["rank"] == rank for row in rows)]
    figure, axes = figures.blank(len(ranks), 3, width=11, height=3.2 * len(ranks))
    titles = {"on": "only the class's top n", "off": "all but the top n", "drawn": "drawn to another class"}
    for i, rank in enumerate(ranks):
        for j, (kind, title) in enumerate(titles.items()):
            lines = {
                row["SAE"]: (args.counts, [row[f"{kind} {n}"] for n in args.counts])
                for row in rows
                if row["rank"] == rank
            }
            ax = axes[3 * i + j]
            figures.effect_curves(lines, xlabel="n", ylabel="% of photos", title=f"{title} (by {rank})", ax=ax)
            ax.set(xscale="log", ylim=(0, None))
            ax.set_xticks(args.counts, [str(n) for n in args.counts])
    return figure


if __name__ == "__main__":
    main()
