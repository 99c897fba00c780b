"""Damage a file of every format in thousands of ways: each is read, or refused by an error of saehooks; nothing else.

    python recipes/formats_fuzz.py                 20,000 mutations of each format (hours; --count for fewer)
    python recipes/formats_fuzz.py --count 200 --only "saelens standard"

Bits are flipped, bytes overwritten, cut, repeated and inserted; settings in configs get other values, other types and
other names, and are left out. A mutation fails when loading ends in any error but a `SaehooksError`, asks for memory
beyond the files by more than 64 MB, writes into the folder, or touches a file beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats_samples import Sample, samples

import saehooks as sh
from saehooks.errors import SaehooksError

SPARE = 64 * 2**20
"""Bytes that loading a small file may take beside it."""

VALUES: list[Any] = [None, True, False, 0, 1, -1, 7, 10**11, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "none"]
VALUES += ["topk", "..", "../../etc/passwd", [], [1], {}, {"a": 1}, "x" * 1000, [[[[]]]], -(10**9), 4_000_000, "float8"]


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """One damage to the bytes of a file."""
    if not data:
        return b"\x00"
    at, length = draw.randrange(len(data)), draw.choice([1, 2, 4, 8, 64, 1024])
    kind = draw.randrange(7)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + draw.randbytes(length) + data[at + length :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[at : at + length] * draw.choice([2, 3, 50]) + data[at + length :]
    if kind == 4:
        return data[:at] + draw.randbytes(length) + data[at:]
    if kind == 5:
        return data[:at] + data[at + length :]
    return data[:at] + draw.choice([b"\xff", b"\x00", b"9"]) * length + data[at + length :]


def mutate_settings(found: Any, draw: random.Random) -> Any:
    """One change to the settings of a config, at any depth."""
    if not isinstance(found, dict) or not found:
        return draw.choice(VALUES)
    key, kind = draw.choice(sorted(found)), draw.randrange(5)
    changed = dict(found)
    if kind == 0:
        changed.pop(key)
    elif kind == 1:
        changed["no_" + key] = changed.pop(key)
    elif kind == 2 and isinstance(changed[key], dict):
        changed[key] = mutate_settings(changed[key], draw)
    elif kind == 3:
        other = draw.choice(sorted(found))
        changed[key], changed[other] = changed[other], changed[key]
    else:
        changed[key] = draw.choice(VALUES)
    return changed


def mutate(files: list[Path], draw: random.Random) -> None:
    """One damage to one of the files."""
    file = draw.choice(files)
    data = file.read_bytes()
    try:
        if file.suffix == ".json" and draw.random() < 0.8:
            data = json.dumps(mutate_settings(json.loads(data), draw)).encode()
        elif file.suffix == ".safetensors" and draw.random() < 0.4:
            data = _with_other_header(data, draw)
        else:
            data = mutate_bytes(data, draw)
    except (ValueError, KeyError, TypeError):  # an earlier mutation left nothing to change there
        data = mutate_bytes(data, draw)
    file.write_bytes(data)


def _with_other_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header says something else of its tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = draw.choice(sorted(header))
    header[name] = mutate_settings(header[name], draw) if draw.random() < 0.7 else draw.choice(VALUES)
    if draw.random() < 0.3:
        header["W_strange"] = header.pop(name)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@contextmanager
def little_memory() -> Iterator[None]:
    """Inside the block asking for much more memory than is in use is a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


def fuzz(sample: Sample, count: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """How many of so many mutations were read or refused, and what went wrong."""
    draw, ends, wrong = random.Random(f"{sample.name} {seed}"), Counter[str](), []
    with tempfile.TemporaryDirectory() as room, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inside = Path(room, "inside")
        inside.mkdir()
        Path(room, "beside.txt").write_text("precious")
        source = sample.write(inside)
        files = sorted(p for p in inside.rglob("*") if p.is_file())
        whole = {file: file.read_bytes() for file in files}
        sh.load(source)
        for number in range(count):
            for _ in range(draw.choice([1, 1, 2, 3])):
                mutate(files, draw)
            before = state_of(Path(room))
            try:
                with little_memory():
                    sh.load(source)
                ends["read"] += 1
            except SaehooksError:
                ends["refused"] += 1
            except BaseException as error:  # whatever it is, it is what we look for
                wrong.append(f"{sample.name}, mutation {number}: {type(error).__name__}: {str(error)[:200]}")
            if state_of(Path(room)) != before:
                wrong.append(f"{sample.name}, mutation {number}: a file was written or touched")
            for file, data in whole.items():
                file.write_bytes(data)
    return ends, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="mutations of each format")
    parser.add_argument("--only", help="one format, by its name in the table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    for sample in samples():
        if options.only in (None, sample.name):
            ends, wrong = fuzz(sample, options.count, options.seed)
            failed += len(wrong)
            print(
                f"{sample.name:40} read {ends['read']:6}  refused {ends['refused']:6}  wrong {len(wrong)}", flush=True
            )
            for line in wrong[:5]:
                print("   ", line)
    raise SystemExit(int(failed > 0))


if __name__ == "__main__":
    main()
