"""Training on what the rest of the model makes of a reconstruction: the divergence of spliced from clean logits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saehooks.attachments.attachment import put_rows
from saehooks.attachments.resolve import check_width
from saehooks.errors import ConfigError
from saehooks.evaluation.comparison import Call, passage_of
from saehooks.evaluation.logits import LogitsComparison, Targets, chunks
from saehooks.hosts import Host, Site
from saehooks.hosts.frozen import frozen
from saehooks.hosts.method_wrapper import replaced_method
from saehooks.hosts.reruns import is_rerun, rerunning
from saehooks.hosts.sequences import Columns, SequenceWatch
from saehooks.hosts.torch_compile import uncompiled
from saehooks.hosts.train_mode import warn_in_train_mode
from saehooks.kernels import Step
from saehooks.sparse_coder import autocast_off
from saehooks.training.losses import TrainingLoss, loss_of
from saehooks.training.trainer import Trainer
from saehooks.where import Came, View, Where, full_mask

TINY = 1e-12


class _Now(threading.local):
    """The call that is being trained on in one thread."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.seen: list[tuple[Columns, Tensor, TrainingLoss]] = []


class DivergenceTraining:
    """Each ordinary call of a language model becomes one step: it runs again with the reconstruction at the site.

    The loss is the KL divergence of the spliced from the clean next-token distribution, in nats, averaged over what
    is predicted, mixed with the SAE's own loss. Both are first scaled to the size of the divergence, so that ``mix``
    is the share of the SAE's own loss, whatever the two are. The model's parameters get no gradient.

    Args:
        host: the model.
        site: where the reconstruction goes.
        trainer: of the SAE.
        where: which positions carry the reconstruction, and are trained on.
        mix: share of the SAE's own loss, from 0 (the divergence alone) to below 1.
    Raises:
        ConfigError: a model without logits, a mix out of range.
    Source: end-to-end SAEs, arXiv:2405.12241; as fine-tuning with terms of equal size, arXiv:2503.17272.
    """

    def __init__(self, host: Host, site: Site, trainer: Trainer, where: Where, mix: float) -> None:
        if isinstance(mix, bool) or not isinstance(mix, (int, float)) or not 0 <= mix < 1:
            raise ConfigError(
                f"mix={mix!r}: write the share of the SAE's own loss, from 0 (the divergence alone) to below 1"
            )
        if host.tower(site) is not None:
            raise ConfigError(
                f"objective='kl' compares next-token distributions, and '{site.name}' lies in a model without logits: "
                "leave objective= out, which trains on the reconstruction"
            )
        self.host, self.site, self.trainer, self.where, self.mix = host, site, trainer, where, mix
        self.comparison = LogitsComparison(host)
        self.came = Came(where)
        self._watch = SequenceWatch(host, of_reruns=True)
        self._now = _Now()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block every outermost call of the model is trained on."""
        warn_in_train_mode(self.host.model, "training", stacklevel=5)
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            stack.enter_context(self._watch.watching([(self.site, self._hook)]))
            for owner, name in self.comparison.entry_points():
                stack.enter_context(replaced_method(owner, name, self._around))
            yield

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def trained_forward(*args: Any, **kwargs: Any) -> Any:
            if is_rerun() or self.trainer.finished:
                return forward(*args, **kwargs)
            call = Call(forward, args, kwargs)
            self.comparison.check(call)
            started = time.perf_counter()
            output = call()
            self.trainer.seconds["model"] += time.perf_counter() - started
            self._learn(call, output)
            return output

        return trained_forward

    def _learn(self, call: Call, output: Any) -> None:
        """One step on a call, whose clean output is known."""
        model, kind = self.host.model, self.host.device.type
        as_called: Callable[[], AbstractContextManager[Any]] = nullcontext  # training itself knows no autocast
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            as_called = partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind))
        try:
            with torch.inference_mode(False):
                clean, tokens = self._clean(call, output), next(iter(call.tensors), None)
                # The backward pass is inside too: activation checkpoints run the model again in it.
                with rerunning(model), frozen(model):
                    self.trainer.step_down(lambda step: self._loss(call, clean, step, as_called), batch=tokens)
        finally:
            self._now.step, self._now.seen = None, []

    def _clean(self, call: Call, output: Any) -> Tensor:
        found = self.comparison.compared(output)
        if found is None or found.dim() != 3:  # the call asked for a loss
            with rerunning(self.host.model):
                found = self.comparison.compared(self.comparison.rerun(call))
        if found is None:
            raise ConfigError(f"{self.comparison.nothing_found}: {self.comparison.how_to_call()}")
        found = found.detach()
        return found.clone() if found.is_inference() else found

    def _loss(
        self, call: Call, clean: Tensor, step: Step, as_called: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[TrainingLoss, Tensor]:
        """The loss of one call, with the rows that it is about; ``as_called`` is the user's autocast."""
        now = self._now
        now.step = step
        with as_called():
            output = self.comparison.rerun(call)
        if len(now.seen) != 1:
            times = "never" if not now.seen else f"{len(now.seen)} times"
            raise ConfigError(
                f"this call passed '{self.site.name}' {times}: objective='kl' needs calls that pass it once, from "
                "tokens to logits"
            )
        columns, rows, own = now.seen[0]
        spliced = self.comparison.compared(output)
        targets = self.comparison.targets(call, passage_of(self.host, call, columns), output)
        if spliced is None or spliced.shape != clean.shape:
            raise ConfigError(f"{self.comparison.nothing_found}: {self.comparison.how_to_call()}")
        divergence = kl_divergence(clean, spliced, targets)
        share = own.total * (divergence.detach() / own.total.detach().clamp(min=TINY))
        terms = {"divergence": (1 - self.mix) * divergence, "own": self.mix * share}
        total = torch.stack(list(terms.values())).sum()
        figures = {"kl": divergence.detach(), **{f"loss_{name}": term for name, term in own.terms.items()}}
        return own._replace(total=total, terms={k: v.detach() for k, v in terms.items()}, figures=figures), rows

    def _hook(self, acts: Tensor) -> Tensor | None:
        """What the site carries instead, in the runs that are ours."""
        now, trainer = self._now, self.trainer
        if now.step is None:
            return None
        sae = trainer.sae
        if not torch.is_grad_enabled():
            raise ConfigError(
                f"'{self.site.name}' lies in a part of the model that runs without gradients, such as an activation "
                "checkpoint with use_reentrant=True: write use_reentrant=False"
            )
        check_width(sae, self.site, acts.shape[-1])
        columns = self._watch.look(self.site, acts)
        given = columns.arrange(acts)
        mask = full_mask(self.where, View.without_codes(columns, given, self.host.tokenizer))
        given = given.detach()
        flat = given.reshape(-1, given.shape[-1])
        places = torch.arange(len(flat)) if mask is None else mask.reshape(-1).nonzero()[:, 0]
        rows = flat[places.to(flat.device)].to(sae.device, sae.dtype)
        if not sae.finished:
            sae.initialise(rows)
        with autocast_off(rows.device):
            stages = sae.encode_stages(rows, decoding=True, step=now.step)
            recons = sae.decode_stages(stages, step=now.step)
            if not columns.again:
                self.came.add(columns)
                own = loss_of(
                    sae,
                    rows,
                    stages,
                    recons,
                    trainer.loss_config,
                    idle=trainer.idle,
                    step=trainer.steps,
                    kernel_step=now.step,
                )
                now.seen.append((columns, rows, own))
        return columns.restore(put_rows(given, places, recons), acts)


def kl_divergence(clean: Tensor, spliced: Tensor, targets: Targets) -> Tensor:
    """Scalar, nats: mean over what is predicted of ``sum_v p (log p - log q)``, p clean and q spliced.

    Args:
        clean, spliced: (batch, pos, vocabulary) logits; the gradient is that of ``spliced``.
        targets: which columns count.
    Raises:
        ConfigError: nothing is predicted.
    """
    count = int(targets.keep.sum())
    if not count:
        raise ConfigError("nothing is predicted in this call: give texts of at least 2 tokens")
    total = spliced.new_zeros((), dtype=torch.float32)
    for (then, _), (now, _) in zip(chunks(targets, spliced), chunks(targets, clean), strict=True):
        log_q, log_p = then.float().log_softmax(-1), now.to(then.device).float().log_softmax(-1)
        total = total + F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total / count
