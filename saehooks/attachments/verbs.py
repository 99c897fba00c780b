"""The one primitive, ``attach``, and the verbs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import Tensor

from saehooks import edits as edit
from saehooks.attachments.attachment import Attachment
from saehooks.attachments.foreign import warn
from saehooks.attachments.request import answering, check, refuse_unknown, requested, spread
from saehooks.attachments.transcoder import attachment_of
from saehooks.edits import EditFunction, Value, as_edits
from saehooks.errors import ConfigError
from saehooks.hosts import host as host_of
from saehooks.hosts.sequences import SequenceWatch
from saehooks.hosts.torch_compile import uncompiled
from saehooks.sae import SAE, SparseCoder
from saehooks.trace import Trace, Traces
from saehooks.where import Came, where_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """What every verb takes beside its own arguments; see `attach`."""

    at: str | None
    head: int | None
    where: Any
    error: Literal["keep", "drop"]
    keep_all: bool
    grads: bool


SAEs = Mapping[Any, SAE] | Iterable[SAE]
"""Several SAEs: by site name or (site name, head), or a list of SAEs that know their site. A block gives `Traces`."""

# --------------------------------------------------------------------- the verbs


@overload
def read(model: Any, sae: SAE, **options: Unpack[Options]) -> AbstractContextManager[Trace]: ...
@overload
def read(model: Any, sae: SAEs, **options: Unpack[Options]) -> AbstractContextManager[Traces]: ...
@answering("with sh.read(model, sae) as trace: model(tokens)")
def read(model: Any, sae: Any, **options: Unpack[Options]) -> AbstractContextManager[Any]:
    """``with sh.read(model, sae) as trace:`` records the codes and changes nothing: outputs are bit-identical.

    Args:
        model, sae, options: as in `attach`, whose ``saes`` may be several.
    """
    return attach(model, sae, **options)


@overload
def splice(
    model: Any, sae: SAE, edits: EditFunction | Iterable[EditFunction] = (), **options: Unpack[Options]
) -> AbstractContextManager[Trace]: ...
@overload
def splice(
    model: Any, sae: SAEs, edits: EditFunction | Iterable[EditFunction] = (), **options: Unpack[Options]
) -> AbstractContextManager[Traces]: ...
@answering("with sh.splice(model, sae): model(tokens)")
def splice(
    model: Any, sae: Any, edits: EditFunction | Iterable[EditFunction] = (), **options: Unpack[Options]
) -> AbstractContextManager[Any]:
    """``with sh.splice(model, sae) as trace:`` the site carries the reconstruction, its error dropped.

    Args:
        model, sae, edits, options: as in `attach`.
    """
    options.setdefault("error", "drop")
    return attach(model, sae, edits=edits, **options)


@overload
def ablate(
    model: Any, sae: SAE, latents: int | Iterable[int] | Tensor, **options: Unpack[Options]
) -> AbstractContextManager[Trace]: ...
@overload
def ablate(
    model: Any, sae: SAEs, latents: int | Iterable[int] | Tensor, **options: Unpack[Options]
) -> AbstractContextManager[Traces]: ...
@answering("with sh.ablate(model, sae, [1204, 77]): model(tokens)")
def ablate(
    model: Any, sae: Any, latents: int | Iterable[int] | Tensor, **options: Unpack[Options]
) -> AbstractContextManager[Any]:
    """``with sh.ablate(model, sae, [1204, 77]):`` sets latents to zero; the reconstruction error is kept.

    Args:
        latents: one latent or several.
        model, sae, options: as in `attach`.
    """
    return attach(model, sae, edits=edit.zero(latents), **options)


@overload
def clamp(
    model: Any, sae: SAE, values: Mapping[int, Value], **options: Unpack[Options]
) -> AbstractContextManager[Trace]: ...
@overload
def clamp(
    model: Any, sae: SAEs, values: Mapping[int, Value], **options: Unpack[Options]
) -> AbstractContextManager[Traces]: ...
@answering("with sh.clamp(model, sae, {901: 8.0}): model(tokens)")
def clamp(model: Any, sae: Any, values: Mapping[int, Value], **options: Unpack[Options]) -> AbstractContextManager[Any]:
    """``with sh.clamp(model, sae, {901: 8.0}, where=sh.last):`` sets latents to values, selected there or not.

    Args:
        values: from latent to a number, or to a tensor that broadcasts to (batch, pos). How large a value is for this
            SAE, ``trace.codes.of(901).max()`` of a read tells.
        model, sae, options: as in `attach`.
    """
    return attach(model, sae, edits=edit.clamp(values), **options)


@overload
def scale(
    model: Any, sae: SAE, factors: Mapping[int, Value], **options: Unpack[Options]
) -> AbstractContextManager[Trace]: ...
@overload
def scale(
    model: Any, sae: SAEs, factors: Mapping[int, Value], **options: Unpack[Options]
) -> AbstractContextManager[Traces]: ...
@answering("with sh.scale(model, sae, {9: 0.5}): model(tokens)")
def scale(
    model: Any, sae: Any, factors: Mapping[int, Value], **options: Unpack[Options]
) -> AbstractContextManager[Any]:
    """``with sh.scale(model, sae, {9: 0.5}):`` multiplies latents where they are selected.

    Args:
        factors: from latent to a number, or to a tensor that broadcasts to (batch, pos).
        model, sae, options: as in `attach`.
    """
    return attach(model, sae, edits=edit.scale(factors), **options)


@overload
def steer(
    model: Any, sae: SAE, deltas: Mapping[int, Value], **options: Unpack[Options]
) -> AbstractContextManager[Trace]: ...
@overload
def steer(
    model: Any, sae: SAEs, deltas: Mapping[int, Value], **options: Unpack[Options]
) -> AbstractContextManager[Traces]: ...
@answering("with sh.steer(model, sae, {901: 4.0}): model(tokens)")
def steer(model: Any, sae: Any, deltas: Mapping[int, Value], **options: Unpack[Options]) -> AbstractContextManager[Any]:
    """``with sh.steer(model, sae, {901: +4.0}):`` adds to latents, selected there or not.

    Args:
        deltas: from latent to a number, or to a tensor that broadcasts to (batch, pos); scale as for `clamp`.
        model, sae, options: as in `attach`.
    """
    return attach(model, sae, edits=edit.add(deltas), **options)


# ----------------------------------------------------------------- the primitive


class AttachOptions(Options, total=False):
    """What `attach` takes beside the model and the SAEs."""

    edits: Any


@overload
def attach(model: Any, saes: SAE, **options: Unpack[AttachOptions]) -> AbstractContextManager[Trace]: ...
@overload
def attach(model: Any, saes: SAEs, **options: Unpack[AttachOptions]) -> AbstractContextManager[Traces]: ...
@answering("with sh.attach(model, sae, edits=[sh.edits.zero([3]), my_function]) as trace: model(tokens)")
@contextmanager
def attach(
    model: Any,
    saes: Any,
    *,
    at: str | None = None,
    head: int | None = None,
    edits: Any = (),
    where: Any = None,
    error: Literal["keep", "drop"] = "keep",
    keep_all: bool = False,
    grads: bool = False,
    **unknown: Any,
) -> Iterator[Any]:
    """``with sh.attach(model, sae, edits=[sh.edits.zero([3]), mine]) as trace:`` the primitive under all verbs.

    Args:
        model: a TransformerLens model, an open_clip model, or any ``nn.Module``.
        saes: one SAE; or a mapping from site name, or ``(site name, head)``, to SAE; or a list of SAEs that know
            their site.
        at: the site of one SAE, a name that ``sh.sites(model)`` lists; left out, the SAE's own ``hook_name``. For a
            transcoder ``(site it reads, site it writes)``; its edits and its reconstruction are for the second.
        head: at a site with attention heads, the one to attach to; left out, the heads joined.
        edits: a function ``(codes) -> codes`` or ``(codes, context) -> codes``, or several, run in order.
            ``sh.edits`` makes the usual ones. With several SAEs, also a mapping by the keys of ``saes``.
        where: the positions to act at, elsewhere nothing changes: see `saehooks.where`. Left out, where the SAE was
            trained: for ours, all but the first position of each text. With several SAEs, also a mapping by the keys
            of ``saes``.
        error: ``"keep"`` adds what the edits change to the activation, ``"drop"`` puts the edited reconstruction in
            its place.
        keep_all: record every forward, in ``trace.forwards``; otherwise the last.
        grads: keep the gradient at each latent, in ``trace.grads``. It changes no output.
    Returns:
        A context manager. It gives a `Trace`, or `Traces` by site where ``saes`` is a mapping or a list.
    Raises:
        SiteError, WidthError, LatentError, WhereError, ConfigError: on entering, before any hook is registered;
            at the first forward, where only then it can be known.
        NeverFiredError: on leaving, when no forward went through a site.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    >>> sae = SAE(d_in=8, d_sae=16, hook_name="0")
    >>> with attach(model, sae, edits=edit.clamp({3: 2.0}), where=[0]) as trace:
    ...     y = model(torch.randn(1, 3, 4))
    >>> trace.edited.of(3)[0, 0]
    tensor(2.)
    """
    refuse_unknown("attach", unknown, AttachOptions.__annotations__ | Options.__annotations__)
    if error not in ("keep", "drop"):
        raise ConfigError(f"error={error!r}; expected 'keep' or 'drop'")
    host = host_of(model)
    requests = requested(saes, at, head)
    edits_of = spread("edits", edits if isinstance(edits, Mapping) else as_edits(edits), requests, ())
    rules = spread("where", where, requests, None)
    attachments: dict[Any, Attachment] = {}
    for key, (name, which_head, sae, out) in requests.items():
        site = host.site(name, which_head).of_width(sae.d_in)
        rule, own_edits = where_of(sae, rules[key]), as_edits(edits_of[key])
        given = own_edits, rule, error, grads, Trace(site.name, keep_all), Came(rule)
        attachments[key] = attachment_of(host, site, sae, *given, out=out)
    check(attachments.values())
    with ExitStack() as hooks:
        hooks.enter_context(uncompiled())
        watch = SequenceWatch(host)
        hooks.enter_context(watch.watching(hook for one in attachments.values() for hook in one.hooks(watch)))
        traces = {key: attachment.trace for key, attachment in attachments.items()}
        yield traces[None] if isinstance(saes, SparseCoder) else Traces(traces)
    for attachment in attachments.values():  # not reached when the block failed
        attachment.check_used(watch.calls)
        if attachment.changes and watch.awaits_gradients(attachment.site):
            warn(
                f"a forward past '{attachment.site.name}' was checkpointed (use_reentrant=True) and never ran again "
                "inside the block: call backward inside it, or its gradients are those of a model without the edits"
            )
