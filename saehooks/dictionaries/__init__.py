"""Dictionaries: how scores come from an activation, and how codes become a reconstruction. One file each."""

from saehooks.dictionaries.base import Dictionary, Prepared
from saehooks.dictionaries.concepts import ConceptDictionary
from saehooks.dictionaries.linear import LinearDictionary

DICTIONARIES: dict[str, type[Dictionary]] = {kind.name: kind for kind in (ConceptDictionary, LinearDictionary)}

__all__ = ["DICTIONARIES", "ConceptDictionary", "Dictionary", "LinearDictionary", "Prepared"]
