"""Texts and tokens of every kind as batches: what is in them, where they begin again, what memory they take."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError
from saehooks.streams import documents, tokens

SITE = "blocks.1.hook_resid_post"


def words(n, seed=0):
    """A text of n words that the tiny tokenizer knows, 17 to a line."""
    draw = np.random.default_rng(seed).integers(0, 50, n)
    return "\n".join(" ".join(f"w{i}" for i in draw[start : start + 17]) for start in range(0, n, 17))


def right_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def large(monkeypatch):
    """Every source counts as large, and pieces are short."""
    monkeypatch.setattr(tokens, "SMALL", -1)
    monkeypatch.setattr(documents, "PIECE", 200)


def in_every_form(folder, text):
    """The same words as a text, a file, rows of files and datasets, and tokens."""
    datasets = pytest.importorskip("datasets")
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    lines = text.split("\n")
    (folder / "a.txt").write_text(text)
    (folder / "a.jsonl").write_text("".join(json.dumps({"n": 1, "text": line}) + "\n" for line in lines))
    parquet.write_table(table({"text": lines}), folder / "a.parquet", row_group_size=3)
    rows = datasets.Dataset.from_dict({"text": lines})
    return {
        "text": text,
        "file": folder / "a.txt",
        "file by name": [str(folder / "a.txt")],
        "lines": lines,
        "jsonl": folder / "a.jsonl",
        "parquet": [folder / "a.parquet"],
        "dataset": rows,
        "streaming dataset": rows.to_iterable_dataset(),
    }


def test_every_form_of_a_text_gives_the_same_batches(tiny_tokenizer, tmp_path, large):
    """Documents joined, the sequences are those of the whole text, each behind a BOS, whatever it was read from."""
    text = words(700)
    ids = right_ids(tiny_tokenizer, text)
    right = torch.tensor(ids[: 10 * (len(ids) // 10)]).reshape(-1, 10)
    arrays = {
        "tokens": torch.tensor(ids),
        "int32": np.asarray(ids, dtype=np.int32),
        "rows": [ids[:100], ids[100:101], ids[101:]],
    }
    np.save(tmp_path / "ids.npy", np.asarray(ids, dtype=np.uint16))
    for name, source in {**in_every_form(tmp_path, text), **arrays, "npy": tmp_path / "ids.npy"}.items():
        made = sh.TokenBatches(tiny_tokenizer, source, context=11, batch_size=8)
        for _ in range(2):
            got = torch.cat(list(made))
            assert (got[:, 0] == 0).all(), name
            assert torch.equal(got[:, 1:], right), name


def test_any_batch_can_be_entered(tiny_tokenizer, tmp_path, large):
    """From each batch on, with or without the place that was noted for it, the rest is the same."""
    for name, source in in_every_form(tmp_path, words(500)).items():
        for options in ({}, {"bos": "document"}, {"documents": "pad"}):
            made = sh.TokenBatches(tiny_tokenizer, source, context=7, batch_size=4, **options)
            whole = list(made)
            for number in (1, 5, len(whole) - 1):
                for place in (None, json.loads(json.dumps(made.position_of(number)))):
                    again = sh.TokenBatches(tiny_tokenizer, source, context=7, batch_size=4, **options)
                    rest = list(again.from_batch(number, place))
                    assert len(rest) == len(whole) - number, (name, options, number)
                    for one, other in zip(whole[number:], rest, strict=True):
                        same = one == other if isinstance(one, torch.Tensor) else one["input_ids"] == other["input_ids"]
                        assert bool(same.all()), (name, options, number)


@pytest.mark.parametrize("options", [{"bos": "document"}, {"documents": "pad"}, {}])
def test_long_documents_of_any_form_are_read_in_pieces(tiny_tokenizer, tmp_path, large, options):
    """A row longer than a piece gives the sequences of its whole text, an empty one none, and any can be entered."""
    lengths = (5, 900, 0, 40, 333)
    texts = [words(n, n) for n in lengths]
    datasets = pytest.importorskip("datasets")
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parquet.write_table(table({"text": texts}), tmp_path / "a.parquet")
    rows = datasets.Dataset.from_dict({"text": texts})
    form = {"context": 8, "batch_size": 4, **options}
    wanted = list(sh.TokenBatches(tiny_tokenizer, [right_ids(tiny_tokenizer, text) for text in texts], **form))
    for source in (texts, tmp_path / "a.jsonl", tmp_path / "a.parquet", rows, rows.to_iterable_dataset()):
        made = sh.TokenBatches(tiny_tokenizer, source, **form)
        got = list(made)
        assert printed(got) == printed(wanted)
        for number in (3, len(got) // 2, len(got) - 1):
            assert printed(made.from_batch(number, made.position_of(number))) == printed(wanted[number:])


def printed(batches):
    """Batches by value."""
    plain = [batch if isinstance(batch, dict) else {"input_ids": batch} for batch in batches]
    return [{name: value.tolist() for name, value in batch.items()} for batch in plain]


def test_a_parquet_file_of_one_row_group_is_not_held(tmp_path):
    """pyarrow's default is a million rows to a group: 20 MB of them are read in a few."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    draw = np.random.default_rng(0)
    texts = ["".join(map(chr, draw.integers(97, 123, 2000))) for _ in range(250)]
    parquet.write_table(pyarrow.table({"text": [one[i:] for one in texts for i in range(40)]}), tmp_path / "a.parquet")
    assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    before, held = pyarrow.total_allocated_bytes(), []
    for number, piece in enumerate(documents.source_of(tmp_path / "a.parquet").pieces([])):
        assert piece.content == texts[number // 40][number % 40 :]
        held.append(pyarrow.total_allocated_bytes() - before)
    assert len(held) == 10_000
    assert max(held) < 7 * 2**20


def test_documents_may_be_kept_apart(tiny_tokenizer):
    """Padded, a sequence holds one document or a part of it, and its mask says how much."""
    texts = [words(3), words(12, 1), words(1, 2), words(5, 3)]
    made = sh.TokenBatches(tiny_tokenizer, texts, context=6, batch_size=2, documents="pad")
    rows = [row[keep.bool()].tolist() for batch in made for row, keep in zip(*batch.values(), strict=True)]
    ids = [right_ids(tiny_tokenizer, text) for text in texts]
    assert rows == [[0, *part] for one in ids for part in (one[:5], one[5:10], one[10:]) if part]
    assert all((batch["input_ids"][batch["attention_mask"] == 0] == 2).all() for batch in made)


def test_where_bos_stands(tiny_tokenizer):
    """Before every sequence, before every document, or nowhere."""
    texts = [words(3), words(4, 1), words(6, 2)]
    ids = [right_ids(tiny_tokenizer, text) for text in texts]
    by_document = torch.cat(list(sh.TokenBatches(tiny_tokenizer, texts, context=4, bos="document")))
    assert by_document.reshape(-1).tolist() == [one for text in ids for one in (0, *text)]
    nowhere = torch.cat(list(sh.TokenBatches(tiny_tokenizer, texts, context=4, bos=None)))
    assert nowhere.reshape(-1).tolist() == [one for text in ids for one in text][:12]
    padded = sh.TokenBatches(tiny_tokenizer, texts, context=5, bos="document", documents="pad")
    assert [int(row.sum()) for batch in padded for row in batch["attention_mask"]] == [4, 5, 5, 2]


def test_a_limit_ends_a_large_source_early(tiny_tokenizer, large):
    """About so many tokens are given, and no more is read than they need."""
    read = []

    class Watched(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    rows = Watched([{"text": words(20, i)} for i in range(500)])
    assert sum(len(batch) for batch in sh.TokenBatches(tiny_tokenizer, rows, context=11, limit=330)) == 30
    assert max(read) < 60


def test_a_training_resumes_in_a_large_source(tiny_tokenizer, tiny_bridge, tmp_path, large):
    """Interrupted in a stream and resumed, it ends bit for bit as one that was not, and reads the beginning no more."""

    class PowerCutError(Exception):
        pass

    (tmp_path / "a.txt").write_text(words(3000))
    settings = {"batch_size": 32, "buffer_rows": 128, "steps": 60, "progress": False, "checkpoint_every": 1}

    def fit(sae, out=None, stop=None, resume=False):
        torch.manual_seed(0)
        batches = sh.TokenBatches(tiny_tokenizer, tmp_path / "a.txt", context=13, batch_size=4)
        with pytest.raises(TypeError, match="no length"):
            len(batches)
        if stop is not None:
            whole = batches.from_batch

            def cut(number, position=None):
                for count, batch in enumerate(whole(number, position)):
                    if count == stop:
                        raise PowerCutError
                    yield batch

            batches.from_batch = cut
        return sh.fit(tiny_bridge, sae, batches, SITE, out=out, resume=resume, **settings)

    def fresh(seed):
        torch.manual_seed(seed)
        return sh.SAE(32, 64)

    one, two, three = fresh(0), fresh(0), fresh(1)
    fit(one)
    with pytest.raises(PowerCutError):
        fit(two, tmp_path / "out", stop=17)
    pieces = documents.TextFiles.pieces
    entered = []

    def watched(self, place):
        entered.append(list(place))
        return pieces(self, place)

    documents.TextFiles.pieces, restore = watched, pieces
    try:
        trainer = fit(three, tmp_path / "out", resume=True)
    finally:
        documents.TextFiles.pieces = restore
    assert entered[0][1] > 1000
    assert trainer.steps == 60
    assert all(torch.equal(value, three.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_resumed_training_refuses_another_source(tiny_tokenizer, tiny_bridge, tmp_path):
    """Another context, file or tokenizer makes other batches."""
    settings = {"batch_size": 32, "buffer_rows": 128, "progress": False}
    first = sh.TokenBatches(tiny_tokenizer, words(500), context=13, batch_size=4)
    sh.fit(tiny_bridge, sh.SAE(32, 64), first, SITE, out=tmp_path, steps=4, **settings)
    for other in (
        sh.TokenBatches(tiny_tokenizer, words(500), context=14, batch_size=4),
        sh.TokenBatches(tiny_tokenizer, words(501), context=13, batch_size=4),
        sh.TokenBatches(tiny_tokenizer, words(500, 1), context=13, batch_size=4),
    ):
        with pytest.raises(ConfigError, match="not the same"):
            sh.fit(tiny_bridge, sh.SAE(32, 64), other, SITE, out=tmp_path, steps=8, resume=True, **settings)


def splits():
    datasets = pytest.importorskip("datasets")
    return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["w1"]}))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda at: at / "nothing.txt", "no such text file"),
        (lambda at: ["nothing.jsonl"], "no such text file"),
        (lambda at: at, "is a folder"),
        (lambda at: [{"body": "w1"}], "it has body: write column="),
        (lambda at: [{"text": 3}], "a text or a list of tokens is expected, got int"),
        (lambda at: (row for row in ["w1"]), "read again"),
        (lambda at: 3, "no texts or tokens can be read from int"),
        (lambda at: splits(), r"several datasets, 'train': give one, dataset\['train'\]"),
        (lambda at: np.zeros((3, 4)), "tokens are integers"),
        (lambda at: at / "latin.txt", "is not UTF-8"),
        (lambda at: at / "broken.jsonl", "at byte 14: not a line of JSON"),
        (lambda at: at / "broken.parquet", "cannot be read as Parquet"),
        (lambda at: [at / "latin.txt", at / "broken.jsonl"], "different kinds together"),
    ],
)
def test_what_cannot_be_read_is_said(tiny_tokenizer, tmp_path, make, said):
    """The error names the file and the row, and what to write."""
    (tmp_path / "latin.txt").write_bytes("gr\xfc\xdfe und so weiter".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "w"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ConfigError, match=said):
        list(sh.TokenBatches(tiny_tokenizer, make(tmp_path), context=4))


def test_tokens_that_the_model_does_not_know_are_said(tiny_bridge):
    """Tokens of another model's tokenizer are an error that says so."""
    with pytest.raises(ConfigError, match=r"the largest token is 5000.*another model's tokenizer"):
        list(sh.harvest(tiny_bridge, [torch.tensor([[0, 5000]])], SITE))


MEMORY = """
import sys, torch, saehooks as sh, tokenizers, transformers
words = {word: i for i, word in enumerate(["<s>", *(f"w{i}" for i in range(50))])}
inside = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
inside.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inside, bos_token="<s>", unk_token="w0")
from pathlib import Path
def peak():  # not ru_maxrss, which begins at the peak of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
batches = sh.TokenBatches(tokenizer, Path(sys.argv[1]), context=128, batch_size=16)
stream = iter(batches)
for _ in range(50): next(stream)
before, count = peak(), 50
for _ in stream: count += 1
print(count, peak() - before, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's figures")
def test_a_large_file_takes_little_memory(tmp_path):
    """40 MB of text are read in a few MB: memory does not grow with the file."""
    line = words(2000) + "\n"
    with (tmp_path / "a.txt").open("w") as file:
        file.writelines(line for _ in range(40_000_000 // len(line)))
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "a.txt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, grown, whole = map(int, done.stdout.split())
    assert count > 4000
    assert grown < 60
    assert whole < 2048
