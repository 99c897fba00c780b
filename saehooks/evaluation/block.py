"""`measure`: each ordinary call of the model is run again with the reconstruction at the site, and with zeros there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, overload

import torch

from saehooks.attachments.request import check, refuse_unknown
from saehooks.errors import ConfigError, NeverFiredError
from saehooks.evaluation.batches import as_batches, run_batch
from saehooks.evaluation.comparison import Comparison
from saehooks.evaluation.embeddings import EmbeddingComparison
from saehooks.evaluation.logits import LogitsComparison
from saehooks.evaluation.measurement import Measurement
from saehooks.evaluation.three_runs import ThreeRuns
from saehooks.hosts import Host, Site
from saehooks.hosts import host as host_of
from saehooks.hosts.method_wrapper import replaced_method
from saehooks.hosts.reruns import is_rerun
from saehooks.hosts.torch_compile import uncompiled
from saehooks.hosts.train_mode import warn_in_train_mode
from saehooks.metrics import ReconstructionMeter
from saehooks.sae import SparseCoder
from saehooks.show.progress import panel
from saehooks.streams import checked_batches

KEYWORDS = ("batches", "at", "head", "where", "prompts", "labels", "tokenizer", "live", "on_record")


@overload
def measure(
    model: Any, sae: SparseCoder, batches: str | None = None, at: str | None = None, **options: Any
) -> AbstractContextManager[Measurement]: ...
@overload
def measure(
    model: Any, sae: SparseCoder, batches: Iterable[Any], at: str | None = None, **options: Any
) -> dict[str, float]: ...
def measure(
    model: Any,
    sae: SparseCoder,
    batches: Iterable[Any] | str | None = None,
    at: str | None = None,
    *,
    head: int | None = None,
    where: Any = None,
    prompts: Any = None,
    labels: Any = None,
    tokenizer: Any = None,
    live: bool | None = None,
    on_record: Callable[[dict[str, float]], None] | None = None,
    **unknown: Any,
) -> Any:
    """Measure what an SAE costs a model: ``sh.measure(model, sae, batches)``, or a block around calls of your own.

    ``with sh.measure(model, sae) as live:`` measures each ordinary call of the model inside the block. The call returns
    exactly what it returns without the block. Before it, the same forward runs twice without gradients: with the
    reconstruction at the site, as `splice` puts it there, then with zeros, for which the layers before the site are not
    run again. Hooks of your own fire in those runs too, in your own call last; other blocks of saehooks edit them and
    do not record them. A call that does not give logits itself (``return_type="loss"``) costs one run more.

    Logits are compared by the next token of each text, or by the labels of the call, counted as the model's own loss
    counts them (``-100`` left out, shifted or not). Models that do not predict the next token, such as masked language
    models, encoder-decoders and classifiers, need labels. Embeddings are compared by their cosine.

    Args:
        model: a language model or a CLIP of any family that saehooks knows, or any model that puts out logits.
        sae: the SAE to splice in; a transcoder is measured by what it predicts at the site that it writes.
        batches: tokens (batch, pos), images, or dicts of arguments: the model is run on each, and the summary is
            returned. Left out, a block is.
        at: the site; the SAE's own ``hook_name`` by default. May stand in the place of ``batches``.
        head: one head of a per-head site.
        where: positions to splice and to zero, as in `attach`: left out, where the SAE was trained.
        prompts: for zero-shot accuracy of CLIP images: for each class a prompt or a list of prompts; or token ids
            (classes, context); or embeddings (classes, embed_dim).
        labels: with prompts, the labels of all images in the order of the calls; or set ``live.labels`` before a call.
        tokenizer: for prompts given as text; open_clip's own by default.
        live: show a panel that follows the calls; by default only in an interactive terminal.
        on_record: called after each call with the summary so far and the number of calls as ``"step"``, thus also what
            `saehooks.training.watching` gives: ``on_record=watching.tensorboard("logs")``.
    Returns:
        The summary of `Measurement.summary`, or a context manager that gives the `Measurement`.
    Raises:
        SiteError, WidthError, ConfigError: on entering, or at the first call where only then it can be known.
        NeverFiredError: on leaving, when no call of the model went through the site, or nothing was predicted.
        WhereError: on leaving, when a position that was asked for never came.

    Source: CE recovered as in Gated SAEs (arXiv 2404.16014), with the raw figures beside it; cosine and shrinkage as in
    SAEBench's core evaluation.
    """
    refuse_unknown("measure", unknown, KEYWORDS)
    if isinstance(batches, str):
        if at is not None:
            checked_batches(batches)  # a text is no batches
        batches, at = None, batches
    if on_record is not None and not callable(on_record):
        raise TypeError(f"on_record is called with each record, got {type(on_record).__name__}")
    own = batches is not None
    block = _block(model, sae, at, head, where, prompts, labels, tokenizer, live, on_record, own_calls=own)
    if batches is None:
        return block
    with torch.no_grad(), block as found:
        for batch in as_batches(batches):
            run_batch(model, found, batch)
    return found.summary()


@contextmanager
def _block(
    model: Any,
    sae: SparseCoder,
    at: str | None,
    head: int | None,
    where: Any,
    prompts: Any,
    labels: Any,
    tokenizer: Any,
    live: bool | None,
    on_record: Callable[[dict[str, float]], None] | None,
    own_calls: bool,
) -> Iterator[Measurement]:
    host = host_of(model)
    runs = ThreeRuns(host, sae, at, head, where, resume_clean=own_calls)
    check([runs.attachment])
    comparison = _comparison(host, runs.site, prompts, labels, tokenizer)
    warn_in_train_mode(host.model, "measuring", stacklevel=5)
    result = Measurement(comparison, ReconstructionMeter(sae.d_out, sae.d_sae), runs.site.name, runs.note, on_record)
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.enter_context(runs.watching())
        show = stack.enter_context(panel(result, lambda: f"measure · {result.calls} calls", live))
        for owner, name in comparison.entry_points():
            stack.enter_context(replaced_method(owner, name, _measured(runs, result, show)))
        yield result
    if not result.calls:  # not reached when the block failed
        raise NeverFiredError(f"nothing was measured at '{result.site}': {result.comparison.how_to_call()}")
    runs.check_used()
    if result.comparison.nothing_compared is not None:
        raise NeverFiredError(f"nothing was measured at '{result.site}': {result.comparison.nothing_compared}")


def _measured(runs: ThreeRuns, result: Measurement, show: Any) -> Any:
    """Wrap a method of the model so that each outermost call of it is measured."""

    def around(forward: Any) -> Any:
        @wraps(forward)
        def measured_forward(*args: Any, **kwargs: Any) -> Any:
            if is_rerun() or runs.is_running:
                return forward(*args, **kwargs)
            output = runs.measured(forward, args, kwargs, result)
            show()
            return output

        return measured_forward

    return around


def _comparison(host: Host, site: Site, prompts: Any, labels: Any, tokenizer: Any) -> Comparison:
    """By embeddings in a CLIP, by logits elsewhere, until a call shows that the model has none."""
    tower = host.tower(site)
    if tower is not None:
        return EmbeddingComparison(host, tower, prompts, labels, tokenizer)
    if prompts is not None or labels is not None:
        raise ConfigError("prompts= and labels= are for CLIP images; a language model is measured by its next tokens")
    return LogitsComparison(host)
