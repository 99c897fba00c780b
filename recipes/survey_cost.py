"""What `sh.survey` costs beside the model's own forwards: time as a ratio, and memory.

    python recipes/survey_cost.py                                       # 49,152 tokens of the packaged text
    nice python recipes/survey_cost.py --text wikipedia.txt --tokens 1000000 --every 8

All 4,608 latents of the packaged SAE of SmolLM2, everything that a survey keeps. The survey is the real one: between
two of its batches the same batch goes through the model alone, once whole and once stopped at the site, so that all
three are timed in turns on the same machine. Writes results/survey_cost.md; Ctrl-C writes it of what was read.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import saehooks as sh
from saehooks.demo import packaged_sae, smollm2, text
from saehooks.hosts import host
from saehooks.streams import read_text


class Turns:
    """The batches of a survey, with a forward of the same batch timed before every n-th of them."""

    def __init__(self, model, site: str, batches: sh.TokenBatches, every: int) -> None:
        self.source, self.batches, self.every = host(model), batches, every
        self.site = self.source.site(site)
        self.seconds: dict[str, list[float]] = {"whole forward": [], "forward to the site": [], "survey": []}
        self.surveyed = 0.0
        """Seconds of the survey over all batches."""
        self.before = self.largest = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number, batch in enumerate(self.batches):
            paired = number % self.every == 0
            if paired:
                self._alone(batch, stops=number % (2 * self.every) == 0)
                self._alone(batch, stops=number % (2 * self.every) != 0)
            if number == 0:
                self.before = resident("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading the model
            began = time.thread_time()
            yield batch
            taken = time.thread_time() - began
            self.surveyed += taken
            if paired:
                self.seconds["survey"].append(taken)
            if number % 64 == 0:
                print(f"{number} batches, ratio {self.ratio('whole forward'):.2f}", flush=True)

    def _alone(self, batch: torch.Tensor, stops: bool) -> None:
        began = time.thread_time()
        with torch.no_grad():
            if stops:
                with self.source.stop_at(self.site):
                    self.source.run(batch)
            else:
                self.source.run(batch)
        self.seconds["forward to the site" if stops else "whole forward"].append(time.thread_time() - began)

    def ratio(self, base: str) -> float:
        """Median over the paired batches of the survey's time over that of a forward."""
        return statistics.median(a / b for a, b in zip(self.seconds["survey"], self.seconds[base], strict=True))


def resident(what: str) -> int:
    """Bytes of memory of this process: ``VmRSS`` now, ``VmHWM`` at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="by default the packaged slice of Wikipedia")
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--every", type=int, default=4, help="compare every n-th batch with plain forwards")
    parser.add_argument("--folder", type=Path, help="where to save the index")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "survey_cost.md")
    args = parser.parse_args()
    model, tokenizer = smollm2()
    sae = packaged_sae("smollm2")
    words = read_text([args.text]) if args.text else text("train")
    batches = sh.TokenBatches(tokenizer, words, context=128, batch_size=8, limit=args.tokens)
    turns = Turns(model, sae.hook_name, batches, args.every)
    with torch.no_grad():
        model(next(iter(batches)))  # the first forward of a process is slower
    began = time.thread_time()
    index = sh.survey(model, sae, turns, folder=args.folder, progress=False)
    alone = sum(turns.seconds["whole forward"]) + sum(turns.seconds["forward to the site"])
    finish = time.thread_time() - began - alone - turns.surveyed
    report = written(turns, index, finish, resident("VmHWM"), args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report, encoding="utf-8")
    print(report)


def written(turns: Turns, index: sh.LatentIndex, finish: float, peak: int, args: argparse.Namespace) -> str:
    """The figures, as Markdown."""
    forwards = {
        name: sum(turns.seconds[name]) / len(turns.seconds[name]) for name in ("whole forward", "forward to the site")
    }
    batches = index.sequences / 8
    rows = []
    for name, mean in forwards.items():
        whole = (turns.surveyed + finish) / (mean * batches)
        rows.append(f"| {name} | {1e3 * mean:.0f} ms | {turns.ratio(name):.2f} | {whole:.2f} |")
    kept = sum(one.nbytes for shelf in (index.best, index.drawn) for one in shelf.values()) + index.quantiles.nbytes
    words = "the packaged text, a slice of English Wikipedia" if args.text is None else args.text.name
    text_option = "" if args.text is None else f" --text {args.text.name}"
    ended = "" if index.complete else f" Stopped by hand after {index.sequences * 128:,} of {args.tokens:,} tokens."
    saving = ", saving" if args.folder else ""
    return "\n".join(
        [
            "# What a survey costs",
            "",
            f"All {len(index):,} latents of the packaged SAE at `{index.site}` of SmolLM2-135M-Instruct, "
            f"{index.positions:,} positions of {index.sequences:,} sequences, batches of 8 x 128 tokens; one thread's "
            f"own time. The text is {words}. Every {args.every}th batch went through the model alone too.{ended}",
            "",
            "| beside | a batch of it | a batch of the survey, median ratio | the whole survey, its end included |",
            "|---|---|---|---|",
            *rows,
            "",
            f"The end of a survey (quantiles, neighbours, logits of all latents{saving}) took {finish:.0f} s, "
            f"{finish / (turns.surveyed + finish):.1%} of it. Memory: {turns.before / 1e6:,.0f} MB before the first "
            f"batch, at most {peak / 1e6:,.0f} MB; contexts and quantiles are {kept / 1e6:,.0f} MB of it. "
            f"{len(index.dead):,} latents never fired.",
            "",
            f"    python recipes/survey_cost.py{text_option} --tokens {args.tokens} --every {args.every}",
            "",
        ]
    )


if __name__ == "__main__":
    main()
