"""What do the latents of a CLIP's SAE stand for? One page of pictures.

    python recipes/clip_concepts.py                                    # packaged photos and SAE
    python recipes/clip_concepts.py --data photos.npz --sae saes/mine --latents 17 204 --out out/concepts.html
    python recipes/clip_concepts.py --model open_clip:ViT-B-16/openai --sae saes/vit --data pictures/

For each latent: the five photos on which it is strongest, each above the same photo with the patches lit where it
fires. For each photo: its strongest latents, and how many latents each patch uses, as a map; then the photos whose
patches use most latents, and fewest.

Which latents are shown, unless --latents says: for each class those whose share of class tokens, then of patches, on
which they fire exceeds that on other classes most (--per-class of each), and --random ones of all that fire on at
least five photos. None is chosen by its looks.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_common import Photos, load_photos, open_clip_model, parser_of, say
from PIL import Image
from torch import Tensor

import saehooks as sh
from saehooks.demo.data import ASSETS
from saehooks.errors import ConfigError
from saehooks.show import html

SIDE = 64
"""Largest side of a picture on the page, in stored pixels; the browser enlarges it."""

TOKEN = "Latents of the class token: strongest there"
PATCHES = "Latents of patches: strongest on any patch"
RANDOM = "Latents drawn at random: strongest on any patch"

STYLE = """<style>
.concepts{display:grid;grid-template-columns:repeat(auto-fill,minmax(27em,1fr));gap:1.4em 2em}
.concept figure{margin:0}.concept img{image-rendering:pixelated;width:100%;border-radius:3px}
.concept h3{margin:.2em 0}.concept p{margin:.2em 0;font-size:.88em;opacity:.85}
.strip img{image-rendering:pixelated;width:100%;max-width:52em;border-radius:3px}
</style>"""


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sae", default=str(ASSETS / "sae-tinyclip-l4"), help="folder or hub id")
    parser.add_argument("--split", default="test", choices=["train", "test"])
    parser.add_argument("--limit", type=int, help="at most so many photos")
    parser.add_argument("--latents", type=int, nargs="+", help="show these")
    parser.add_argument("--per-class", type=int, default=1)
    parser.add_argument("--random", type=int, default=10)
    parser.add_argument("--photos", type=int, default=8, help="photos whose own latents are shown")
    parser.add_argument("--out", type=Path, default=Path("out/clip_concepts.html"))
    args = parser.parse_args(argv)

    opened = open_clip_model(args.model)
    sae = sh.load(args.sae)
    photos = load_photos(args.data, args.split, opened.preprocess).first(args.limit)
    survey = look(opened.model, sae, photos)
    chosen = choose(survey, photos, args)
    say(f"drawing {sum(map(len, chosen.values()))} latents over {len(survey.peak)} photos")
    sections = []
    for heading, latents in chosen.items():
        strength = survey.token if heading == TOKEN else survey.peak
        cards = [
            latent_card(opened.model, sae, strength[:, latent], survey.share[:, latent], photos, latent, why)
            for latent, why in latents
        ]
        if cards:
            sections.append(html.Section(heading).add(STYLE, f'<div class="concepts">{"".join(cards)}</div>'))
    sections.append(photo_section(opened.model, sae, survey, photos, args.photos))
    sections.append(complexity_section(opened.model, sae, survey, photos))
    lead = (
        f"SAE `{Path(args.sae).name}` ({sae.d_sae:,} latents, {sae.cfg.activation}) at `{sae.hook_name}` of "
        f"`{args.model}`, over {len(survey.peak)} {args.split} photos of "
        f"`{Path(args.data).name if args.data else 'the package'}`. {len(survey.silent)} latents never fire on them."
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(html.page("What a CLIP's latents stand for", sections, lead=lead), encoding="utf-8")
    print(f"{args.out}: {sum(map(len, chosen.values()))} latents, {args.out.stat().st_size / 1e6:.2f} MB")


# ------------------------------------------------------------------------ looking


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over all photos found."""

    peak: Tensor
    """(photos, d_sae) strongest value of each latent on any patch."""
    share: Tensor
    """(photos, d_sae) share of patches on which it fires."""
    size: Tensor
    """(photos,) mean support size of the patches."""
    token: Tensor
    """(photos, d_sae) value of each latent on the class token."""
    token_size: Tensor
    """(photos,) support size of the class token."""

    @property
    def silent(self) -> list[int]:
        """Latents that fire on no patch of any photo."""
        return (self.share.sum(0) == 0).nonzero()[:, 0].tolist()


def look(clip: Any, sae: sh.SAE, photos: Photos) -> Survey:
    """One pass over the photos; an interrupt keeps those that were done."""
    peaks, shares, sizes, tokens, token_sizes = [], [], [], [], []
    try:
        for pixels in photos.batches(32):
            codes = patch_codes(clip, sae, pixels)
            patches = codes[:, 1:]
            image = patches.rows // patches.shape[1]
            cell = image * sae.d_sae + patches.indices
            empty = torch.zeros(len(pixels) * sae.d_sae)
            peaks.append(empty.scatter_reduce(0, cell, patches.values, "amax").reshape(-1, sae.d_sae).half())
            counts = torch.bincount(cell, minlength=len(empty)).reshape(-1, sae.d_sae)
            shares.append((counts / patches.shape[1]).half())
            sizes.append(patches.support_size.float().mean(1))
            tokens.append(codes[:, 0].dense().half())
            token_sizes.append(codes.support_size[:, 0].float())
    except KeyboardInterrupt:
        if not peaks:
            raise
        say(f"interrupted: the page shows the first {sum(map(len, peaks))} photos")
    found = [torch.cat(parts).float() for parts in (peaks, shares, sizes, tokens, token_sizes)]
    return Survey(*found)


def patch_codes(clip: Any, sae: sh.SAE, pixels: Tensor) -> sh.Codes:
    """Codes of the class token and all patches, (photos, 1 + patches)."""
    with torch.no_grad(), sh.read(clip, sae) as trace:
        clip.encode_image(pixels)
    return trace.codes


def grid_of(patches: int) -> tuple[int, int]:
    """Rows and columns of the patches of a square picture."""
    side = round(patches**0.5)
    if side * side != patches:
        raise ConfigError(
            f"{patches} patches are no square; this recipe draws maps of square pictures with a class token"
        )
    return side, side


def choose(survey: Survey, photos: Photos, args: argparse.Namespace) -> dict[str, list[tuple[int, str]]]:
    """Latents to show under each heading, each with what is said of it."""
    if args.latents:
        wrong = [latent for latent in args.latents if not 0 <= latent < survey.peak.shape[1]]
        if wrong:
            raise ConfigError(
                f"latent {wrong[0]} is out of range: this SAE has latents 0 to {survey.peak.shape[1] - 1}"
            )
        for latent in set(args.latents) & set(survey.silent):
            say(f"latent {latent} never fires on a patch of these photos, so it has no picture")
        return {PATCHES: [(latent, "") for latent in args.latents if latent not in survey.silent]}
    labels, chosen = photos.labels[: len(survey.peak)], {TOKEN: [], PATCHES: [], RANDOM: []}
    taken: set[int] = set()
    for heading, fired in ((TOKEN, (survey.token > 0).float()), (PATCHES, survey.share)):
        for label, name in enumerate(photos.names):
            own = labels == label
            if not own.any() or own.all():
                continue
            gain = fired[own].mean(0) - fired[~own].mean(0)
            order = gain.argsort(descending=True).tolist()
            fresh = [latent for latent in order if latent not in taken and gain[latent] > 0][: args.per_class]
            chosen[heading] += [(latent, f"first for {name}") for latent in fresh]
            taken |= set(fresh)
    living = ((survey.share > 0).sum(0) >= min(5, len(labels))).nonzero()[:, 0].tolist()
    pool = [latent for latent in living if latent not in taken]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[: args.random].tolist()
    chosen[RANDOM] = [(pool[i], "") for i in order]
    return chosen


# ------------------------------------------------------------------------ drawing


def latent_card(clip: Any, sae: sh.SAE, strength: Tensor, share: Tensor, photos: Photos, latent: int, why: str) -> str:
    """The five strongest photos of a latent, the patches where it fires lit below.

    Args:
        strength: (photos,) by which photos are ordered.
        share: (photos,) share of patches on which it fires.
    """
    best = [i for i in strength.topk(min(5, len(strength))).indices.tolist() if strength[i] > 0]
    values = patch_codes(clip, sae, photos.pixels(best)).of(latent)[:, 1:].clamp_min(0)
    maps = (values / values.max().clamp_min(1e-9)).reshape(-1, *grid_of(values.shape[1])).numpy()
    seen = [photos.seen(i) for i in best]
    picture = stack([row_of(seen), row_of([lit(image, part) for image, part in zip(seen, maps, strict=True)])])
    names = ", ".join(photos.names[int(photos.labels[i])] for i in best)
    facts = f"{names}<br>at patches: on {int((share > 0).sum())} of {len(share)} photos, {share.mean():.1%} of patches"
    shown = html.image(png(picture), f"photos on which latent {latent} is strongest: {names}", photo=True)
    heading = escape(f"Latent {latent}" + (f" · {why}" if why else ""))
    return f'<div class="concept"><h3>{heading}</h3><figure>{shown}</figure><p>{facts}</p></div>'


def photo_section(clip: Any, sae: sh.SAE, survey: Survey, photos: Photos, n: int) -> html.Section:
    """For a few photos: support sizes as a map, and the strongest latents as masks."""
    section = html.Section("Photos and their latents").add(
        html.paragraph(
            "Each row: the photo; how many latents each patch uses (brighter: more); then its five strongest latents, "
            "by the sum of their values over patches, with the patches lit where each fires."
        )
    )
    rows = torch.linspace(0, len(survey.peak) - 1, min(n, len(survey.peak))).round().long().tolist()
    codes = patch_codes(clip, sae, photos.pixels(rows))[:, 1:]
    grid = grid_of(codes.shape[1])
    for place, row in enumerate(rows):
        own = codes[place]
        total = torch.zeros(sae.d_sae).index_add(0, own.indices, own.values)
        best = total.topk(5).indices.tolist()
        image = photos.seen(row)
        maps = [own.of(latent).clamp_min(0).reshape(grid).numpy() for latent in best]
        tiles = [image, heat(own.support_size.reshape(grid).numpy(), image.shape[:2])]
        tiles += [lit(image, part / max(part.max(), 1e-9)) for part in maps]
        caption = (
            f"{photos.names[int(photos.labels[row])]}: patches use {own.support_size.min()} to "
            f"{own.support_size.max()} latents, the class token {survey.token_size[row]:.0f}; "
            f"strongest: {', '.join(map(str, best))}"
        )
        section.add(
            f'<div class="strip">{html.image(png(row_of(tiles)), caption, photo=True)}</div>', html.paragraph(caption)
        )
    return section


def complexity_section(clip: Any, sae: sh.SAE, survey: Survey, photos: Photos, n: int = 8) -> html.Section:
    """The photos whose patches use most latents, and fewest, each above its map."""
    order, n = survey.size.argsort(descending=True).tolist(), min(n, len(survey.size))
    section = html.Section("Most and least complex photos").add(
        html.paragraph(
            f"Patches use {survey.size.mean():.1f} latents on average; photos range from {survey.size.min():.1f} to "
            f"{survey.size.max():.1f}. Below each photo its patches' support sizes on one scale (brighter: more)."
        )
    )
    picked = {"Most": order[:n], "Fewest": order[-n:][::-1]}
    sizes = {
        name: patch_codes(clip, sae, photos.pixels(rows))[:, 1:].support_size.numpy() for name, rows in picked.items()
    }
    low, high = min(part.min() for part in sizes.values()), max(part.max() for part in sizes.values())
    for name, rows in picked.items():
        seen, grid = [photos.seen(row) for row in rows], grid_of(sizes[name].shape[1])
        maps = [heat(one.reshape(grid), seen[0].shape[:2], low, high) for one in sizes[name]]
        words = ", ".join(f"{photos.names[int(photos.labels[row])]} {survey.size[row]:.0f}" for row in rows)
        shown = html.image(png(stack([row_of(seen), row_of(maps)])), f"{name} latents per patch: {words}", photo=True)
        section.add(f"<h3>{name} latents per patch</h3>", f'<div class="strip">{shown}</div>', html.paragraph(words))
    return section


def lit(image: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """The picture, dark except where strength (rows, columns) in 0..1 is high."""
    weight = 0.15 + 0.85 * enlarge(strength, image.shape[:2])
    return (image * weight[..., None]).astype(np.uint8)


def heat(sizes: np.ndarray, shape: tuple[int, ...], low: float | None = None, high: float | None = None) -> np.ndarray:
    """Support sizes (rows, columns) as a picture from dark blue to bright yellow."""
    low, high = float(sizes.min() if low is None else low), float(sizes.max() if high is None else high)
    share = enlarge((sizes - low) / max(high - low, 1e-9), shape)[..., None]
    return ((1 - share) * np.array([25, 28, 80]) + share * np.array([255, 225, 70])).astype(np.uint8)


def enlarge(grid: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Each patch as a block of pixels."""
    picture = Image.fromarray(grid.astype(np.float32)).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
    return np.asarray(picture)


def row_of(tiles: list[np.ndarray]) -> np.ndarray:
    """Pictures side by side with a thin white line between."""
    small = [np.asarray(shrunk(tile)) for tile in tiles]
    gap = np.full((small[0].shape[0], 1, 3), 255, np.uint8)
    return np.concatenate([part for tile in small for part in (tile, gap)][:-1], axis=1)


def shrunk(tile: np.ndarray) -> Image.Image:
    picture = Image.fromarray(tile)
    picture.thumbnail((SIDE, SIDE))
    return picture


def png(picture: np.ndarray) -> bytes:
    """The bytes of a PNG file."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", optimize=True)
    return out.getvalue()


def stack(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of pictures below each other."""
    gap = np.full((1, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for row in rows for part in (row, gap)][:-1])


if __name__ == "__main__":
    main()
