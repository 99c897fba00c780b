"""The comparison of models that put out embeddings: how far they move, and zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saehooks.errors import ConfigError
from saehooks.evaluation.comparison import Call, Comparison, Passage
from saehooks.hosts import Host

RUNS = ("clean", "spliced", "zero")
SIDES = {"visual": ("image_embeds", "image_features"), "text": ("text_embeds", "text_features")}
"""The names of the two embeddings in an output that holds both."""


class EmbeddingComparison(Comparison):
    """Cosine with the clean embedding and, given prompts and labels, zero-shot accuracy.

    Args:
        host: the model.
        tower: ``"visual"`` or ``"text"``, whichever the site is in; None for a model of one tower.
        prompts, labels, tokenizer: as in `saehooks.evaluation`.
    """

    nothing_found = "no embedding of shape (batch, embed_dim) came out of this call"

    def __init__(self, host: Host, tower: str | None, prompts: Any, labels: Any, tokenizer: Any) -> None:
        self.host, self.model, self.tower = host, host.model, tower
        self.labels: Tensor | None = None
        """Labels of the next call's images."""
        if prompts is None and labels is not None:
            raise ConfigError("labels= needs prompts=, one for each class, to classify by")
        if prompts is not None and tower == "text":
            raise ConfigError("zero-shot accuracy is about images; leave out prompts= at a site of the text tower")
        self._classes = None if prompts is None else class_embeddings(self.model, prompts, tokenizer)
        self._all_labels = None if labels is None else torch.as_tensor(labels).reshape(-1)
        self._sums = torch.zeros(5, dtype=torch.float64)  # cosine spliced, cosine zero, hits of the three runs
        self._rows = 0

    def entry_points(self) -> Iterable[tuple[nn.Module, str]]:
        return self.host.entry_points()

    def check(self, call: Call) -> None:
        inputs = next((value for value in call.tensors if value.dim() == 4), None)
        if inputs is None or self._classes is None:
            return
        labels = self._labels_of(len(inputs))
        if labels is None:
            raise ConfigError(
                "zero-shot accuracy needs labels: give all of them as labels=, or set live.labels before each call"
            )
        if labels.shape != (len(inputs),):
            raise ConfigError(
                f"one label per image: got {len(inputs)} images and labels of shape {tuple(labels.shape)}"
            )
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(self._classes):
            raise ConfigError(
                f"labels must lie in 0 .. {len(self._classes) - 1}, one of the {len(self._classes)} prompts"
            )

    def _labels_of(self, n: int) -> Tensor | None:
        """The labels of the next n images."""
        if self.labels is not None:
            return self.labels
        return None if self._all_labels is None else self._all_labels[self._rows : self._rows + n]

    def rerun(self, call: Call) -> Any:
        return call()

    def compared(self, output: Any) -> Tensor | None:
        return embedding_of(output, self.tower)

    def targets(self, call: Call, passage: Passage, output: Any) -> Tensor | None:
        """(batch,) int64 labels of the images, None without prompts."""
        embedding = self.compared(output)
        return None if self._classes is None or embedding is None else self._labels_of(len(embedding))

    def reduce(self, output: Tensor, targets: Any) -> Tensor:
        return output

    def add(self, targets: Tensor | None, clean: Tensor, spliced: Tensor, zero: Tensor) -> None:
        runs = [F.normalize(run.detach().float(), dim=-1) for run in (clean, spliced, zero)]
        sums = [(runs[0] * run).sum() for run in runs[1:]]
        if self._classes is not None and targets is not None:
            classes = self._classes.to(clean.device)
            sums += [((run @ classes.T).argmax(-1) == targets.to(clean.device)).sum() for run in runs]
            self.labels = None  # stale labels must not be used for the next images
        else:
            sums += [sums[0].new_zeros(())] * 3
        self._sums += torch.stack([value.cpu().double() for value in sums])
        self._rows += len(clean)

    def set_labels(self, labels: Any) -> None:
        self.labels = torch.as_tensor(labels)

    def offer_labels(self, labels: Any) -> None:
        """Use the labels (batch,) of a loader, where accuracy is measured and no other labels were given."""
        if self._classes is not None and self._all_labels is None:
            self.set_labels(labels)

    def summary(self) -> dict[str, float]:
        n = max(1, self._rows)
        spliced, zero, *hits = (self._sums / n).tolist()
        figures: dict[str, float] = {"cos_spliced": spliced, "cos_zero": zero}
        if self._classes is not None:
            figures |= {f"acc_{run}": share for run, share in zip(RUNS, hits, strict=True)}
        return figures | {f"n_{self._inputs}": self._rows}

    @property
    def _inputs(self) -> str:
        return "texts" if self.tower == "text" else "images"

    def rows(self) -> list[dict[str, Any]]:
        s = self.summary()
        table: list[dict[str, Any]] = [
            {"": "cosine with clean", "clean": 1.0, "spliced": s["cos_spliced"], "zero-ablated": s["cos_zero"]}
        ]
        if self._classes is not None:
            accuracies = {
                name: s[f"acc_{run}"] for name, run in zip(("clean", "spliced", "zero-ablated"), RUNS, strict=True)
            }
            table.append({"": "zero-shot accuracy", **accuracies})
        return table

    def figures(self) -> dict[str, Any]:
        return {self._inputs: self._rows}

    def how_to_call(self) -> str:
        if self.tower is None:
            return "call model(images) inside the block"
        call = "encode_text(tokens)" if self.tower == "text" else "encode_image(images)"
        return f"the site is in the {self.tower} tower, so call model.{call} inside the block"


def embedding_of(output: Any, tower: str | None = None) -> Tensor | None:
    """(batch, embed_dim): the embedding in what a model returned; None if there is none.

    Args:
        output: a tensor; or an output that holds one, or those of both towers.
        tower: whose embedding to take where both are there.
    """
    for name in (*SIDES.get(tower or "", ()), "pooler_output", "logits"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor) and found.dim() == 2:
            return found
    if isinstance(output, (tuple, list)):
        pooled = [one for one in output if isinstance(one, Tensor) and one.dim() == 2]
        # CLIP.forward gives (image, text, scale); a tower alone its embedding, perhaps with the tokens behind it.
        output = pooled[1] if tower == "text" and len(pooled) > 1 else next(iter(pooled), None)
    return output if isinstance(output, Tensor) and output.dim() == 2 else None


def class_embeddings(model: Any, prompts: Any, tokenizer: Any = None) -> Tensor:
    """One unit embedding for each class.

    Args:
        model: the CLIP.
        prompts: strings, one for each class; lists of strings, whose embeddings are averaged; token ids (classes,
            context); or embeddings (classes, embed_dim).
        tokenizer: for strings; open_clip's byte-pair tokenizer when left out.
    Returns:
        (classes, embed_dim) float32.
    Raises:
        ConfigError: no prompt, or a model whose tokenizer has to be given.
    """
    if isinstance(prompts, Tensor) and prompts.is_floating_point():
        return F.normalize(prompts.detach().float(), dim=-1)
    if isinstance(prompts, Tensor):
        return _embed(model, prompts)
    groups = [[one] if isinstance(one, str) else list(one) for one in prompts]
    if not groups or not all(groups):
        raise ConfigError("prompts= is empty: give one prompt, or a list of prompts, for each class")
    every = [prompt for group in groups for prompt in group]
    read = _tokenizer(model, tokenizer)
    tokens = read(every, padding=True, return_tensors="pt") if hasattr(read, "pad_token") else read(every)
    parts = _embed(model, tokens).split([len(group) for group in groups])
    return F.normalize(torch.stack([part.mean(0) for part in parts]), dim=-1)


def _embed(model: Any, tokens: Any) -> Tensor:
    """(texts, embed_dim) unit embeddings of token ids, or of what a Hugging Face tokenizer returns."""
    device = next(model.parameters()).device
    given = {name: value.to(device) for name, value in tokens.items()} if isinstance(tokens, Mapping) else None
    with torch.no_grad():
        if hasattr(model, "encode_text"):
            found = model.encode_text(tokens.to(device) if given is None else given["input_ids"])
        elif hasattr(model, "get_text_features"):
            found = (
                model.get_text_features(**given) if given is not None else model.get_text_features(tokens.to(device))
            )
        else:
            raise ConfigError("prompts= need a model with a text tower; give embeddings (classes, embed_dim) instead")
    found = getattr(found, "pooler_output", found)  # of transformers 5
    return F.normalize(found.float(), dim=-1)


def _tokenizer(model: Any, tokenizer: Any) -> Any:
    """The tokenizer given, or open_clip's own where the model's vocabulary is the one it writes."""
    if tokenizer is not None:
        return getattr(tokenizer, "tokenizer", tokenizer) if hasattr(tokenizer, "image_processor") else tokenizer
    if hasattr(model, "get_text_features"):
        raise ConfigError("prompts as text need tokenizer=, or a processor, of this model")
    vocabulary = getattr(model, "vocab_size", None) or getattr(getattr(model, "text", None), "vocab_size", None)
    if vocabulary != 49408:
        raise ConfigError(
            f"this model has a vocabulary of {vocabulary}, not that of CLIP's own tokenizer; "
            "write tokenizer=open_clip.get_tokenizer(name)"
        )
    from open_clip import SimpleTokenizer

    context = getattr(model, "context_length", None) or getattr(getattr(model, "text", None), "context_length", 77)
    return SimpleTokenizer(context_length=context)
