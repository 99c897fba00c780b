"""The demo on the small CLIP: the same verbs, on photos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saehooks.attachments import ablate, read
from saehooks.codes import Codes
from saehooks.demo.data import Photos, photos
from saehooks.demo.language import Budget
from saehooks.demo.report import Report
from saehooks.evaluation import measure
from saehooks.evaluation.embeddings import class_embeddings
from saehooks.sae import SAE
from saehooks.show import figures

SHOWN = ("frog", "automobile", "ship")
"""Classes whose latents are looked at."""
PICTURED = (494, 701)
"""Latents of the packaged SAE that stand for something a person can see on a photo."""
COUNTS = (0, 1, 2, 5, 10, 20, 50)
"""How many latents are ablated."""


@dataclass(frozen=True)
class Vision:
    """A CLIP, its preprocess and tokenizer, and an SAE at a site of its visual tower."""

    clip: Any
    preprocess: Any
    tokenizer: Any
    sae: SAE
    report: Report
    budget: Budget
    pictured: tuple[int, ...] = ()
    """Latents shown on photos; by default the one of each shown class that keeps most to it."""

    def run(self) -> None:
        """Read, measure and ablate on photos."""
        test = photos("test")
        images = self._images(test)
        prompts = [f"a photo of a {name}." for name in test.class_names]
        self._read_and_measure(images, prompts, test)
        classes = class_embeddings(self.clip, prompts, self.tokenizer)
        self._classes(images, classes, test)

    def _images(self, shots: Photos) -> Tensor:
        step = max(1, len(shots.labels) // self.budget.photos)
        return torch.stack([self.preprocess(shots.pil(i)) for i in range(0, len(shots.labels), step)])

    def _labels(self, shots: Photos) -> Tensor:
        return shots.labels[:: max(1, len(shots.labels) // self.budget.photos)]

    def _read_and_measure(self, images: Tensor, prompts: list[str], shots: Photos) -> None:
        self.report.begin(
            "The same verbs on a CLIP",
            "A small open_clip model (4.5M parameters, trained on 150,000 photos of 32x32 pixels; not OpenAI's CLIP). "
            f"The SAE sits at `{self.sae.hook_name}` and reads the class token and 64 patches of each photo.",
            "with sh.measure(clip, sae, prompts=prompts, labels=labels) as live:\n    clip.encode_image(images)",
        )
        with torch.no_grad():
            clean = self.clip.encode_image(images)
            with read(self.clip, self.sae):
                same = torch.equal(self.clip.encode_image(images), clean)
            labels = self._labels(shots)
            options: dict[str, Any] = {"prompts": prompts, "labels": labels, "tokenizer": self.tokenizer}
            with measure(self.clip, self.sae, **options) as live:
                self.clip.encode_image(images)
        self.report.show(live)
        self.report.say(
            f"Embeddings with `read` attached are {'bit-identical to' if same else 'DIFFERENT from'} those without."
        )

    def _classes(self, images: Tensor, classes: Tensor, test: Photos) -> None:
        self.report.begin(
            "What does CLIP lose with a class's latents?",
            "On other photos, each latent's share in the score of each class was found by gradient times value. The "
            "latents with the largest share in one class are ablated, and the photos are classified by prompts again.",
            "with sh.read(clip, sae, grads=True) as trace:\n    score(clip.encode_image(images)).backward()\n"
            "trace.grads  # Codes: d score / d latent\n"
            "with sh.ablate(clip, sae, latents):\n    clip.encode_image(images)",
        )
        credit = self._credit(classes)
        labels = self._labels(test)
        rows, curves = [], {}
        for name in SHOWN:
            index = test.class_names.index(name)
            ranked = credit[index].argsort(descending=True).tolist()
            hits = [self._hits(images, classes, labels, ranked[:n]) for n in COUNTS]
            own = labels == index
            curves[name] = (COUNTS, [float(hit[own].float().mean()) for hit in hits])
            for n, hit in zip(COUNTS, hits, strict=True):
                if n in (0, 20):
                    others = float(hit[~own].float().mean())
                    rows.append({"class": name, "latents": n, "own accuracy": curves[name][1][COUNTS.index(n)],
                                 "accuracy of the other classes": others})  # fmt: skip
        self.report.table(rows, "zero-shot accuracy with the class's strongest latents ablated")
        figure = figures.effect_curves(curves, xlabel="latents ablated", ylabel="zero-shot accuracy of the class")
        self.report.figure(figure, "accuracy over the number of ablated latents")
        with torch.no_grad(), read(self.clip, self.sae) as trace:
            self.clip.encode_image(images)
        shares = class_shares(trace.codes[:, 1:], labels, len(classes))
        for latent in self.pictured or [int(shares[test.class_names.index(name)].argmax()) for name in SHOWN]:
            self._overlay(test, trace.codes.of(latent)[:, 1:], latent, shares[:, latent])

    def _hits(self, images: Tensor, classes: Tensor, labels: Tensor, latents: list[int]) -> Tensor:
        """(n,) bool, which photos are classified rightly while some latents are ablated."""
        with torch.no_grad(), ablate(self.clip, self.sae, latents):
            return (F.normalize(self.clip.encode_image(images), dim=-1) @ classes.T).argmax(-1) == labels

    def _credit(self, classes: Tensor) -> Tensor:
        """(classes, d_sae) share of each latent in each class's log-probability, beyond its mean share."""
        shots = photos("train")
        every = max(1, len(shots.labels) // self.budget.photos)
        labels = shots.labels[::every]
        images = torch.stack([self.preprocess(shots.pil(i)) for i in range(0, len(shots.labels), every)])
        with read(self.clip, self.sae, grads=True) as trace:
            scores = 100 * F.normalize(self.clip.encode_image(images), dim=-1) @ classes.T
            scores.log_softmax(-1).gather(1, labels[:, None]).sum().backward()
        codes = trace.codes.detach()
        credit = torch.zeros(len(classes), self.sae.d_sae)
        of_row = labels[codes.rows // codes.shape[1]]
        credit.index_put_((of_row, codes.indices), codes.values * trace.grads.values, accumulate=True)
        return credit - credit.mean(0)

    def _overlay(self, shots: Photos, patches: Tensor, latent: int, shares: Tensor) -> None:
        """The photos on which a latent is strongest, with the patches (photos, patches) where it fires."""
        side = round(patches.shape[1] ** 0.5)
        order = patches.clamp_min(0).sum(1).argsort(descending=True)[:12].tolist()
        step = max(1, len(shots.labels) // self.budget.photos)
        titles = [shots.class_names[int(shots.labels[i * step])] for i in order]
        figure = figures.concept_overlay(
            [shots.images[i * step] for i in order], patches[order].reshape(-1, side, side), titles=titles
        )
        first, second = shares.topk(2).indices.tolist()
        self.report.say(
            f"Latent {latent}: {shares[first]:.0%} of its activity is on photos of `{shots.class_names[first]}`, "
            f"{shares[second]:.0%} on `{shots.class_names[second]}`, where a tenth would be chance. The photos where "
            "it is strongest, and the patches where it fires:"
        )
        self.report.figure(figure, f"photos with the patches where latent {latent} fires", photo=True)


def class_shares(codes: Codes, labels: Tensor, n_classes: int, least: float = 0.015) -> Tensor:
    """(n_classes, d_sae) share of each latent's positive activity on patches that falls on photos of each class.

    Args:
        codes: of shape (photos, patches).
        labels: (photos,) the class of each.
        n_classes: how many there are, equally many photos of each.
        least: latents that fire on a smaller part of the patches are left out, with 0.
    """
    values, rows = codes.values.clamp_min(0), codes.rows // codes.shape[1]
    sums = torch.zeros(n_classes, codes.d_sae).index_put_((labels[rows], codes.indices), values, accumulate=True)
    often = codes.counts() >= least * codes.sizes.numel()
    return torch.where(often, sums / sums.sum(0).clamp_min(1e-12), 0.0)
