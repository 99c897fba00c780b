"""The two towers of a CLIP of any library: which one a module is in, and by which methods they are called."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

ENCODERS = (("encode_image", "encode_text"), ("get_image_features", "get_text_features"))
"""What models of two towers offer: open_clip's and OpenAI's, Hugging Face's."""

SIDES = {"visual": ("visual", "vision", "image"), "text": ("text", "language")}
"""How the modules of each tower are called."""


def two_towers(model: nn.Module) -> nn.Module | None:
    """The model of two towers that a model is, or that is somewhere inside it; None if there is none."""
    return next((one for one in model.modules() if any(_offers(one, names) for names in ENCODERS)), None)


def tower_of(model: nn.Module, module: nn.Module) -> str | None:
    """``"visual"`` or ``"text"``: the tower that a module is in; None in models of another kind."""
    clip = two_towers(model)
    if clip is None:
        return None
    path = next((path for path, one in clip.named_modules() if one is module), "")
    top = path.split(".")[0]
    return next((side for side, words in SIDES.items() if any(word in top for word in words)), None)


def tower_calls(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The (module, method name) pairs by which the towers of a model are called."""
    clip = two_towers(model)
    for owner in {id(one): one for one in (model, clip) if one is not None}.values():
        for name in (name for names in ENCODERS for name in names):
            if callable(getattr(owner, name, None)):
                yield owner, name
    for name, child in () if clip is None else clip.named_children():
        if any(word in name for words in SIDES.values() for word in words) and "proj" not in name:
            yield child, "forward"


def _offers(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(callable(getattr(type(module), name, None)) for name in names)
