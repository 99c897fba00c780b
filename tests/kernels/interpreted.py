"""Triton's interpreter without work that it does again and again: half the time of kernels that call others."""

from __future__ import annotations

from triton import language
from triton.runtime import interpreter


def patch_language_once() -> None:
    """A launch replaces the operations of Triton's language. Each call of one kernel function by another then looks
    through the language for more of them, 1,300 times in a training step, and finds none: it need not look."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another release of Triton does it in another way
    patch = interpreter._patch_lang

    def patched(function):
        modules = [one for one in function.__globals__.values() if one is language or one is language.core]
        if not modules or any(language.core.is_builtin(module.load) for module in modules):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patched
