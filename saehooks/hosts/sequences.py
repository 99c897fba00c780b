"""Which positions of which text a forward carries: one cursor for each stack, which ends with its call.

A *stack* is the nearest module above a site whose call takes tokens, embeddings, pictures or a cache. What one call
says (tokens, attention mask, cache) holds inside that call alone; only what is in a cache outlives it.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from types import CodeType
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from saehooks.errors import ConfigError, WhereError
from saehooks.hosts.caches import CacheMemory, Kept, cached_positions, find_cache, is_empty
from saehooks.hosts.calls import Given, parameter_names, read_call
from saehooks.hosts.hooks import hook_module
from saehooks.hosts.method_wrapper import replaced_method
from saehooks.hosts.reruns import is_rerun
from saehooks.hosts.site import HookFn, Site

CHECKPOINT_FILE = torch.utils.checkpoint.__file__
"""Where torch runs modules whose activations it will compute again in the backward pass."""

MODULE_FILE = nn.modules.module.__file__
"""Where torch calls a module, with its hooks."""

CHECKPOINTED = {
    "checkpoint": ("function", "args"),
    "_checkpoint_impl": ("function", "args"),
    "forward": ("run_function", "args"),
    "recompute_fn": ("fn", "args"),
    "backward": ("ctx", "detached_inputs"),
}
"""Functions there that run what is checkpointed, first and again, with the names under which they hold it and its
arguments."""

RUN_AGAIN = ("recompute_fn", "backward")
"""Those of them that run it once more."""

REMEMBERED = 1024
"""Checkpoints of a block that can still be run again."""


class TellsTexts(Protocol):
    """What a watch asks of the model's host; `saehooks.hosts.Host` says what each method returns."""

    def around(self, sites: Iterable[Site]) -> Sequence[nn.Module]: ...

    def watching(self, watch: SequenceWatch) -> AbstractContextManager[None]: ...

    def padding(self, module: nn.Module, tokens: Tensor) -> Tensor | None: ...

    def pooled(self, site: Site, columns: Columns) -> Tensor | None: ...


@dataclass(eq=False)
class Text:
    """The text that one call of one stack carries."""

    shape: tuple[int, int] | None = None
    """(batch, pos) of this call; None for pictures and what else becomes positions only inside."""
    tokens: Tensor | None = None
    mask: Tensor | None = None
    """(batch, pos), or longer by the cache: bool, False at padding; None if the call does not say."""
    cache: Any = None
    start: int | None = 0
    """Absolute position of the first column: what the cache holds; None where that cannot be known."""
    prompt: int | None = None
    """One more than the last column of the prompt, which may lie behind this call (a prompt read in chunks)."""
    turn: int = 0
    """The first column of the turn that the prompt belongs to."""
    earlier: Tensor | None = None
    """(batch, start) bool, what is known of the columns in the cache."""
    whole: Tensor | None = None
    """(batch, prompt) bool, False at padding, where the prompt reaches beyond this call."""
    position_ids: Tensor | None = None
    """(batch or 1, pos) of a call with neither mask nor cache, where several texts may share a row."""
    generation: Generation | None = None
    opaque: bool = False
    """Whether the call carries two texts, so that it says nothing of either."""
    derived: bool = False
    """Whether these columns were made from a text's in a way that is not known."""
    pictured: bool = False
    """Whether the call, or one around it, was given pictures and no text."""
    padding: Callable[[Tensor], Tensor | None] | None = None
    """How the host padded what it made into tokens."""

    def real_so_far(self, device: torch.device) -> Tensor | None:
        """(batch, start + pos) bool, False at padding; None where every column is text, or nothing is known."""
        if self.shape is None or self.start is None or (self.mask is None and self.earlier is None):
            return None
        start, (batch, pos) = self.start, self.shape
        if self.mask is not None and self.mask.shape[1] >= start + pos:
            real = self.mask[:, : start + pos].to(device)
        else:
            now = torch.ones(batch, pos, dtype=torch.bool) if self.mask is None else self.mask[:, -pos:]
            before = torch.ones(batch, start, dtype=torch.bool, device=device)
            if self.earlier is not None and batch % len(self.earlier) == 0:
                known = self.earlier[:, :start].to(device).repeat_interleave(batch // len(self.earlier), 0)
                before[:, : known.shape[1]] = known
            real = torch.cat([before, now.to(device)], 1)
        # That every column is text is cheap to know on a CPU alone.
        return None if device.type == "cpu" and bool(real.all()) else real


@dataclass(eq=False)
class Generation:
    """One call of ``generate``."""

    module: nn.Module
    columns: int | None
    """Columns of the prompt; None where only the first forward tells."""
    whole: Tensor | None = None
    """(batch, columns) bool, False at padding."""
    mask: Tensor | None = None
    """(batch, columns so far) bool, as the next forward is prepared."""
    total: int | None = None
    """Columns so far, of a forward that was prepared."""
    uncounted: int = 0
    """Columns of a prompt that no token stands for."""

    padding: Callable[[Tensor], Tensor | None] | None = None
    """How the host pads what it makes into tokens."""

    def __post_init__(self) -> None:
        self.first: dict[int, int] = {}  # stack -> columns of its first forward
        self.embedded: list[Tensor] = []  # tokens that were embedded outside any forward


@dataclass(eq=False)
class _Frame:
    """One call that is running."""

    module: nn.Module
    running: Any
    """The Python frame of the call: while it lives the call runs, however an earlier one ended."""
    text: Text
    authoritative: bool
    """Whether it was given tokens, or embeddings of them."""
    around: tuple[Any, ...] = ()
    """Of the outermost call: the Python frames around it in which torch checkpoints it, innermost first."""


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of one forward at one site: which texts they belong to, and where in them they are."""

    shape: tuple[int, int]
    """(batch, pos)"""
    device: torch.device
    text: Text
    number: int
    """How many forwards passed the site before, in this block."""
    host: TellsTexts
    site: Site
    layout: str = "same"
    """How the site's own activation lies: ``"same"``, ``"pos first"``, or ``"flat"`` (batch * pos)."""
    again: bool = False
    """Whether this forward ran before, and runs again to compute gradients."""

    # --------------------------------------------------------------- the layout

    def arrange(self, acts: Tensor) -> Tensor:
        """(batch, pos, width) from what the site carries."""
        if self.layout == "same":
            return acts
        return acts.transpose(0, 1) if self.layout == "pos first" else acts.reshape(*self.shape, acts.shape[-1])

    def restore(self, acts: Tensor, like: Tensor) -> Tensor:
        """Undo `arrange`: from new (batch, pos, width) to the layout of ``acts``, what the site carries."""
        if self.layout == "same":
            return acts
        return acts.transpose(0, 1) if self.layout == "pos first" else acts.reshape(like.shape)

    # ------------------------------------------------------------ what is there

    @property
    def tokens(self) -> Tensor | None:
        """(batch, pos) int64, None where they are not known."""
        tokens = self.text.tokens
        return tokens if tokens is not None and tuple(tokens.shape) == self.shape else None

    @property
    def start(self) -> int | None:
        """Absolute column of the first one, padding counted too; None where it is not known."""
        return None if self.text.derived else self.text.start

    @property
    def is_known(self) -> bool:
        """Whether positions are known."""
        return self.start is not None and self.text.prompt is not None

    @cached_property
    def real(self) -> Tensor | None:
        """(batch, pos) bool, False at padding; None where every column is text."""
        full = self._full
        return None if full is None else full[:, -self.shape[1] :]

    @cached_property
    def place(self) -> Tensor:
        """int64, (pos,) or (batch, pos): the position of each column in its text; -1 at padding.

        Raises:
            WhereError: it cannot be known.
        """
        self._require()
        start, columns = self.text.start or 0, torch.arange(self.shape[1], device=self.device)
        segments = self._segments
        if segments is not None:
            return columns - segments[0]
        full = self._full
        if full is None:
            return columns + start
        counted = full.cumsum(-1)[:, start:] - 1
        return counted.masked_fill(~full[:, start:], -1)

    @cached_property
    def length(self) -> int | Tensor:
        """How many positions the prompt has: one number, or int64 of (batch, 1) or (batch, pos).

        Raises:
            WhereError: it cannot be known.
        """
        self._require()
        prompt: Any = self.text.prompt
        segments, full = self._segments, self._full
        if segments is not None:
            return segments[1]
        if full is None:
            return prompt
        if prompt <= full.shape[1]:
            return full[:, :prompt].sum(-1, keepdim=True)
        rest = self.text.whole
        if rest is not None and len(full) % len(rest) == 0:
            rest = rest.to(full.device).repeat_interleave(len(full) // len(rest), 0)
            return rest[:, :prompt].sum(-1, keepdim=True)
        return full.sum(-1, keepdim=True) + (prompt - full.shape[1])

    def pooled(self) -> Tensor:
        """(batch, pos) or (pos,) bool, the positions that the output of a CLIP's tower is read from.

        Raises:
            WhereError: the host does not say.
        """
        found = self.host.pooled(self.site, self)
        if found is None:
            raise WhereError(
                f"sh.pooled: nothing is known of where the output behind '{self.site.name}' is read; it is for CLIPs"
            )
        return found

    def _require(self) -> None:
        if self.is_known:
            return
        if self.text.derived:
            raise WhereError(
                f"the positions of what passes '{self.site.name}' {self.shape} are not those of the text; "
                "write where=sh.everywhere, a mask or a function"
            )
        raise WhereError(
            f"where these {self.shape[1]} columns at '{self.site.name}' begin cannot be known: the cache has no "
            "length and was begun outside the block; write where=sh.everywhere, or read the text inside the block"
        )

    @cached_property
    def _full(self) -> Tensor | None:
        return None if self.text.derived else self.text.real_so_far(self.device)

    @cached_property
    def _segments(self) -> tuple[Tensor, Tensor] | None:
        """For rows that pack several texts: where the text of each column begins, and how long it is, (batch, pos)."""
        ids = self.text.position_ids
        if ids is None:
            return None
        ids = ids.to(self.device).expand(self.shape)
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids.diff(dim=-1) != 1
        if self.device.type == "cpu" and not bool(begins[:, 1:].any()):
            return None
        which = begins.cumsum(-1) - 1
        columns = torch.arange(self.shape[1], device=self.device).expand(self.shape)
        first = torch.where(begins, columns, 0).cummax(-1).values
        return first, torch.zeros_like(which).scatter_add_(1, which, torch.ones_like(which)).gather(1, which)


class _Thread(threading.local):
    """What runs in one thread."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.grads = False  # whether the call that runs was begun with gradients
        self.generations: list[Generation] = []
        self.entered: list[tuple[Any, Generation]] = []  # the Python frame of a generate, entered past the watch
        self.counts: list[tuple[Any, dict[Hashable, int]]] = []  # Python frame of a checkpoint -> firings in it


class SequenceWatch:
    """Watches the stacks above some sites for the length of a block, and calls each site's hook.

    Args:
        host: the model.
        of_reruns: take the forwards that `measure` adds for what they are; otherwise they are the user's call again.

    >>> from saehooks.hosts import host
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    >>> site, places, watch = host(model).site("1"), [], SequenceWatch(host(model))
    >>> with watch.watching([(site, lambda acts: places.append(watch.look(site, acts).place))]):
    ...     y = model(torch.tensor([[5, 6, 7]]))
    >>> places
    [tensor([0, 1, 2])]
    """

    def __init__(self, host: TellsTexts, of_reruns: bool = False):
        self._host, self._of_reruns = host, of_reruns
        self._memory = CacheMemory()
        self._here = _Thread()
        self._seen: OrderedDict[Hashable, dict[Hashable, Columns]] = OrderedDict()  # checkpoint -> passing -> columns
        self._fired: dict[Any, int] = {}
        self._generators: set[CodeType] = set()  # of the methods that generate
        self._generating: set[int] = set()  # ids of the modules that have one
        self._awaited: set[tuple[Hashable, int]] = set()
        self.calls = 0
        """How many calls of the model, or of a part of it, began."""

    @contextmanager
    def watching(self, hooks: Iterable[tuple[Site, HookFn]]) -> Iterator[SequenceWatch]:
        """Watch, and call the hooks, inside the block.

        Args:
            hooks: for each site, what is called with its activations; the hook asks `look` where they are.
        """
        hooks = list(hooks)
        with ExitStack() as stack:
            sites = [site for site, _ in hooks]
            last = {id(site.module) for site in sites if site.slot == "out"}
            for module in self._host.around(sites):
                stack.enter_context(self._watching(module, leaves=id(module) not in last))
            stack.enter_context(self._host.watching(self))
            for site, fn in hooks:
                stack.callback(site.hook(fn).remove)
            try:
                yield self
            finally:
                self._here, self._memory = _Thread(), CacheMemory()
                self._seen.clear()

    # ------------------------------------------------------------ for the hooks

    def look(self, site: Site, acts: Tensor) -> Columns:
        """Where the activations are that pass a site now.

        Args:
            acts: (batch, pos, width), or (batch * pos, 1, width) or (pos, batch, width) of it.
        """
        frames, regions = self._alive(sys._getframe(1))
        places = self._places(regions, (site.key, *self._shape(acts)))
        columns = self._before(places, frames) if _in_backward() else None
        again = columns is not None or (is_rerun() and not self._of_reruns)
        if columns is None:
            number = self._fired.get(site.key, 0)
            self._fired[site.key] = number + (not again)
            columns = self._columns(site, acts, frames[-1].text if frames else Text(), number)
        for checkpoint, passing in places:
            self._seen.setdefault(checkpoint, {})[passing] = columns
        if any(region.f_code.co_name == "forward" for region in regions) and self._here.grads:
            self._awaited.add((site.key, columns.number))
        elif again:
            self._awaited.discard((site.key, columns.number))
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return replace(columns, again=True) if again else columns

    def awaits_gradients(self, site: Site) -> bool:
        """Whether a forward past a site was checkpointed, without its graph, and did not run again so far."""
        return any(key == site.key for key, _ in self._awaited)

    @contextmanager
    def calling(self, module: nn.Module, given: Given, **more: Any) -> Iterator[Text]:
        """A call that the host runs itself, as its own methods do; gives what is known of it."""
        frame = self._begin(module, given, sys._getframe(2))
        frame.text = replace(frame.text, **more)
        try:
            yield frame.text
        finally:
            self._end(frame)

    @contextmanager
    def generating(self, module: nn.Module, columns: int | None, whole: Tensor | None = None) -> Iterator[Generation]:
        """Inside the block a method that generates runs; ``whole`` is (batch, columns) bool, False at padding."""
        generation = Generation(module, columns, whole)
        with self.going_on(generation):
            yield generation

    @contextmanager
    def going_on(self, generation: Generation) -> Iterator[None]:
        """Inside the block a part of a generation runs."""
        generations = self._here.generations  # of this thread, also when the block ends in another one meanwhile
        generations.append(generation)
        try:
            yield
        finally:
            generations.remove(generation)

    @property
    def generation(self) -> Generation | None:
        """The innermost generation that runs in this thread."""
        return self._here.generations[-1] if self._here.generations else None

    @property
    def is_inside_a_call(self) -> bool:
        """Whether a watched module is running in this thread."""
        return bool(self._alive(sys._getframe(1), regions=False)[0])

    # ------------------------------------------------------------------- calls

    @contextmanager
    def _watching(self, module: nn.Module, leaves: bool) -> Iterator[None]:
        names = parameter_names(module.forward)

        def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running = sys._getframe(1)
            while running.f_back is not None and running.f_code.co_filename != MODULE_FILE:
                running = running.f_back
            self._begin(module, read_call(module, names, args, kwargs), running)

        def ends(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            frame = next((one for one in reversed(self._here.frames) if one.module is module), None)
            if frame is not None:
                self._end(frame, output)

        with ExitStack() as stack:
            stack.callback(hook_module(module, "in", begins).remove)
            if leaves:  # else the site's own hook still has to run: the call around it ends this one
                stack.callback(hook_module(module, "out", ends).remove)
            if callable(getattr(type(module), "generate", None)):
                stack.enter_context(self._watching_generate(module))
            yield

    def _begin(self, module: nn.Module, given: Given, running: Any) -> _Frame:
        frames, _ = self._alive(running, regions=False)
        parent = frames[-1] if frames else None
        regions: list[Any] = []
        generators: list[Any] = []
        if parent is None:
            self.calls += 1
            self._here.grads = torch.is_grad_enabled()
            regions, generators = self._outside(running)
        text = self._text(module, given, None if parent is None else parent.text, generators)
        frame = _Frame(module, running, text, given.kind == "text", tuple(regions))
        frames.append(frame)
        return frame

    def _end(self, frame: _Frame, output: Any = None) -> None:
        frames = self._here.frames
        if frame in frames:
            del frames[frames.index(frame) :]
        text = frame.text
        if not frame.authoritative or text.start is None or text.shape is None or text.prompt is None:
            return
        cache = text.cache if text.cache is not None else _cache_in(output)
        if cache is not None:
            known = text.mask if text.mask is not None else text.earlier
            real = None if known is None else text.real_so_far(known.device)
            self._memory[cache] = Kept(text.start + text.shape[1], text.prompt, text.turn, real)

    def _text(self, module: nn.Module, given: Given, around: Text | None, generators: list[Any]) -> Text:
        """What a call carries: what it was given, and the rest from the call around it where that is of the same."""
        generation = self._generation(module, around, generators)
        if given.kind == "two texts":
            return Text(opaque=True, generation=generation)
        if around is None:
            around, inherited = Text(), False
        else:
            inherited = given.kind == "nothing" or _same(given, around)
        if given.kind == "raw":
            return around if around.shape is not None and not around.opaque else Text(pictured=True)
        if inherited and given.kind != "text":
            further = given.mask is not None and (around.mask is None or given.mask.shape[1] > around.mask.shape[1])
            return replace(around, mask=given.mask) if further else around
        if not inherited:
            hidden = given.kind == "hidden"
            pictured = around.pictured and given.tokens is None  # encoders of pictures take them as inputs_embeds too
            around = Text(pictured=pictured, derived=hidden and _is_placed(around), padding=around.padding)
        return self._told(module, given, around, inherited, generation)

    def _told(
        self, module: nn.Module, given: Given, around: Text, inherited: bool, generation: Generation | None
    ) -> Text:
        """A text from what a call was given and from what is ``around`` it."""
        text = replace(around, shape=given.shape, generation=generation)
        text.tokens = given.tokens if given.tokens is not None else around.tokens
        text.mask = given.mask if given.mask is not None else around.mask
        if text.mask is None and given.tokens is not None:
            text.mask = (around.padding or partial(self._host.padding, module))(given.tokens)
        own = generation is not None and generation.module is module
        fresh = own or not inherited or (given.cache is not None and given.cache is not around.cache)
        if fresh:
            text.cache = given.cache
            text.start = self._start(given, generation if own else None)
            kept = self._memory[text.cache] if text.cache is not None else None
            text.earlier = None if kept is None else kept.real
            if own and text.mask is None and generation is not None and text.start is not None and given.shape:
                prepared, end = generation.mask, text.start + given.shape[1]
                text.mask = prepared if prepared is not None and prepared.shape[1] == end else None
            self._set_prompt(text, kept, own, id(module))
        alone = text.mask is None and text.cache is None and not text.start and generation is None
        text.position_ids = given.position_ids if alone else None
        return text

    def _set_prompt(self, text: Text, kept: Kept | None, own: bool, stack: int) -> None:
        """Where the prompt of a call ends."""
        if text.start is None:
            text.prompt = None
            return
        start, generation = text.start, text.generation
        end = start + (text.shape[1] if text.shape else 0)
        if generation is not None:
            columns = generation.columns if own else None
            if columns is not None and stack not in generation.first and columns <= start:
                generation.columns = columns = start + columns  # only what is new was given
            first = generation.first.setdefault(stack, end)
            text.prompt, text.turn, text.whole = first if columns is None else columns, 0, generation.whole
        elif end - start > 1 or not start:
            text.prompt, text.turn = end, start
        else:  # one more word: the prompt lies behind
            text.prompt, text.turn = (start, 0) if kept is None else (min(kept.prompt, start), kept.turn)

    def _start(self, given: Given, generation: Generation | None) -> int | None:
        """How many columns came before those of a call; None where that is not known."""
        total = None if generation is None else generation.total
        behind = None if total is None or given.shape is None else max(0, total - given.shape[1])
        if given.cache is None:
            return behind or 0
        length = cached_positions(given.cache)
        if length is not None:
            return length
        kept = self._memory[given.cache]
        if kept is not None:
            return kept.end
        return 0 if is_empty(given.cache) else behind

    # -------------------------------------------------------------- generation

    def _generation(
        self, module: nn.Module, around: Text | None, generators: list[Any] | None = None
    ) -> Generation | None:
        """The call of ``generate`` that a call of a module is a step of.

        Args:
            module: what is called.
            around: the text of the call around it.
            generators: the Python frames of what generates around the outermost call, where they are at hand.
        """
        running = self._here.generations
        if running and running[-1].module is module:
            return running[-1]
        if around is not None:
            return around.generation
        return self._entered_past_the_watch(module, generators) if id(module) in self._generating else None

    def _entered_past_the_watch(self, module: nn.Module, generators: list[Any] | None) -> Generation | None:
        """A ``generate`` that runs although its watched one was not called: the method was taken before the block."""
        generators = self._outside(sys._getframe(1))[1] if generators is None else generators
        found = next((one for one in generators if one.f_locals.get("self") is module), None)
        known = self._here.entered
        known[:] = [pair for pair in known if pair[0] is found]
        if found is None:
            return None
        if not known:
            given = {**found.f_locals, **(found.f_locals.get("kwargs") or {})}
            known.append((found, Generation(module, *_prompt_of(module, given))))
        return known[0][1]

    def knows_generator(self, module: nn.Module, name: str) -> None:
        """Recognise a method that generates, also where it is called by a name that was bound before the block."""
        code = getattr(inspect.unwrap(getattr(type(module), name)), "__code__", None)
        if code is not None:
            self._generators.add(code)
            self._generating.add(id(module))

    @contextmanager
    def _watching_generate(self, module: nn.Module) -> Iterator[None]:
        def around_generate(generate: Callable[..., Any]) -> Callable[..., Any]:
            names = parameter_names(generate)

            @wraps(generate)
            def watched_generate(*args: Any, **kwargs: Any) -> Any:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                with self.generating(module, *_prompt_of(module, given)):
                    return generate(*args, **kwargs)

            return watched_generate

        def around_prepare(prepare: Callable[..., Any]) -> Callable[..., Any]:
            names = parameter_names(prepare)

            @wraps(prepare)
            def watched_prepare(*args: Any, **kwargs: Any) -> Any:
                self._prepared(module, {**dict(zip(names, args, strict=False)), **kwargs})
                return prepare(*args, **kwargs)

            return watched_prepare

        self.knows_generator(module, "generate")
        with ExitStack() as stack:
            stack.enter_context(replaced_method(module, "generate", around_generate))
            if callable(getattr(type(module), "prepare_inputs_for_generation", None)):
                stack.enter_context(replaced_method(module, "prepare_inputs_for_generation", around_prepare))
            yield

    def _prepared(self, module: nn.Module, given: Mapping[str, Any]) -> None:
        """Take note of the inputs of a step that is about to run: later they may hold a mask of four axes."""
        generation = self._generation(module, None)
        if generation is None:
            return
        encoder_too = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        mask = given.get("decoder_attention_mask" if encoder_too else "attention_mask")
        generation.mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            generation.total = None
            return
        if not ids.shape[1]:  # the prompt is embeddings, which the ids do not count
            generation.uncounted = generation.columns or 0
        generation.total = ids.shape[1] + generation.uncounted

    # ---------------------------------------------------- calls that still run

    def _alive(self, here: Any, regions: bool = True) -> tuple[list[_Frame], list[Any]]:
        """The calls that still run, and the Python frames in which torch checkpoints the present one, innermost first.

        Args:
            here: a Python frame; what is above it runs.
            regions: whether the second is asked for.
        """
        frames, alive = self._here.frames, []
        found: list[Any] = []
        if not frames and not regions:
            return frames, found
        places = {id(one.running): i for i, one in enumerate(frames)}
        while here is not None:
            # A call that an exception ended leaves its frame behind: it is not among those that run.
            place = places.get(id(here))
            if place is not None:
                alive.append(place)
                if not place:  # what is around the outermost does not change while it runs
                    found += frames[0].around
                    break
            elif regions and here.f_code.co_filename == CHECKPOINT_FILE and _is_checkpoint(here.f_code):
                found.append(here)
            here = here.f_back
        if len(alive) != len(frames):
            frames[:] = [frames[i] for i in reversed(alive)]
            if frames:  # it may be the outermost only now
                frames[0].around = tuple(self._outside(frames[0].running)[0])
        return frames, found

    def _outside(self, here: Any) -> tuple[list[Any], list[Any]]:
        """The Python frames from ``here`` outwards in which torch checkpoints, and those of methods that generate."""
        regions, generators, known = [], [], self._generators
        while here is not None:
            code = here.f_code
            if code in known:
                generators.append(here)
            elif code.co_filename == CHECKPOINT_FILE and _is_checkpoint(code):
                regions.append(here)
            here = here.f_back
        return regions, generators

    # ------------------------------------------------- forwards that run again

    def _places(self, regions: list[Any], key: Hashable) -> list[tuple[Hashable, Hashable]]:
        """The checkpoints around this passing of a site, and what tells it from the others in each."""
        counts = self._here.counts
        counts[:] = [(region, fired) for region, fired in counts if region in regions]
        found: list[tuple[Hashable, Hashable]] = []
        for region in regions:
            fired = next((fired for one, fired in counts if one is region), None)
            if fired is None:
                fired = {}
                counts.append((region, fired))
                if region.f_code.co_name not in RUN_AGAIN:  # what had this one's ids before is gone
                    for one in _checkpoint_of(region):
                        self._seen.pop(one, None)
            fired[key] = fired.get(key, 0) + 1
            found += [(one, (key, fired[key])) for one in _checkpoint_of(region)]
        return found

    def _before(self, places: list[tuple[Hashable, Hashable]], frames: list[_Frame]) -> Columns | None:
        """What the forward was that runs again while gradients are computed; None where this is one of its own.

        Raises:
            ConfigError: it runs again, and is not remembered.
        """
        known = (self._seen.get(checkpoint, {}).get(passing) for checkpoint, passing in places)
        found = next((one for one in known if one is not None), None)
        if found is not None or any(frame.authoritative for frame in frames):
            return found
        raise ConfigError(
            "a module ran again while gradients are computed, and which forward it was is not known: use "
            "torch.utils.checkpoint, inside the block"
        )

    # ------------------------------------------------------------------ shapes

    @staticmethod
    def _shape(acts: Tensor) -> tuple[int, int]:
        return acts.shape[0], acts.shape[1]

    def _columns(self, site: Site, acts: Tensor, text: Text, number: int) -> Columns:
        """Match what a site carries with the text of its stack."""
        have, want = self._shape(acts), text.shape
        if text.opaque or want is None:
            known = Text(have, start=0, prompt=have[1], pictured=text.pictured, generation=text.generation)
            return Columns(have, acts.device, known, number, self._host, site)
        make = lambda layout: Columns(want, acts.device, text, number, self._host, site, layout)  # noqa: E731
        if have == want:
            return make("same")
        if have == want[::-1]:
            return make("pos first")
        if have[0] * have[1] == want[0] * want[1] and 1 in have:
            return make("flat")
        # Other columns than those of the text: counted by themselves where nothing can shift them.
        apart = replace(text, shape=have, tokens=None, mask=None, earlier=None, prompt=have[1], turn=0)
        apart.derived = _is_placed(text) or have[1] == 1
        return Columns(have, acts.device, apart, number, self._host, site)


def ancestors(roots: Iterable[nn.Module], inside: nn.Module) -> list[nn.Module]:
    """The modules that hold another one, however deep, itself among them; outermost first."""
    parents: dict[int, list[nn.Module]] = {}
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for child in module._modules.values():
            if child is not None:
                parents.setdefault(id(child), []).append(module)
                todo.append(child)
    found, front = {id(inside): inside}, [inside]
    while front:
        above = parents.get(id(front.pop()), [])
        fresh = [one for one in above if id(one) not in found]
        found |= {id(one): one for one in fresh}
        front += fresh
    return [one for one in reversed(found.values()) if not isinstance(one, (nn.ModuleList, nn.ModuleDict))]


def _same(given: Given, around: Text) -> bool:
    """Whether a call inside another carries the other's text."""
    if around.opaque or around.shape is None or given.shape is None:
        return False
    if given.kind == "text":
        if given.shape != around.shape:
            return False
        if given.tokens is None or around.tokens is None:
            return True
        return given.tokens is around.tokens or given.tokens.data_ptr() == around.tokens.data_ptr()
    if given.shape in (around.shape, around.shape[::-1]):
        return True
    flat = given.shape[0] * given.shape[1] == around.shape[0] * around.shape[1]
    return flat and 1 in given.shape


def _is_placed(text: Text) -> bool:
    """Whether the columns of a text are not simply its positions."""
    return text.shape is not None and (text.mask is not None or text.earlier is not None or text.start != 0)


def _cache_in(output: Any) -> Any:
    """The cache that a call returns, None if it returns none."""
    if isinstance(output, Mapping):
        return find_cache(output.items())
    if isinstance(output, (tuple, list)):
        return find_cache((f"#{i}", value) for i, value in enumerate(output))
    return None


def _prompt_of(module: nn.Module, given: Mapping[str, Any]) -> tuple[int | None, Tensor | None]:
    """The columns of the prompt that ``generate`` was given, and which of them are no padding; None if unknown."""
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None, None  # the prompt is the decoder's, whose first forward tells
    prompt = next(
        (given[name] for name in ("inputs", "input_ids", "inputs_embeds") if isinstance(given.get(name), Tensor)), None
    )
    if prompt is None or prompt.dim() < 2:
        return None, None
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return prompt.shape[1], mask.bool()
    return prompt.shape[1], _inferred(module, prompt, given)


def _inferred(module: nn.Module, prompt: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """The mask that Hugging Face's ``generate`` makes for tokens that come without one."""
    if prompt.is_floating_point():
        return None
    configs = (given.get("generation_config"), getattr(module, "generation_config", None))
    told = [given.get("pad_token_id"), *(getattr(one, "pad_token_id", None) for one in configs)]
    pad = next((one for one in told if isinstance(one, int)), None)
    ends = [given.get("eos_token_id"), *(getattr(one, "eos_token_id", None) for one in configs)]
    end = next((one for one in ends if one is not None), None)
    if pad is None or pad == end or (isinstance(end, (list, tuple)) and pad in end):
        return None
    return prompt != pad


def _is_checkpoint(code: CodeType) -> bool:
    """Whether a function of torch's is one that runs what is checkpointed."""
    held = CHECKPOINTED.get(code.co_name)
    return held is not None and held[0] in (*code.co_varnames, *code.co_cellvars, *code.co_freevars)


def _checkpoint_of(region: Any) -> list[Hashable]:
    """What tells one checkpoint from all others that can still run again, whichever time it runs; best first."""
    found: list[Hashable] = []
    here = region.f_locals
    first = here.get("gen")  # of a checkpoint that is not reentrant; it holds what its second run is given
    while getattr(first, "gi_yieldfrom", None) is not None:
        first = first.gi_yieldfrom
    options = (
        here if region.f_code.co_name == "recompute_fn" else getattr(getattr(first, "gi_frame", None), "f_locals", {})
    )
    if isinstance(options.get("kwargs"), dict):
        found.append(("call", id(options["kwargs"])))
    function, args = (here.get(name) for name in CHECKPOINTED[region.f_code.co_name])
    tensors = (value for value in args or () if isinstance(value, Tensor))
    places = tuple((value.data_ptr(), tuple(value.shape)) for value in tensors)
    return [*found, (id(getattr(function, "run_function", function)), places)]


def _in_backward() -> bool:
    """Whether autograd is computing gradients in this thread."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1
