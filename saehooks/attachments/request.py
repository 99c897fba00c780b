"""What was asked for, and whether it can be: everything here runs before any hook is registered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, TypeVar

from saehooks.attachments.attachment import Attachment
from saehooks.attachments.foreign import warn, warn_if_foreign
from saehooks.attachments.resolve import check_sae, check_width, name_of
from saehooks.edits import Edit
from saehooks.errors import ConfigError, SiteError, UnknownKeywordError
from saehooks.hosts.site import Site
from saehooks.hosts.transformer_lens import MISSES_THE_STREAM
from saehooks.sae import SparseCoder

OPTIONS = ("at", "head", "where", "error", "keep_all", "grads")
"""What every verb takes beside its own arguments."""

INPUTS = ("tokens", "inputs", "input_ids", "text", "prompt", "batch", "batches", "images")
"""What people give to a verb for the model."""

Verb = TypeVar("Verb", bound=Callable[..., Any])


class Request(NamedTuple):
    """One SAE, and where it was asked for."""

    name: str
    """Name of the site that the SAE reads."""
    head: int | None
    """One attention head there, or None."""
    sae: SparseCoder
    out: str | None = None
    """Name of the site that a transcoder writes, if the user gave one."""


def requested(saes: Any, at: str | tuple[str, str] | None, head: int | None) -> dict[Any, Request]:
    """What was asked for under each key; one SAE is kept under the key None."""
    if isinstance(saes, SparseCoder):
        at, out = at if isinstance(at, tuple) else (at, None)
        return {None: Request(*name_of(saes, at, head), saes, out)}
    if at is not None or head is not None:
        raise ConfigError("at= and head= place one SAE; give several as {site name: sae} or {(site name, head): sae}")
    if isinstance(saes, Mapping):
        places = {key: key if isinstance(key, tuple) else (key, None) for key in saes}
        return {
            key: Request(name, None, _as_sae(saes[key]), more)
            if isinstance(more, str)
            else Request(name, more, _as_sae(saes[key]))
            for key, (name, more) in places.items()
        }
    if not isinstance(saes, (list, tuple)):
        saes = [_as_sae(saes)]
    found: dict[Any, Request] = {}
    for place, sae in enumerate(map(_as_sae, saes)):
        if sae.hook_name is None:
            raise SiteError(
                f"number {place} of the list of SAEs does not know its site: give them by name, as in "
                "{'blocks.8.hook_resid_pre': sae}; sh.sites(model) lists the names"
            )
        name, own_head = name_of(sae)
        key = name if own_head is None else (name, own_head)
        if key in found:
            raise SiteError(f"two SAEs were given for the site {key!r}: a site carries one; nest two blocks instead")
        found[key] = Request(name, own_head, sae)
    return found


MEANT = {
    **dict.fromkeys(("hook_name", "hook_point", "hook", "site", "layer", "name", "module", "location"), "at"),
    **dict.fromkeys(("positions", "position", "pos", "mask", "tokens", "token_positions"), "where"),
    **dict.fromkeys(("edit", "interventions", "intervention", "fn", "function"), "edits"),
    **dict.fromkeys(("keep_error", "drop_error", "error_term", "use_error_term", "errors"), "error"),
    **dict.fromkeys(("all", "keep", "record_all"), "keep_all"),
    **dict.fromkeys(("heads", "hook_head_index"), "head"),
    **dict.fromkeys(("grad", "gradients", "requires_grad", "keep_grads"), "grads"),
    **dict.fromkeys(
        ("features", "feature", "latent", "feature_ids", "feature_idx", "latent_ids", "indices", "idx"), "latents"
    ),
    **dict.fromkeys(("epochs", "n_epochs", "num_epochs"), "passes"),
    **dict.fromkeys(("learning_rate", "lr_init"), "lr"),
    **dict.fromkeys(("n_steps", "num_steps", "max_steps", "training_steps", "total_training_steps"), "steps"),
    **dict.fromkeys(("train_batch_size", "train_batch_size_tokens", "bs"), "batch_size"),
    **dict.fromkeys(("warmup", "lr_warm_up_steps", "lr_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("l1_coefficient", "l0_coefficient", "l1", "sparsity", "l1_coeff", "l0_lambda"), "loss"),
    **dict.fromkeys(("output", "output_dir", "checkpoint_path", "save_path", "folder", "path"), "out"),
    **dict.fromkeys(("context_size", "seq_len", "context_length", "max_length", "ctx_len"), "context"),
    **dict.fromkeys(("n_batches_in_buffer", "buffer_size"), "buffer_rows"),
}
"""The names of our keywords in other libraries."""


def refuse_unknown(function: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Refuse keywords that a function does not have, naming the one that was meant.

    Raises:
        UnknownKeywordError: there is one.

    >>> refuse_unknown("attach", ["hook_name"], ["at", "where"])
    Traceback (most recent call last):
    saehooks.errors.UnknownKeywordError: attach has no keyword hook_name=; did you mean at=?
    """
    known = list(known)
    for name in unknown:
        near = MEANT.get(name) if MEANT.get(name) in known else next(iter(get_close_matches(name, known, 1)), None)
        hint = f"did you mean {near}=?" if near else f"it takes {', '.join(one + '=' for one in known)}"
        raise UnknownKeywordError(f"{function} has no keyword {name}=; {hint}")


def answering(usage: str) -> Callable[[Verb], Verb]:
    """A verb that says, before anything else, how it is called when it was called in another way.

    Args:
        usage: the call, as one would write it.
    """

    def decorate(verb: Verb) -> Verb:
        shape = signature(verb)
        named = [one.name for one in shape.parameters.values() if one.kind is not one.VAR_KEYWORD]
        known = [*dict.fromkeys((*named, *OPTIONS))]

        @wraps(verb)
        def called(*args: Any, **given: Any) -> Any:
            unknown = [name for name in given if name not in known]
            if set(unknown) & set(INPUTS):
                raise UnknownKeywordError(f"{verb.__name__} does not call the model: write {usage}")
            for name in unknown:
                near = MEANT.get(name) in known or get_close_matches(name, known, 1)
                if near:
                    refuse_unknown(verb.__name__, [name], known)
            if unknown:
                raise UnknownKeywordError(f"{verb.__name__} has no keyword {unknown[0]}=; write {usage}")
            try:
                shape.bind(*args, **given)
            except TypeError as error:
                raise UnknownKeywordError(f"{verb.__name__}: {error}; write {usage}") from None
            return verb(*args, **given)

        return called  # type: ignore[return-value]

    return decorate


def refuse_others(function: Callable[..., Any], unknown: Mapping[str, Any]) -> None:
    """Refuse what a function collected in its ``**unknown``, by `refuse_unknown`.

    >>> def survey(model, *, at=None, **unknown):
    ...     refuse_others(survey, unknown)
    >>> survey(None, hook_point="blocks.8")
    Traceback (most recent call last):
    saehooks.errors.UnknownKeywordError: survey has no keyword hook_point=; did you mean at=?
    """
    parameters = signature(function).parameters.values()
    known = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
    refuse_unknown(function.__name__, unknown, known)


def _as_sae(sae: Any) -> SparseCoder:
    check_sae(sae)
    return sae


def spread(what: str, given: Any, keys: Iterable[Any], default: Any) -> dict[Any, Any]:
    """Give each SAE its own: a mapping goes by key, anything else goes to all."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(keys, given)
    keys = list(keys)
    unknown = [key for key in given if key not in keys]
    if unknown and keys == [None]:
        raise ConfigError(
            f"{what}={given!r} is a mapping by site, which goes with several SAEs; "
            "to set latents to values write edits=sh.edits.clamp({latent: value})"
        )
    if unknown:
        raise ConfigError(f"{what} names {unknown[0]!r}, which is none of the SAEs' keys: {', '.join(map(repr, keys))}")
    return {key: given.get(key, default) for key in keys}


def check(attachments: Iterable[Attachment]) -> None:
    """Check before the first forward everything that can be checked only once all parts are known."""
    places: dict[Any, Site] = {}
    for attachment in attachments:
        sae = attachment.sae
        for site, _ in attachment.places:
            if site.key in places:
                raise SiteError(
                    f"two SAEs were given for one site: '{places[site.key].requested_name}' and "
                    f"'{site.requested_name}' are the same place; a site carries one, nest two blocks instead"
                )
            places[site.key] = site
        if attachment.site.width is not None:
            check_width(sae, attachment.site, attachment.site.width)
        for one in attachment.edits:
            if isinstance(one, Edit):
                one.check(sae.d_sae)
        warn_if_foreign(sae, attachment.host, attachment.site)
        written = attachment.places[-1][0]
        if attachment.changes and written.note.startswith(MISSES_THE_STREAM):
            instead = written.name.replace("hook_resid_mid", "hook_attn_out")
            warn(f"'{written.name}': {written.note}; to change the stream there, attach at '{instead}'")
