"""Which concepts move a photo from one class to another? Attribution, then exact ablation, on a CLIP.

    python recipes/clip_ablation.py                                     # packaged photos and SAE
    python recipes/clip_ablation.py --data photos.npz --pairs cat:dog truck:automobile --out out/clip_ablation.html

For a class and a rival (by default the class that CLIP most often puts second for it, on the training photos), the
logit difference of the two is attributed to all latents at once, and the best are ablated exactly; the ones that
lower it most are taken. Then, on held-out photos that CLIP gives to the class, those latents are ablated, 1, 2, 5, 10
and 20 at a time, and as many random active ones: how many photos go over to the rival, and how many anywhere else?

Last, single photos: gradient times value of every latent (attach with grads=True), then the best ablated one after
the other until the photo changes its class, with the patches where they fired.

Writes one HTML page, and the table as Markdown beside it; after each pair, so an interrupt keeps those that are done.
"""

from __future__ import annotations

import argparse
import base64
import json
from html import escape
from pathlib import Path
from typing import Any

import torch
from clip_common import Photos, load_photos, open_clip_model, parser_of, say
from clip_concepts import grid_of, lit, patch_codes, png, row_of
from torch import Tensor
from torch.nn import functional as F

import saehooks as sh
from saehooks import causal
from saehooks.demo.data import ASSETS
from saehooks.errors import ConfigError
from saehooks.evaluation.embeddings import class_embeddings
from saehooks.show import charts, html

COUNTS = (1, 2, 5, 10, 20)
DRAWS = 5
"""Random sets of each size, averaged over."""
SHOWN = 3
"""Latents whose photos stand on a pair's card."""
TITLE = "Which concepts move a photo from one class to another?"
STYLE = "<style>.strip img{image-rendering:pixelated;height:9em;border-radius:3px}</style>"


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sae", default=str(ASSETS / "sae-tinyclip-l4"), help="folder or hub id")
    parser.add_argument("--pairs", nargs="+", help="class:rival, by name; default: each class and its usual runner-up")
    parser.add_argument("--templates", nargs="+", default=["a photo of a {}."])
    parser.add_argument("--exact", type=int, default=48, help="latents ablated exactly, the best by attribution")
    parser.add_argument("--limit", type=int, help="at most so many training and test photos")
    parser.add_argument("--singles", type=int, default=6, help="single photos to follow")
    parser.add_argument("--out", type=Path, default=Path("out/clip_ablation.html"))
    parser.add_argument("--draw", type=Path, help="draw the page again, from the JSON beside it; nothing is run")
    args = parser.parse_args(argv)
    if args.draw:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page(json.loads(args.draw.read_text(encoding="utf-8"))), encoding="utf-8")
        return

    opened = open_clip_model(args.model)
    clip, sae = opened.model, sh.load(args.sae)
    train = load_photos(args.data, "train", opened.preprocess).first(args.limit)
    test = load_photos(args.data, "test", opened.preprocess).first(args.limit)
    prompts = [[template.format(name) for template in args.templates] for name in test.names]
    classes = class_embeddings(clip, prompts, opened.tokenizer)
    guesses = {"train": ranking(clip, train, classes), "test": ranking(clip, test, classes)}

    data = Path(args.data).name if args.data else "packaged photos"
    lead = (
        f"Model `{args.model}`, SAE `{Path(args.sae).name}`, `{data}`: "
        f"latents ranked on {len(train)} training photos, measured on those of {len(test)} held-out photos that CLIP "
        "classifies rightly. Reconstruction error kept."
    )
    labels = [train.names[int(label)] for label in train.labels]
    index = sh.survey(clip, sae, train.batches(), labels=labels, contexts=SHOWN, sampled=0, progress=False)

    def shown(latent: int) -> dict[str, str]:
        return {"words": index.words(latent, 2), "photos": index.context_html(latent)}

    rows: list[dict[str, Any]] = []
    moved: dict[tuple[int, int], list[int]] = {}
    try:
        for label, rival in pairs(args.pairs, train, guesses["train"]):
            own, held = right(train, guesses["train"], label), right(test, guesses["test"], label)
            name = f"{test.names[label]} → {test.names[rival]}"
            if len(own) < 5 or len(held) < 3:
                say(f"{name}: CLIP gives only {len(own)} training and {len(held)} test photos to the class; left out")
                continue
            say(name)
            found = causal.rank_latents(
                clip, sae, train.pixels(own), causal.class_logit(classes, label, rival),
                order="lowering", exact=args.exact, progress=False,
            )  # fmt: skip
            moved[label, rival] = found.top(max(COUNTS))
            rows += effects(clip, sae, test.pixels(held), classes, found, label, rival, name)
            write(args, rows, [], lead, shown)
    except KeyboardInterrupt:
        say("interrupted: the page holds the pairs that were done")
    singles = [
        follow(clip, sae, test, row, classes, int(guesses["test"][row, 0]), int(guesses["test"][row, 1]))
        for row in spread(test, guesses["test"], args.singles)
    ]
    write(args, rows, singles, lead, shown)
    print((args.out.with_suffix(".md")).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------- classes


def ranking(clip: Any, photos: Photos, classes: Tensor) -> Tensor:
    """(n, classes) int64, the classes of each photo, best first."""
    with torch.no_grad():
        return torch.cat(
            [(clip.encode_image(part) @ classes.T).argsort(1, descending=True) for part in photos.batches()]
        )


def right(photos: Photos, guesses: Tensor, label: int) -> Tensor:
    """The photos of a class that CLIP gives to it."""
    return ((photos.labels == label) & (guesses[:, 0] == label)).nonzero()[:, 0]


def pairs(asked: list[str] | None, train: Photos, guesses: Tensor) -> list[tuple[int, int]]:
    """(class, rival) pairs: those asked for, or each class with its usual runner-up."""
    if asked:
        try:
            return [(train.names.index(a), train.names.index(b)) for a, b in (pair.split(":") for pair in asked)]
        except ValueError:
            raise ConfigError(
                f"--pairs {' '.join(asked)}: write class:rival with names among {', '.join(train.names)}"
            ) from None
    found = []
    for label in range(len(train.names)):
        own = right(train, guesses, label)
        if len(own):
            found.append((label, int(guesses[own, 1].bincount().argmax())))
    return found


# ------------------------------------------------------------------------- measuring


def effects(
    clip: Any, sae: sh.SAE, pixels: Tensor, classes: Tensor, found: causal.Ranking, label: int, rival: int, name: str
) -> list[dict[str, Any]]:
    """Where held-out photos go when the best n latents are ablated, and when random active ones are."""

    def prediction(embedding: Tensor) -> Tensor:
        return (F.normalize(embedding.float(), dim=-1) @ classes.T).argmax(-1).double()

    best, active = found.top(max(COUNTS)), found.latents
    generator = torch.Generator().manual_seed(0)
    sets = {f"top {n}": best[:n] for n in COUNTS}
    for n in COUNTS:
        for draw in range(DRAWS):
            sets[f"random {n}/{draw}"] = active[torch.randperm(len(active), generator=generator)[:n]].tolist()
    measured = causal.ablate_sets(clip, sae, pixels, prediction, ablate=sets, progress=False)
    rows = []
    for n in COUNTS:
        row: dict[str, Any] = {"class → rival": name, "photos": len(pixels), "ablated": n}
        for kind in ("top", "random"):
            chosen = [i for i, one in enumerate(measured.names) if one.split("/")[0] == f"{kind} {n}"]
            values = measured.values[chosen]
            row[f"{kind}: stay %"] = 100 * float((values == label).double().mean())
            row[f"{kind}: to rival %"] = 100 * float((values == rival).double().mean())
        row["Spearman"], row["latents"] = found.agreement.spearman, best[:5]
        rows.append(row)
    return rows


def spread(test: Photos, guesses: Tensor, n: int) -> list[int]:
    """For each of n classes the first held-out photo that CLIP gives to it: no choice by looks."""
    firsts = [right(test, guesses, label)[:1].tolist() for label in range(len(test.names))]
    return [row for first in firsts for row in first][:n]


def follow(
    clip: Any, sae: sh.SAE, test: Photos, row: int, classes: Tensor, label: int, rival: int
) -> tuple[str, bytes]:
    """Ablate a photo's latents, best by attribution first, until its class changes: (what happened, picture)."""
    pixels = test.pixels([row])
    with sh.attach(clip, sae, grads=True) as trace:
        unit = F.normalize(clip.encode_image(pixels), dim=-1)
        (100 * (unit @ (classes[label] - classes[rival]))).sum().backward()
    codes = trace.codes.detach()
    credit = torch.zeros(sae.d_sae).index_add(0, codes.indices, codes.values * trace.grads.values)
    order = credit.argsort(descending=True)[: int((credit > 0).sum())].tolist()[:64]
    now, used = label, 0
    for used in range(1, len(order) + 1):
        with torch.no_grad(), sh.ablate(clip, sae, order[:used]):
            probs = (100 * F.normalize(clip.encode_image(pixels), dim=-1) @ classes.T).softmax(-1)[0]
        now = int(probs.argmax())
        if now != label:
            break
    before = float((100 * unit.detach() @ classes.T).softmax(-1)[0, label])
    text = f"{test.names[label]} ({before:.0%}; second {test.names[rival]})"
    if now == label:
        text += f": still {test.names[label]} with {used} latents ablated"
    else:
        active = len(codes.indices.unique())
        text += (
            f": becomes {test.names[now]} ({float(probs[now]):.0%}) with {used} of its {active} active latents ablated"
        )
    shown, image = order[:5], test.seen(row)
    maps = [patch_codes(clip, sae, pixels).of(latent)[0, 1:].clamp_min(0) for latent in shown]
    tiles = [
        image,
        *(lit(image, (part / part.max().clamp_min(1e-9)).reshape(grid_of(len(part))).numpy()) for part in maps),
    ]
    return f"{text}. First: {', '.join(map(str, shown))}", png(row_of(tiles))


# ------------------------------------------------------------------------- writing


def write(args: argparse.Namespace, rows: list[dict[str, Any]], singles: list[Any], lead: str, shown: Any) -> None:
    """The page, its content as JSON (from which ``--draw`` makes it again), and the table as Markdown.

    Args:
        shown: from a latent to its words and its strongest photos, as HTML.
    """
    latents = {latent for row in rows for latent in row["latents"][:SHOWN]}
    content = {
        "lead": lead,
        "rows": rows,
        "latents": {str(latent): shown(latent) for latent in sorted(latents)},
        "singles": [[text, base64.b64encode(picture).decode("ascii")] for text, picture in singles],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    args.out.write_text(page(content), encoding="utf-8")
    table = [{name: _short(value) for name, value in _told(row).items()} for row in [*means(rows), *rows]]
    lines = [f"# {TITLE}", "", lead, ""]
    if table:
        lines += ["| " + " | ".join(table[0]) + " |", "|---" * len(table[0]) + "|"]
        lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in table]
    lines += ["", *(f"- {text}" for text, _ in singles), ""]
    args.out.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


def page(content: dict[str, Any]) -> str:
    """A card with a curve for each pair, and strips of patches for single photos."""
    rows = content["rows"]
    first = html.Section("A class and its rival").add(
        html.paragraph(
            "Share of held-out photos, in percent, that stay in their class when the top latents are ablated, and when "
            "as many random active ones are (mean of five draws). Below each curve the first latents, with the photos "
            "in which each is strongest and the patches where it fires."
        )
    )
    cards = [card(part, {}) for part in _by_pair(means(rows))] if len(_by_pair(rows)) > 1 else []
    cards += [card(part, content["latents"]) for part in _by_pair(rows)]
    first.add(f'<div class="sh-cards">{"".join(cards)}</div>')
    second = html.Section("Single photos").add(
        STYLE,
        html.paragraph(
            "The first photo of each class that CLIP gets right, its latents ablated by attribution until its class "
            "changes; beside it the patches where the first five fired (all dark: only on the class token)."
        ),
    )
    for text, picture in content["singles"]:
        shown = html.image(base64.b64decode(picture), text, photo=True)
        second.add(html.paragraph(text), f'<div class="strip">{shown}</div>')
    return html.page(TITLE, [first, second] if content["singles"] else [first], lead=content["lead"])


def card(rows: list[dict[str, Any]], latents: dict[str, Any]) -> str:
    """One pair: how many photos stay, over the number of latents ablated, and what the first latents are."""
    name, last = rows[0]["class → rival"], rows[-1]
    picture = charts.curves_svg(
        [str(row["ablated"]) for row in rows],
        {"random": [row["random: stay %"] for row in rows], "top": [row["top: stay %"] for row in rows]},
        high=100.0,
        highlight=["top"],
        xlabel="latents ablated",
        label=f"{name}: share of the photos that stay in their class",
    )
    facts = f"{last['photos']} photos; with {last['ablated']} ablated {last['top: to rival %']:.0f}% go to the rival"
    known = {latent: latents[str(latent)] for latent in last["latents"][:SHOWN] if str(latent) in latents}
    thumbs = "".join(
        f"<div><small>{latent} {escape(one['words'])}</small><br>{one['photos']}</div>" for latent, one in known.items()
    )
    thumbs = f'<div class="sh-thumbs">{thumbs}</div>' if thumbs else ""
    return f'<div class="sh-card"><h3>{escape(name)}</h3><small>{facts}</small>{picture}{thumbs}</div>'


def _by_pair(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    names = dict.fromkeys(row["class → rival"] for row in rows)
    return [[row for row in rows if row["class → rival"] == name] for name in names]


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of ablated latents, the mean over pairs."""
    pairs = sorted({row["class → rival"] for row in rows})
    found = []
    for n in COUNTS if len(pairs) > 1 else ():
        own = [row for row in rows if row["ablated"] == n]
        mean: dict[str, Any] = {
            "class → rival": f"mean of {len(own)} pairs",
            "photos": sum(row["photos"] for row in own),
        }
        mean |= {"ablated": n}
        mean |= {name: sum(row[name] for row in own) / len(own) for name in rows[0] if isinstance(own[0][name], float)}
        found.append(mean | {"latents": []})
    return found


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the Markdown table."""
    told = {name: value for name, value in row.items() if name != "latents"}
    return told | {"first latents": ", ".join(map(str, row["latents"]))}


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.2f}" if abs(value) <= 1 else f"{value:.0f}"


if __name__ == "__main__":
    main()
