"""CLIP's comparison: how far embeddings move, and zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saehooks.errors import ConfigError
from saehooks.evaluation.language import Call, Comparison
from saehooks.hosts import ForwardCall

RUNS = ("clean", "spliced", "zero")


class ClipComparison(Comparison):
    """Cosine with the clean embedding and, given prompts and labels, zero-shot accuracy.

    Args:
        model: the CLIP.
        tower: ``"visual"`` or ``"text"``, whichever the site is in.
        prompts, labels, tokenizer: as in `saehooks.evaluation`.
    """

    def __init__(self, model: Any, tower: str, prompts: Any, labels: Any, tokenizer: Any) -> None:
        self.model, self.tower = model, tower
        self.labels: Tensor | None = None
        """Labels of the next call's images."""
        if prompts is None and labels is not None:
            raise ConfigError("labels= needs prompts=, one for each class, to classify by")
        if prompts is not None and tower != "visual":
            raise ConfigError("zero-shot accuracy is about images; leave out prompts= at a site of the text tower")
        self._classes = None if prompts is None else class_embeddings(model, prompts, tokenizer)
        self._all_labels = None if labels is None else torch.as_tensor(labels).reshape(-1)
        self._sums = torch.zeros(5, dtype=torch.float64)  # cosine spliced, cosine zero, hits of the three runs
        self._rows = 0

    def entry_points(self) -> Iterable[tuple[nn.Module, str]]:
        inner = getattr(self.model, "visual" if self.tower == "visual" else "text", None)
        yield self.model, "encode_image" if self.tower == "visual" else "encode_text"
        if isinstance(inner, nn.Module):
            yield inner, "forward"

    def check(self, call: Call) -> None:
        inputs = next((value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)), None)
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

    def rerun(self, call: Call) -> Tensor:
        embedding = self.read(call, call.forward(*call.args, **call.kwargs))
        if embedding is None:
            raise ConfigError(
                "this call gave no embedding of shape (batch, embed_dim): call encode_image or encode_text"
            )
        return embedding

    def read(self, call: Call, output: Any) -> Tensor | None:
        if isinstance(output, (tuple, list)) and output:
            output = output[0]
        return output if isinstance(output, Tensor) and output.dim() == 2 else None

    def add(self, began: ForwardCall, clean: Tensor, spliced: Tensor, zero: Tensor) -> None:
        runs = [F.normalize(run.detach().float(), dim=-1) for run in (clean, spliced, zero)]
        sums = [(runs[0] * run).sum() for run in runs[1:]]
        if self._classes is not None:
            labels = self._labels_of(len(clean))
            classes = self._classes.to(clean.device)
            hits = [((run @ classes.T).argmax(-1) == labels.to(clean.device)).sum() for run in runs]  # type: ignore[union-attr]
            sums += hits
            self.labels = None  # stale labels must not be used for the next images
        else:
            sums += [sums[0].new_zeros(())] * 3
        self._sums += torch.stack([value.double().cpu() for value in sums])
        self._rows += len(clean)

    def summary(self) -> dict[str, float]:
        n = max(1, self._rows)
        spliced, zero, *hits = (self._sums / n).tolist()
        figures: dict[str, float] = {"cos_spliced": spliced, "cos_zero": zero}
        if self._classes is not None:
            figures |= {f"acc_{run}": share for run, share in zip(RUNS, hits, strict=True)}
        return figures | {f"n_{self._inputs}": self._rows}

    @property
    def _inputs(self) -> str:
        return "images" if self.tower == "visual" else "texts"

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
        call = "encode_image(images)" if self.tower == "visual" else "encode_text(tokens)"
        return f"the site is in the {self.tower} tower, so call model.{call} inside the block"


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
    tokens = _tokenizer(model, tokenizer)([prompt for group in groups for prompt in group])
    parts = _embed(model, tokens).split([len(group) for group in groups])
    return F.normalize(torch.stack([part.mean(0) for part in parts]), dim=-1)


def _embed(model: Any, tokens: Tensor) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        return F.normalize(model.encode_text(tokens.to(device)).float(), dim=-1)


def _tokenizer(model: Any, tokenizer: Any) -> Any:
    """The tokenizer given, or open_clip's own where the model's vocabulary is the one it writes."""
    if tokenizer is not None:
        return tokenizer
    vocabulary = getattr(model, "vocab_size", None) or getattr(getattr(model, "text", None), "vocab_size", None)
    if vocabulary != 49408:
        raise ConfigError(
            f"this model has a vocabulary of {vocabulary}, not that of CLIP's own tokenizer; "
            "write tokenizer=open_clip.get_tokenizer(name)"
        )
    from open_clip import SimpleTokenizer

    context = getattr(model, "context_length", None) or getattr(getattr(model, "text", None), "context_length", 77)
    return SimpleTokenizer(context_length=context)
