"""Dictionaries: how scores come from an activation, and how codes become a reconstruction. One file each."""

from saehooks.dictionaries.base import Dictionary, Prepared
from saehooks.dictionaries.concepts import ConceptDictionary
from saehooks.dictionaries.kron import KronDictionary
from saehooks.dictionaries.linear import LinearDictionary

KINDS: tuple[type[Dictionary], ...] = (ConceptDictionary, LinearDictionary, KronDictionary)

DICTIONARIES: dict[str, type[Dictionary]] = {kind.name: kind for kind in KINDS}

__all__ = ["DICTIONARIES", "ConceptDictionary", "Dictionary", "KronDictionary", "LinearDictionary", "Prepared"]
