"""A gigabyte of text in less than a gigabyte of memory, and two gigabytes of activations on disk.

    python recipes/streams.py --part text               # text, JSON lines and Parquet of 1 GB each
    python recipes/streams.py --part shards             # 2 GB of made-up activations: written, read, trained on
    python recipes/streams.py --part live               # SmolLM2: training from disk against training live
    python recipes/streams.py --part ten                # ten SAEs from one pass against ten runs
    python recipes/streams.py --folder /big --megabytes 1000 --seconds 300

- text: each file is read whole (cut into documents and pieces, not tokenised); then tokenised for some seconds; then
  entered a little before its end, once from the beginning of that part and once from a batch in it, whose rest must be
  the same. Each file has a process of its own, whose peak of memory is the operating system's figure.
- shards: rows are sums of a few random directions, made by a model of one layer. Memory while an SAE is trained on
  them, and rows per second of reading alone and of training.
- live: the same rows, once from the model's forwards and once from disk. The SAEs must be equal bit for bit.
- ten: SAEs of several sites, sizes, architectures and seeds, from one `sh.fit` and from one each.

What is made is removed at the end. Writes results/streams.md, a section for each part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import nn

import saehooks as sh
from saehooks.demo import smollm2, text
from saehooks.streams.documents import source_of

RESULTS = Path(__file__).parent / "results" / "streams.md"
PARTS = ("text", "shards", "live", "ten")
KINDS = ("txt", "jsonl", "parquet")
SITE = "blocks.15.hook_resid_post"
CONTEXT, BATCH = 128, 16
WIDTH, LATENTS = 576, 1152


def resident(what: str) -> float:
    """10^6 bytes of this process: ``VmHWM`` at most so far, ``RssAnon`` now, of its own."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024 / 1e6


# ------------------------------------------------------------------------ text


def documents(size: int) -> Iterator[str]:
    """About so many bytes of the packaged paragraphs, again and again, each with a number that makes it another."""
    written = 0
    for number, paragraph in enumerate(cycle(one for one in text("train").split("\n") if one.strip())):
        document = f"{number}. {paragraph}"
        written += len(document.encode()) + 1
        yield document
        if written >= size:
            return


def write(kind: str, file: Path, size: int) -> None:
    """A file of documents; the Parquet file has one row group, as pyarrow makes it by default."""
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        schema, made = pyarrow.schema([("text", pyarrow.string())]), documents(size)
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            while part := list(islice(made, 2**20)):
                writer.write_table(pyarrow.table({"text": part}, schema), row_group_size=2**20)
        return
    with file.open("w", encoding="utf-8") as out:
        for document in documents(size):
            out.write((json.dumps({"text": document}) if kind == "jsonl" else document) + "\n")


def save_tokenizer(folder: Path) -> None:
    """That of SmolLM2, without the model's file, of which it would take memory to read it."""
    import transformers

    from saehooks.demo.models import smollm2_file

    file = smollm2_file()
    transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def place_near_end(kind: str, file: Path) -> list:
    """Of a document in the last megabytes, as a source enters it."""
    if kind == "parquet":
        import pyarrow.parquet

        found = pyarrow.parquet.ParquetFile(file).metadata
        group = found.num_row_groups - 1
        return [[0, group, max(0, found.row_group(group).num_rows - 2000), 0], 0]
    with file.open("rb") as opened:
        opened.seek(file.stat().st_size - 2_000_000)
        opened.readline()
        return [[0, opened.tell()] + ([0] if kind == "jsonl" else []), 0]


def stream(kind: str, file: Path, seconds: float) -> dict:
    """What one process meets that reads a file."""
    import transformers

    made = transformers.AutoTokenizer.from_pretrained(file.parent / "tokenizer")
    found: dict = {"before": resident("VmHWM")}
    began, characters = time.process_time(), 0
    for piece in source_of(file).pieces([]):
        characters += len(piece.content)
    found |= {"characters": characters, "read": time.process_time() - began, "reading": resident("VmHWM")}
    batches = sh.TokenBatches(made, file, context=CONTEXT, batch_size=BATCH)
    began, processor, tokens = time.perf_counter(), time.process_time(), 0
    for batch in batches:
        tokens += batch.numel()
        if time.perf_counter() - began > seconds:
            break
    found |= {"tokens": tokens, "processor": time.process_time() - processor, "tokenising": resident("VmHWM")}
    began, position = time.process_time(), place_near_end(kind, file)
    last = batches.from_batch(10**6, position)
    first = next(last)
    found["entered"] = time.process_time() - began
    rest, places = [first, *last], {}
    for number, _ in zip(range(len(rest)), batches.from_batch(10**6, position), strict=False):
        places[number] = batches.position_of(10**6 + number)
    middle = len(rest) // 2
    again = list(batches.from_batch(10**6 + middle, places[middle]))
    found["same"] = len(again) == len(rest) - middle and all(map(torch.equal, again, rest[middle:]))
    return found | {"rest": len(rest), "peak": resident("VmHWM")}


def texts(folder: Path, megabytes: int, seconds: float) -> list[str]:
    """A line for each kind of file."""
    save_tokenizer(folder / "tokenizer")
    lines = [
        "## Text",
        "",
        f"{megabytes:,} MB of it: the packaged paragraphs of Wikipedia, repeated with a number before each; SmolLM2's "
        "tokenizer. Memory is the process's whole resident memory at its peak, Python with torch and transformers "
        "included; times are processor time of one thread.",
        "",
        "| file | size | before it is opened | read whole | tokenised | peak of all | MB/s read "
        "| tokens/s | to enter near the end | rest the same |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        file = folder / f"text.{kind}"
        write(kind, file, megabytes * 10**6)
        command = [sys.executable, __file__, "--child", kind, str(file), "--seconds", str(seconds)]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        size = file.stat().st_size / 1e6
        lines.append(
            f"| {kind} | {size:,.0f} MB | {found['before']:,.0f} MB | {found['reading']:,.0f} MB "
            f"| {found['tokenising']:,.0f} MB ({found['tokens'] / 1e6:.1f}M tokens) | **{found['peak']:,.0f} MB** "
            f"| {found['characters'] / 1e6 / found['read']:,.0f} | {found['tokens'] / found['processor']:,.0f} "
            f"| {found['entered']:.2f} s | {found['same']} ({found['rest']} batches) |"
        )
        print(lines[-1], flush=True)
        file.unlink()
    return lines


# ----------------------------------------------------------------- activations


class Mixtures(nn.Module):
    """Rows (n, WIDTH) that are sums of three directions, by the digits of a number, with a mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.directions = nn.Embedding(3 * 1024, WIDTH)
        self.site = nn.Identity()

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        parts = (self.directions((numbers >> 10 * digit) % 1024 + 1024 * digit) for digit in range(3))
        return self.site(sum(parts) + 0.3)


class Numbers:
    """Batches of random numbers below 2^30, as many as make so many rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows // 8192

    def __iter__(self) -> Iterator[torch.Tensor]:
        draw = torch.Generator().manual_seed(1)
        for _ in range(len(self)):
            yield torch.randint(0, 2**30, (8, 1024), generator=draw)


def shards(folder: Path, megabytes: int) -> list[str]:
    """Written, read, trained on; memory at tenths of the training."""
    rows = megabytes * 10**6 // (4 * WIDTH)
    began = time.perf_counter()
    acts = sh.harvest(Mixtures().eval(), Numbers(rows), "site", where=sh.everywhere, to=folder / "acts")
    written = time.perf_counter() - began
    began, read = time.process_time(), 0
    for part in sh.Activations(folder / "acts"):
        read += len(part)
    reading = time.process_time() - began
    torch.manual_seed(0)
    sae = sh.SAE(WIDTH, LATENTS, "linear", "topk", k=8)
    memory: list[tuple[int, float]] = []

    def note(record: dict) -> None:
        memory.append((record["rows"], resident("RssAnon")))

    began = time.process_time()
    trainer = sh.fit(acts, sae, on_record=note, progress=False, log_every=5)
    training = time.process_time() - began
    size = sum(file.stat().st_size for file in (folder / "acts").iterdir()) / 1e6
    tenths = [memory[round(i * (len(memory) - 1) / 10)] for i in range(1, 11)]
    return [
        "## Activations on disk",
        "",
        f"{acts.rows:,} rows of width {WIDTH} in float32, {size:,.0f} MB in "
        f"{len(list((folder / 'acts').glob('*.safe*')))} shards, written at {size / written:,.0f} MB/s. A linear TopK "
        f"SAE of {LATENTS:,} latents is trained on all of them, shuffled; rows a second are of processor time, one "
        "thread.",
        "",
        "| | rows/s |",
        "|---|---|",
        f"| read, checked and shuffled alone | {read / reading:,.0f} |",
        f"| trained on | {trainer.rows_seen / training:,.0f} |",
        "",
        "| rows trained on | " + " | ".join(f"{seen:,}" for seen, _ in tenths) + " |",
        "|---|" + "---|" * len(tenths),
        "| memory of the process's own | " + " | ".join(f"{used:,.0f} MB" for _, used in tenths) + " |",
        "",
        f"NMSE {trainer.latest('nmse'):.4f} at the end. Peak of resident memory: {resident('VmHWM'):,.0f} MB.",
    ]


def live(folder: Path, tokens: int) -> list[str]:
    """The same rows from the model and from disk."""
    model, words = smollm2()
    batches = sh.TokenBatches(words, text("train"), context=CONTEXT, batch_size=8, limit=tokens)
    settings = {"progress": False, "batch_size": 512, "buffer_rows": 4096, "decay": 0.0}
    saes, rates = {}, {}
    began = time.process_time()
    sh.harvest(model, batches, SITE, to=folder / "live")
    harvested = time.process_time() - began
    for name in ("live", "from disk"):
        torch.manual_seed(0)
        saes[name] = sh.SAE(model.cfg.d_model, 4608)
        began = time.process_time()
        if name == "live":
            trainer = sh.fit(model, saes[name], batches, SITE, **settings)
        else:
            trainer = sh.fit(sh.Activations(folder / "live", shuffle=False), saes[name], **settings)
        rates[name] = trainer.rows_seen / (time.process_time() - began)
    states = saes["live"].state_dict(), saes["from disk"].state_dict()
    same = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    return [
        "## Training from disk against training live",
        "",
        f"SmolLM2-135M-Instruct, `{SITE}`, {trainer.rows_seen:,} rows of the packaged text, the default SAE of 4,608 "
        f"latents, batches of 512; rows a second of processor time, one thread. The weights at the end are "
        f"**{'the same bit for bit' if same else 'NOT the same'}**.",
        "",
        "| | rows/s | as a ratio |",
        "|---|---|---|",
        *(f"| {name} | {rate:,.0f} | {rate / rates['live']:.2f} |" for name, rate in rates.items()),
        f"| harvest to disk, once | {trainer.rows_seen / harvested:,.0f} | "
        f"{trainer.rows_seen / harvested / rates['live']:.2f} |",
    ]


TEN = [
    ("concepts", "sparsemax", SITE, 1152, 0, {}),
    ("concepts", "sparsemax", SITE, 1152, 1, {}),
    ("concepts", "sparsemax", SITE, 2304, 0, {}),
    ("concepts", "sparsemax", "blocks.7.hook_resid_post", 1152, 0, {}),
    ("linear", "topk", SITE, 1152, 0, {"k": 32}),
    ("linear", "topk", "blocks.7.hook_resid_post", 1152, 0, {"k": 32}),
    ("linear", "batchtopk", SITE, 1152, 0, {"k": 32}),
    ("linear", "jumprelu", SITE, 1152, 0, {}),
    ("kron", "topk", SITE, 1152, 0, {"k": 32}),
    ("concepts", "entmax", SITE, 1152, 0, {}),
]
"""Dictionary, activation, site, latents, seed, settings."""


def ten(tokens: int) -> list[str]:
    """One call of `sh.fit` with ten SAEs, and ten calls with one each."""
    model, words = smollm2()
    batches = sh.TokenBatches(words, text("train"), context=CONTEXT, batch_size=8, limit=tokens)
    settings = {"progress": False, "batch_size": 128, "buffer_rows": 512}

    def made() -> dict[str, sh.SAE]:
        found = {}
        for number, (dictionary, activation, site, latents, seed, more) in enumerate(TEN):
            torch.manual_seed(seed)
            found[str(number)] = sh.SAE(WIDTH, latents, dictionary, activation, hook_name=site, **more)
        return found

    began, together = time.process_time(), made()
    sh.fit(model, together, batches, **settings)
    once = time.process_time() - began
    began, alone = time.process_time(), made()
    for sae in alone.values():
        sh.fit(model, sae, batches, **settings)
    each = time.process_time() - began
    states = ((sae.state_dict(), alone[name].state_dict()) for name, sae in together.items())
    same = sum(all(torch.equal(value, two[name]) for name, value in one.items()) for one, two in states)
    return [
        "## Ten SAEs in one pass",
        "",
        "Two sites, two sizes, three dictionaries, five activations, two seeds; SmolLM2-135M-Instruct, "
        f"{tokens:,} tokens. "
        f"One pass takes {once / each:.2f} of the processor time of ten runs ({once:.0f} s, {each:.0f} s). "
        f"**{same} of {len(TEN)} SAEs are the same bit for bit.**",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="all if left out")
    parser.add_argument("--folder", type=Path, help="where the large files go for a while")
    parser.add_argument("--megabytes", type=int, default=1000, help="of each text; activations have twice as many")
    parser.add_argument("--seconds", type=float, default=60.0, help="that each text is tokenised for (%(default)s)")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the part live; a quarter for ten (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.child:
        print(json.dumps(stream(chosen.child[0], Path(chosen.child[1]), chosen.seconds)))
        return
    known = chosen.out.read_text().split("\n\n## ")[1:] if chosen.out.exists() else []
    sections = {one.splitlines()[0]: one.rstrip() for one in known}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        for part in chosen.part or PARTS:
            made = {
                "text": lambda: texts(Path(folder), chosen.megabytes, chosen.seconds),
                "shards": lambda: shards(Path(folder), 2 * chosen.megabytes),
                "live": lambda: live(Path(folder), chosen.tokens),
                "ten": lambda: ten(chosen.tokens // 4),
            }[part]()
            section = "\n".join(made).removeprefix("## ")
            sections[section.splitlines()[0]] = section
            head = "# Streams larger than memory\n\nMade by `python recipes/streams.py`."
            chosen.out.write_text("\n\n## ".join([head, *sections.values()]) + "\n")
            print(section, flush=True)


if __name__ == "__main__":
    main()
