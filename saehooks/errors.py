"""Every error a user can meet, each also the built-in error a user would expect to catch."""


class SaehooksError(Exception):
    """Base class of all errors raised by saehooks."""


class ConfigError(SaehooksError, ValueError):
    """A setting of an SAE, a trainer or a kernel that cannot work."""


class UnknownKeywordError(ConfigError, TypeError):
    """A keyword that a function does not have."""


class UnknownNameError(SaehooksError, AttributeError):
    """An attribute that does not exist, or goes by another name here."""


class SiteError(SaehooksError, ValueError):
    """A place in a model that does not exist, cannot carry an SAE, or was given twice."""


class WidthError(SaehooksError, ValueError):
    """A tensor or an SAE whose width does not fit the other side."""


class LatentError(SaehooksError, IndexError):
    """A latent outside ``0 .. d_sae - 1``."""


class WhereError(SaehooksError, ValueError):
    """A ``where`` mask of the wrong shape or type."""


class NeverFiredError(SaehooksError, RuntimeError):
    """An attached site through which no forward pass went."""


class FormatError(SaehooksError, ValueError):
    """A folder or file that is not the SAE it claims to be."""


class StorageError(SaehooksError, OSError):
    """A folder that cannot be written to: read-only, full, or a file."""


class RankError(SaehooksError, RuntimeError):
    """Another process of those that work together failed, or is gone."""


class NotFiniteError(SaehooksError, ArithmeticError):
    """NaN or infinity where a finite number is needed."""


class InexactError(SaehooksError, ArithmeticError):
    """Two ways of selecting, which must agree, did not: raised only under ``SAEHOOKS_SCREEN=check``."""
