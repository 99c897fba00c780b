"""The `measure` block: each ordinary call of the model is run again spliced and zero-ablated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from rich import live as rich_live
from rich.console import Console
from rich.errors import LiveError
from rich.panel import Panel
from torch import Tensor

from saehooks.attachments.resolve import check_width, find
from saehooks.codes import Codes
from saehooks.errors import ConfigError, NeverFiredError
from saehooks.evaluation.clip import ClipComparison
from saehooks.evaluation.language import Call, Comparison, LanguageModelComparison
from saehooks.evaluation.live import Live
from saehooks.hosts import ForwardCall, Host, Site
from saehooks.hosts import host as host_of
from saehooks.hosts.early_stop import replaced_method
from saehooks.hosts.sequences import SequenceWatch
from saehooks.metrics import ReconstructionMeter
from saehooks.sae import SAE
from saehooks.where import Came, View, Where, full_mask, where_of


@contextmanager
def measure(
    model: Any,
    sae: SAE,
    at: str | None = None,
    *,
    head: int | None = None,
    where: Any = None,
    prompts: Any = None,
    labels: Any = None,
    tokenizer: Any = None,
    live: bool | None = None,
) -> Iterator[Live]:
    """``with sh.measure(model, sae) as live:`` measures each ordinary call of the model inside the block.

    The call returns exactly what it returns without the block. Before it, the same forward runs twice without
    gradients: with the reconstruction at the site, then with zeros there. Hooks of your own fire in those runs too,
    in the clean one last. The state of the random number generators is put back, so dropout goes on as without the
    block. A call that does not give logits itself (``return_type="loss"``) costs one run more.

    Args:
        model: a TransformerLens model, an open_clip model, or a Hugging Face language model.
        sae: the SAE to splice in.
        at: the site; the SAE's own ``hook_name`` by default.
        head: one head of a per-head site.
        where: positions to splice and to zero, as in `attach`: left out, where the SAE was trained. Never padding.
        prompts: for zero-shot accuracy of CLIP images: for each class a prompt or a list of prompts; or token ids
            (classes, context); or embeddings (classes, embed_dim).
        labels: with prompts, the labels of all images in the order of the calls; or set ``live.labels`` before a call.
        tokenizer: for prompts given as text; open_clip's own by default.
        live: show a panel that follows the calls; by default only in an interactive terminal.
    Returns:
        A context manager that gives a `Live`.
    Raises:
        SiteError, WidthError, ConfigError: on entering, or at the first call where only then it can be known.
        NeverFiredError: on leaving, when no call of the model went through the site.

    Source: CE recovered as in Gated SAEs (arXiv 2404.16014), with the raw figures beside it.
    """
    host = host_of(model)
    site = find(host, sae, at, head)
    tower = host.tower(site)
    comparison: Comparison = LanguageModelComparison(host)
    if tower is not None:
        comparison = ClipComparison(model, tower, prompts, labels, tokenizer)
    elif prompts is not None or labels is not None:
        raise ConfigError("prompts= and labels= are for CLIP images; a language model is measured by its next tokens")
    rule = where_of(sae, where)
    result = Live(comparison, ReconstructionMeter(sae.d_in, sae.d_sae), site.name, f"where={rule!r}")
    probe = _Probe(host, site, sae, rule, comparison)
    with ExitStack() as stack:
        stack.enter_context(probe.watch.watching([(site, probe.hook)]))
        panel = stack.enter_context(_panel(result, live))
        report = _reporter(result, probe, panel)
        for owner, name in comparison.entry_points():
            stack.enter_context(replaced_method(owner, name, probe.around(report)))
        yield result
    if not result.calls:  # not reached when the block failed
        raise NeverFiredError(f"nothing was measured at '{site.name}': {comparison.how_to_call()}")
    probe.came.check(site.name)


class _Seen:
    """What the spliced run saw at the site: the rows that were spliced."""

    def __init__(self, acts: Tensor, mask: Tensor, codes: Codes, recons: Tensor, call: ForwardCall) -> None:
        self.acts, self.mask, self.codes, self.recons, self.call = acts, mask, codes, recons, call


class _Probe:
    """One hook at the site that does nothing, splices or zeroes, and the wrapper around calls of the model."""

    def __init__(self, host: Host, site: Site, sae: SAE, where: Where, comparison: Comparison) -> None:
        self.host, self.site, self.sae, self.where, self.comparison = host, site, sae, where, comparison
        self.watch, self.came = SequenceWatch(host), Came(where)
        self.seen: _Seen | None = None
        self._mode = "off"
        self._running = False

    def around(self, report: Callable[[], None]) -> Callable[[Callable[..., Any]], Any]:
        """Wrap a method of the model so that each outermost call of it is measured."""

        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def measured_forward(*args: Any, **kwargs: Any) -> Any:
                if self._running:
                    return forward(*args, **kwargs)
                self._running = True
                try:
                    return self._measured(Call(forward, args, kwargs), report)
                finally:
                    self._running, self._mode, self.seen = False, "off", None

            return measured_forward

        return wrap

    def _measured(self, call: Call, report: Callable[[], None]) -> Any:
        """Run a call spliced, zero-ablated and clean; compare; return what the clean one returned."""
        _refuse_empty(call)
        self.comparison.check(call)
        spliced = self._rerun(call, "spliced")
        if self.seen is None:  # another path through the model: nothing to compare
            return call.forward(*call.args, **call.kwargs)
        zero = self._rerun(call, "zero")
        self._mode = "off"
        output = call.forward(*call.args, **call.kwargs)
        clean = self.comparison.read(call, output)
        with torch.no_grad():
            clean = self._rerun(call, "off") if clean is None else clean.detach()
            self.comparison.add(self.seen.call, clean, spliced, zero)
        report()
        return output

    def _rerun(self, call: Call, mode: str) -> Tensor:
        self._mode = mode
        devices = {p.device for p in self.host.model.parameters() if p.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
            return self.comparison.rerun(call)

    def hook(self, acts: Tensor) -> Tensor | None:
        """The hook at the site: (batch, pos, width) in, its replacement out."""
        if self._mode == "spliced":
            return self._splice(acts)
        if self._mode == "zero" and self.seen is not None:
            return acts.masked_fill(self.seen.mask.to(acts.device)[..., None], 0.0)
        return None

    def _splice(self, acts: Tensor) -> Tensor:
        check_width(self.sae, self.site, acts.shape[-1])
        sae = self.sae.frozen()
        codes = sae.encode(acts)
        columns = self.watch.look(self.site, acts)
        self.came.add(columns)
        mask = full_mask(self.where, View(columns, codes, self.host.tokenizer))
        mask = torch.ones(acts.shape[:2], dtype=torch.bool, device=acts.device) if mask is None else mask
        mask = mask.to(acts.device)
        rows = mask.reshape(-1).nonzero()[:, 0]
        kept = codes.select_rows(rows.to(codes.indices.device))
        recons = sae.decode(kept)
        flat = acts.reshape(-1, acts.shape[-1])
        call = ForwardCall(columns.tokens, columns.start or 0, columns.real)
        self.seen = _Seen(flat[rows].to(recons), mask, kept, recons, call)
        return flat.index_copy(0, rows, recons.to(flat)).reshape(acts.shape)


def _refuse_empty(call: Call) -> None:
    empty = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor) and not v.numel()]
    if empty:
        raise ConfigError(f"nothing to measure in an empty batch: got a tensor of shape {tuple(empty[0].shape)}")


def _reporter(result: Live, probe: _Probe, panel: rich_live.Live | None) -> Callable[[], None]:
    """What happens after each measured call: sums, history, panel."""
    meter, shown = result._meter, [0.0]

    def report() -> None:
        seen = probe.seen
        if seen is None:
            return
        meter.update(seen.acts, seen.recons, seen.codes)
        result.after_call()
        if panel is not None and time.monotonic() - shown[0] > 0.2:
            panel.update(_framed(result), refresh=True)
            shown[0] = time.monotonic()

    return report


@contextmanager
def _panel(result: Live, wanted: bool | None) -> Iterator[rich_live.Live | None]:
    """A panel in the terminal that follows the figures, where it is wanted and possible."""
    console = Console()
    if not (wanted or (wanted is None and console.is_interactive and not console.is_jupyter)):
        yield None
        return
    panel = rich_live.Live(_framed(result), console=console, auto_refresh=False)
    try:
        panel.start()
    except LiveError:  # a display of the user's own is running
        yield None
        return
    try:
        yield panel
    finally:
        panel.update(_framed(result), refresh=True)
        panel.stop()


def _framed(result: Live) -> Panel:
    return Panel(result, title=f"measure · {result.calls} calls", expand=False)
