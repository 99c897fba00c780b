"""Faults put into the library one at a time, each of which some test must catch.

    python tests/mutations.py                 # all of them; about ten seconds each
    python tests/mutations.py measure where   # those whose name contains one of the words

A mutation is one edit of one file: an off-by-one, a dropped scale, a wrong axis, a missing ``remove``, a stale cache.
The package is copied, the edit made there, and the tests named beside it run on the copy: one of them must fail.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One fault."""

    name: str
    file: str
    """In the package."""
    right: str
    """What the file says, once."""
    wrong: str
    files: str
    """Of tests, in ``tests/``."""
    only: str = ""
    """Which of their tests, as for ``pytest -k``."""


EFFECTS, MODELS, WHERE = "test_effects.py", "test_measure_models.py", "test_where.py"

MUTATIONS = [
    # ------------------------------------------------------------------ hooks
    Mutation(
        "hooks: remove leaves the hook",
        "hosts/hooks.py",
        "    def remove(self) -> None:\n        self._handle.remove()",
        "    def remove(self) -> None:\n        self._handle.id",
        "test_promises.py",
        "test_1_every_verb",
    ),
    Mutation(
        "hooks: a replaced method is not put back",
        "hosts/method_wrapper.py",
        "            if self._own is None:\n                del self._module.__dict__[self._name]",
        "            if self._own is None:\n                pass",
        "test_measure.py",
        "return_what_they_return",
    ),
    Mutation(
        "hooks: blocks that end out of order lose one another's wrapper",
        "hosts/method_wrapper.py",
        "            self._layers[place].below = layer.below",
        "            self._layers[place].below = self._method",
        "hosts/test_method_wrapper.py",
    ),
    Mutation(
        "hooks: what a hook returns keeps its own dtype",
        "hosts/site.py",
        "new.to(dtype=raw.dtype, device=raw.device)",
        "new.to(device=raw.device)",
        "test_promises.py",
        "test_3_a_model",
    ),
    Mutation(
        "hooks: the hooked tensor is written in place",
        "attachments/attachment.py",
        "flat.index_copy(0, rows.to(acts.device), new.to(acts)).reshape(acts.shape)",
        "flat.index_copy_(0, rows.to(acts.device), new.to(acts)).reshape(acts.shape)",
        "test_promises.py",
        "test_3_the_hooked",
    ),
    Mutation(
        "hooks: what an edit changes is taken away instead of added",
        "edits.py",
        "        return original.with_values(edited.values - original.values)",
        "        return original.with_values(original.values - edited.values)",
        "test_attach.py",
        "by_the_formula",
    ),
    Mutation(
        "hooks: an edit acts outside of where",
        "attachments/attachment.py",
        "return edited if mask is None else edit.merge_rows(codes, edited, mask)",
        "return edited",
        "test_attach.py",
        "where",
    ),
    Mutation(
        "hooks: autocast reaches into the SAE",
        "sparse_coder.py",
        "        return torch.autocast(device.type, enabled=False)",
        "        return torch.autocast(device.type, enabled=True)",
        "test_sae.py",
        "autocast",
    ),
    Mutation(
        "hooks: the scale of the rows is dropped",
        "edits.py",
        "    return replace(merged, scale=original.scale) if edited.scale is original.scale else merged",
        "    return replace(merged, scale=None)",
        "test_attach.py test_edits.py",
    ),
    Mutation(
        "hooks: the first tensor of an output is taken for all of it",
        "hosts/layout.py",
        "    values = [*holder[:place], new, *holder[place + 1 :]]",
        "    values = [*holder[:place], new]",
        "hosts/test_module.py",
    ),
    # -------------------------------------------------------------- positions
    Mutation(
        "positions: one off at the end",
        "where.py",
        "view.columns.place >= view.columns.length - 1",
        "view.columns.place >= view.columns.length",
        WHERE,
    ),
    Mutation(
        "positions: negative ones count from one too early",
        "where.py",
        "found = [place == (p if p >= 0 else length + p) for p in self.listed]",
        "found = [place == (p if p >= 0 else length + p - 1) for p in self.listed]",
        WHERE,
    ),
    Mutation(
        "positions: the end of a slice is inside",
        "where.py",
        "return inside if end is None else inside & (place < end)",
        "return inside if end is None else inside & (place <= end)",
        WHERE,
    ),
    Mutation(
        "positions: padding has positions",
        "hosts/sequences.py",
        "return counted.masked_fill(~full[:, start:], -1)",
        "return counted",
        WHERE,
        "padd",
    ),
    Mutation(
        "positions: real tokens are counted along the batch",
        "hosts/sequences.py",
        "counted = full.cumsum(-1)[:, start:] - 1",
        "counted = full.cumsum(0)[:, start:] - 1",
        f"{WHERE} {MODELS}",
        "padd",
    ),
    Mutation(
        "positions: the cache's length is forgotten",
        "hosts/sequences.py",
        "        if full is None:\n            return columns + start\n",
        "        if full is None:\n            return columns\n",
        WHERE,
    ),
    Mutation(
        "positions: padding is acted on",
        "where.py",
        "    return mask if real is None else mask & real\n",
        "    return mask\n",
        f"{MODELS} {EFFECTS} {WHERE}",
        "padd",
    ),
    Mutation(
        "positions: all but the first takes the first in",
        "where.py",
        "return None if view.columns.text.pictured else view.columns.place != 0",
        "return None if view.columns.text.pictured else view.columns.place >= 0",
        WHERE,
    ),
    Mutation(
        "positions: what never came is not said",
        "where.py",
        "        missing = [p for p in self._asked if p not in self._came]",
        "        missing = [p for p in self._asked if p not in self._came and p < 0]",
        f"{WHERE} {EFFECTS} {MODELS}",
        "come or position",
    ),
    # ---------------------------------------------------------------- measure
    Mutation(
        "measure: tokens are predicted by their own column",
        "evaluation/logits.py",
        "        ids = tokens[:, 1:].to(logits.device)",
        "        ids = tokens[:, :-1].to(logits.device)",
        MODELS,
        "padded_batch",
    ),
    Mutation(
        "measure: a text predicts the first token of its padding",
        "evaluation/comparison.py",
        "(place[:, 1:] == place[:, :-1] + 1) & (place[:, :-1] >= 0)",
        "(place[:, :-1] >= 0)",
        MODELS,
        "padded_batch",
    ),
    Mutation(
        "measure: labels of -100 count",
        "evaluation/logits.py",
        "choices = [Targets(ids, ids != IGNORED, by_labels=True) for ids in fitting]",
        "choices = [Targets(ids.clamp(min=0), ids == ids, by_labels=True) for ids in fitting]",
        MODELS,
        "labels_say",
    ),
    Mutation(
        "measure: labels are always shifted",
        "evaluation/logits.py",
        "            choices = choices if shifts else choices[::-1]\n        loss",
        "            choices = choices[:1]\n        loss",
        MODELS,
        "masked or encoder_decoders",
    ),
    Mutation(
        "measure: the zero-ablated run is spliced",
        "evaluation/three_runs.py",
        "masked_fill(mask.to(acts.device)[..., None], 0.0)",
        "masked_fill(mask.to(acts.device)[..., None], 1.0)",
        MODELS,
        "padded_batch",
    ),
    Mutation(
        "measure: models that see later tokens pass",
        "evaluation/logits.py",
        "        if bool((before - after).abs().max() > tolerance * before.abs().max()):",
        "        if bool((before - after).abs().max() > before.abs().max()):",
        MODELS,
        "sees_later",
    ),
    Mutation(
        "measure: another block's runs are taken for calls",
        "evaluation/block.py",
        "            if is_rerun() or runs.is_running:",
        "            if runs.is_running:",
        MODELS,
        "two_blocks",
    ),
    Mutation(
        "measure: other blocks record the runs in between",
        "hosts/sequences.py",
        "(is_rerun() and not self._of_reruns)",
        "(is_rerun() and self._of_reruns)",
        MODELS,
        "other_blocks",
    ),
    Mutation(
        "measure: random numbers of the user are used up",
        "hosts/reruns.py",
        "            stack.enter_context(torch.random.fork_rng(devices=devices))\n",
        "",
        f"{MODELS} test_measure.py",
        "statistics",
    ),
    Mutation(
        "measure: the statistics of a batch norm stay changed",
        "hosts/reruns.py",
        "                buffer.copy_(value)",
        "                buffer.copy_(buffer)",
        MODELS,
        "statistics",
    ),
    Mutation(
        "measure: a stale prefix is handed out",
        "hosts/partial_forward.py",
        "self._reached and all(_versions(call.output) == call.versions for call in self._calls)",
        "self._reached",
        MODELS,
        "written_over",
    ),
    Mutation(
        "measure: resuming is not tried before it is trusted",
        "evaluation/three_runs.py",
        "            self._resume = _same_rows(_tensor(",
        "            self._resume = True or _same_rows(_tensor(",
        MODELS,
        "handed_on",
    ),
    Mutation(
        "measure: the divergence is taken the other way round",
        "evaluation/logits.py",
        'F.kl_div(log_spliced, log_clean, reduction="sum", log_target=True)',
        'F.kl_div(log_clean, log_spliced, reduction="sum", log_target=True)',
        MODELS,
        "padded_batch",
    ),
    Mutation(
        "measure: figures of the site take in what was not spliced",
        "evaluation/three_runs.py",
        "inside = slice(None) if one.mask is None else one.mask",
        "inside = slice(None)",
        MODELS,
        "padded_batch",
    ),
    Mutation(
        "measure: shrinkage is the ratio the other way round",
        "metrics.py",
        "    return recons.norm(dim=-1) / torch.where(norms == 0, 1.0, norms)",
        "    return norms / recons.norm(dim=-1)",
        f"test_metrics.py {MODELS}",
        "padded_batch or shrink",
    ),
    Mutation(
        "measure: all three runs' logits are kept",
        "evaluation/three_runs.py",
        "        zero = comparison.reduce("
        '_tensor(comparison, self._rerun(call, comparison, "zero", prefix)), targets)\n',
        '        whole = _tensor(comparison, self._rerun(call, comparison, "zero", prefix))\n'
        "        zero = comparison.reduce(whole, targets)\n",
        MODELS,
        "never_all",
    ),
    # ----------------------------------------------------------------- causal
    Mutation(
        "causal: only the first time that a module runs counts",
        "causal/ablation.py",
        "passes = tuple(one.codes.where(one.mask) for one in trace.forwards)",
        "passes = tuple(one.codes.where(one.mask) for one in trace.forwards[:1])",
        EFFECTS,
        "runs_again",
    ),
    Mutation(
        "causal: codes of the clean run are used again at every firing",
        "attachments/attachment.py",
        "known = self.known if not self.trace.calls else None",
        "known = self.known",
        EFFECTS,
        "three",
    ),
    Mutation(
        "causal: a tensor without a batch axis is cut by rows",
        "hosts/partial_forward.py",
        "    if not differing:\n        return None\n",
        "    if not differing:\n        return _Rows(0, 1)\n",
        EFFECTS,
        "plain_modules",
    ),
    Mutation(
        "causal: rows of a shared axis are taken one by one",
        "hosts/partial_forward.py",
        "places = rows[:, None] * where.block + torch.arange(where.block)",
        "places = rows[:, None] + torch.arange(where.block)",
        EFFECTS,
        "plain_modules",
    ),
    Mutation(
        "causal: resuming is trusted untried",
        "hosts/partial_forward.py",
        "        return equal_up_to_rounding(resumed, whole)\n",
        "        return True\n",
        "test_causal.py",
        "bound",
    ),
    Mutation(
        "causal: an ablation goes to the next sequence",
        "causal/ablation.py",
        "places = rows[:, None] * pos + torch.arange(pos)",
        "places = (rows[:, None] + 1) % len(run.part.rows) * pos + torch.arange(pos)",
        EFFECTS,
        "tokenizer or plain_modules",
    ),
    Mutation(
        "causal: padding is run as text",
        "causal/runs.py",
        "        yield row[mask]\n",
        "        yield row\n",
        EFFECTS,
        "tokenizer",
    ),
    Mutation(
        "causal: attribution takes in what where leaves out",
        "causal/attribution.py",
        "held = [one.codes.detach().where(one.mask) for one in passes]",
        "held = [one.codes.detach() for one in passes]",
        "test_causal.py",
        "position_0",
    ),
    Mutation(
        "causal: an effect has the wrong sign",
        "causal/attribution.py",
        "-(codes.values * grad.values).cpu().double() * weight",
        "(codes.values * grad.values).cpu().double() * weight",
        "test_causal.py",
        "attribution_is_exact",
    ),
    Mutation(
        "causal: the path of integrated gradients is not averaged",
        "causal/attribution.py",
        "1 / (len(points) - 1 or 1)",
        "1.0",
        "test_causal.py",
        "add_up",
    ),
    Mutation(
        "causal: a position that one text lacks is an error",
        "causal/runs.py",
        "        self._last, self._calls = attachment, self._calls + watch.calls",
        "        self._last, self._calls = attachment, self._calls + watch.calls\n        self.check_used()",
        EFFECTS,
        "only_some",
    ),
    Mutation(
        "causal: dropout is not said",
        "hosts/train_mode.py",
        "    if not module.training:\n        return None\n",
        "    if module.training:\n        return None\n",
        EFFECTS,
        "train_mode",
    ),
]


HEAVY = ["torch", "transformers", "transformers.models.llama.modeling_llama", "pytest", "rich.live", "peft"]
"""What every run of tests imports: once, before the runs begin."""


def survives(mutation: Mutation) -> str | None:
    """Make the fault and run its tests; what pytest said if none failed, None if one did."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("saehooks", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / "saehooks" / mutation.file
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(mutation.right, mutation.wrong), encoding="utf-8")
        words = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
        words += [f"tests/{one}" for one in mutation.files.split()] + (["-k", mutation.only] if mutation.only else [])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(HEAVY)
        process = context.Process(target=run_pytest, args=(str(copy), words))
        process.start()
        process.join()
        said = (copy / "said.txt").read_text(encoding="utf-8")
    return None if process.exitcode == 1 else f"pytest ended with {process.exitcode}: {said[-300:]}"


def run_pytest(folder: str, words: list[str]) -> None:
    """Run pytest on a copy of the package, in a process of its own, and end it with pytest's code."""
    os.chdir(folder)
    sys.path[:] = [folder, *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests"))]
    with open("said.txt", "w", encoding="utf-8") as said, redirect_stdout(said), redirect_stderr(said):
        import pytest

        code = int(pytest.main(words))
    os._exit(code)


def main(wanted: list[str]) -> int:
    """Run the mutations whose name has one of the words; the number that no test caught."""
    chosen = [one for one in MUTATIONS if not wanted or any(word in one.name for word in wanted)]
    alive = 0
    for mutation in chosen:
        said = survives(mutation)
        alive += said is not None
        print(f"{'SURVIVED' if said else 'caught'}  {mutation.name}" + (f"\n    {said}" if said else ""), flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} caught")
    return alive


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
