"""What a model was made to predict, as far as its class says."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

BY_LABELS = re.compile(r".*For(MaskedLM|PreTraining|\w*Classification|QuestionAnswering|MultipleChoice|\w*Prediction)")
NEXT_TOKEN = re.compile(r".*(ForCausalLM|LMHeadModel)")


class Objective:
    """What the classes of Hugging Face say of a model, however it is wrapped; nothing of other models.

    Args:
        model: the model, or what wraps it.
    """

    def __init__(self, model: nn.Module) -> None:
        found = next((one for one in model.modules() if _is_known(one)), None)
        self._name = "" if found is None else type(found).__name__
        self._encoder_decoder = bool(getattr(getattr(found, "config", None), "is_encoder_decoder", False))
        cfg: Any = getattr(model, "cfg", None)
        self._bidirectional = getattr(cfg, "attention_dir", None) == "bidirectional"

    @property
    def why_labels(self) -> str | None:
        """Why only labels can say what it predicts; None if it may be the next token."""
        if self._encoder_decoder:
            return f"{self._name} reads one text and writes another"
        if BY_LABELS.fullmatch(self._name):
            return f"{self._name} does not predict the next token"
        return "its attention sees later tokens" if self._bidirectional else None

    @property
    def shifts_labels(self) -> bool | None:
        """Whether its loss compares each column with the label of the next one; None if that is not known."""
        if not self._name:
            return None
        return not self._encoder_decoder and NEXT_TOKEN.fullmatch(self._name) is not None


def _is_known(module: nn.Module) -> bool:
    if not hasattr(module, "config"):
        return False
    name = type(module).__name__
    encoder_decoder = getattr(module.config, "is_encoder_decoder", False) is True
    return encoder_decoder or bool(BY_LABELS.fullmatch(name) or NEXT_TOKEN.fullmatch(name))
