"""Activations on disk: what is written, what is read back, what survives, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saehooks as sh
from saehooks.errors import ConfigError, FormatError, NotFiniteError, SiteError, StorageError, WidthError

SITE = "blocks.1.hook_resid_post"
FAST = {"batch_size": 32, "buffer_rows": 512, "warmup_steps": 2, "progress": False}
SMALL = 20_000
"""Bytes of a shard: two or three batches."""


class PowerCutError(Exception):
    pass


def texts(n=20, rows=4):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (rows, 13), generator=draw) for _ in range(n)]


def cut(batches, stop):
    yield from batches[:stop]
    raise PowerCutError


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.name != ".lock"}


def fresh(seed=0, **settings):
    torch.manual_seed(seed)
    return sh.SAE(32, 96, **settings)


def same_weights(one, two):
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_back_is_what_the_model_made(tiny_bridge, tmp_path, dtype):
    """In order, the rows of a folder are those harvested live, rounded to the dtype asked for; plain safetensors."""
    right = torch.cat(list(sh.harvest(tiny_bridge, texts(), SITE)))
    acts = sh.harvest(tiny_bridge, texts(), SITE, to=tmp_path, dtype=dtype, shard_bytes=SMALL)
    got = torch.cat(list(sh.Activations(tmp_path, shuffle=False)))
    assert got.dtype == acts.dtype == (dtype or torch.float32)
    assert torch.equal(got, right.to(got.dtype))
    assert (acts.rows, acts.d_in) == right.shape
    assert acts.described["hook_name"] == SITE
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert torch.equal(torch.cat([load_file(file)["rows"] for file in files]), got)


def test_shuffled_rows_are_the_same_rows_in_another_order_every_seed(tiny_bridge, tmp_path):
    """Every row comes once; neighbours in a part come from far apart; any part can be entered directly."""
    sh.harvest(tiny_bridge, texts(20, 12), SITE, to=tmp_path, shard_bytes=SMALL)
    ordered = torch.cat(list(sh.Activations(tmp_path, shuffle=False)))
    one, two = (list(sh.Activations(tmp_path, seed=seed)) for seed in (0, 1))
    assert len(ordered) == 20 * 12 * 12

    def sorted_rows(rows):
        return sorted(map(tuple, rows.tolist()))

    for parts in (one, two):
        assert sorted_rows(torch.cat(parts)) == sorted_rows(ordered)
        assert len(parts) == len(sh.Activations(tmp_path)) > 1
    assert not torch.equal(one[0], two[0])
    place = {tuple(row.tolist()): i for i, row in enumerate(ordered[:, :4])}
    places = torch.tensor([place[tuple(row.tolist())] for row in one[0][:, :4]])
    assert places.max() - places.min() > 0.5 * len(ordered)
    assert all(torch.equal(a, b) for a, b in zip(one[1:], sh.Activations(tmp_path).from_batch(1), strict=True))


def test_training_from_disk_is_training_live(tiny_bridge, tmp_path):
    """The same rows in the same order make the same SAE, bit for bit, and it knows whose it is."""
    live, disk = fresh(), fresh()
    sh.fit(tiny_bridge, live, texts(), SITE, decay=0.0, **FAST)
    sh.harvest(tiny_bridge, texts(), SITE, to=tmp_path, shard_bytes=SMALL)
    trainer = sh.fit(sh.Activations(tmp_path, shuffle=False), disk, decay=0.0, **FAST)
    assert same_weights(live, disk)
    assert trainer.rows_seen == 20 * 4 * 12
    for name in ("hook_name", "head", "family", "model_name", "processing"):
        assert disk.cfg.metadata[name] == live.cfg.metadata[name]
    assert disk.cfg.metadata["training"]["positions"] != "all"


def test_a_training_from_disk_resumes_bit_for_bit(tiny_bridge, tmp_path):
    """Interrupted and resumed in the middle of the shards it ends with the weights of one that was not."""
    sh.harvest(tiny_bridge, texts(20, 12), SITE, to=tmp_path / "acts", shard_bytes=SMALL)
    whole, parts, again = fresh(), fresh(), fresh(5)
    sh.fit(sh.Activations(tmp_path / "acts"), whole, **FAST)

    class Cut(sh.Activations):
        def from_batch(self, number):
            for count, rows in enumerate(super().from_batch(number)):
                if count == 1:
                    raise PowerCutError
                yield rows

    out = {"out": tmp_path / "sae", "checkpoint_every": 1}
    with pytest.raises(PowerCutError):
        sh.fit(Cut(tmp_path / "acts"), parts, **out, **FAST)
    trainer = sh.fit(sh.Activations(tmp_path / "acts"), again, resume=True, **out, **FAST)
    assert same_weights(again, whole)
    assert trainer.rows_seen == 20 * 12 * 12
    for other in (sh.Activations(tmp_path / "acts", seed=3), sh.Activations(tmp_path / "acts", shuffle=False)):
        with pytest.raises(ConfigError, match="not the same"):
            sh.fit(other, fresh(), resume=True, **out, **FAST)


@pytest.mark.parametrize("stop", [1, 7, 8, 19])
def test_an_interrupted_harvest_goes_on(tiny_bridge, tmp_path, stop):
    """The same call again leaves the files of one that was not interrupted, and runs only what was not written."""
    sh.harvest(tiny_bridge, texts(), SITE, to=tmp_path / "whole", shard_bytes=SMALL)
    with pytest.raises(PowerCutError):
        sh.harvest(tiny_bridge, cut(texts(), stop), SITE, to=tmp_path / "cut", shard_bytes=SMALL)
    forwards = []
    handle = tiny_bridge.hook_dict["blocks.0.hook_out"].register_forward_hook(lambda *_: forwards.append(1))
    sh.harvest(tiny_bridge, texts(), SITE, to=tmp_path / "cut", shard_bytes=SMALL)
    assert len(forwards) <= 20 - stop + 4
    sh.harvest(tiny_bridge, texts(), SITE, to=tmp_path / "cut", shard_bytes=SMALL)
    handle.remove()
    assert len(forwards) <= 20 - stop + 4
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_harvest_may_be_added_to_but_not_mixed(tiny_bridge, tmp_path):
    """More batches go on from those that are there; others, or another site, are refused and change nothing."""
    sh.harvest(tiny_bridge, texts(8), SITE, to=tmp_path, shard_bytes=SMALL)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="not the same"):
        sh.harvest(tiny_bridge, texts()[::-1], SITE, to=tmp_path)
    with pytest.raises(ConfigError, match=r"another kind .*hook_name"):
        sh.harvest(tiny_bridge, texts(), "blocks.0.hook_resid_post", to=tmp_path)
    with pytest.raises(ConfigError, match="dtype: 'float32' there, 'float16' now"):
        sh.harvest(tiny_bridge, texts(), SITE, to=tmp_path, dtype=torch.float16)
    assert contents(tmp_path) == before
    assert sh.harvest(tiny_bridge, texts(12), SITE, to=tmp_path, shard_bytes=SMALL).rows == 12 * 4 * 12


def test_rows_of_extreme_norm_may_be_left_out(tiny_bridge, tmp_path):
    """``max_norm`` is a multiple of the median norm of the first batch."""
    rows = list(sh.harvest(tiny_bridge, texts(), SITE))
    norms, median = torch.cat(rows).norm(dim=1), rows[0].norm(dim=1).median()
    acts = sh.harvest(tiny_bridge, texts(), SITE, to=tmp_path, max_norm=1.1)
    assert 0 < acts.rows < len(norms)
    assert acts.rows == int((norms <= 1.1 * median).sum())


def altered(path, at=-5):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_broken_folder_is_refused_by_name(tiny_bridge, tmp_path):
    """Cut short, altered, missing, without a description, or half harvested: each is said."""
    sh.harvest(tiny_bridge, texts(), SITE, to=tmp_path, shard_bytes=SMALL)
    shard = tmp_path / "shard-000001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(FormatError, match=r"shard-000001\.safetensors has .* cut short"):
        sh.Activations(tmp_path)
    shard.write_bytes(whole)
    altered(shard)
    sae = fresh()
    with pytest.raises(FormatError, match=r"shard-000001\.safetensors: rows .* were altered"):
        sh.fit(sh.Activations(tmp_path), sae, **FAST)
    shard.unlink()
    with pytest.raises(FormatError, match="is missing"):
        sh.Activations(tmp_path)
    shard.write_bytes(whole)
    lines = (tmp_path / "shards.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "shards.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    with pytest.warns(UserWarning, match="interrupted"):
        assert sh.Activations(tmp_path).rows < 20 * 4 * 12
    outside = json.loads(lines[1]) | {"file": "../elsewhere.safetensors"}
    (tmp_path / "shards.jsonl").write_text(lines[0] + json.dumps(outside) + "\n")
    with pytest.raises(FormatError, match="is missing"):
        sh.Activations(tmp_path)
    (tmp_path / "index.json").unlink()
    for use in (lambda: sh.Activations(tmp_path), lambda: sh.harvest(tiny_bridge, texts(), SITE, to=tmp_path)):
        with pytest.raises(FormatError, match=r"index\.json"):
            use()


def test_activations_that_do_not_fit_the_sae_are_refused(tiny_bridge, tmp_path):
    """Another width, another site, fewer rows than a batch."""
    acts = sh.harvest(tiny_bridge, texts(1), SITE, to=tmp_path)
    with pytest.raises(WidthError, match="32 wide"):
        sh.fit(acts, sh.SAE(16, 32), **FAST)
    for sae, more in ((fresh(hook_name="blocks.0.hook_resid_post"), {}), (fresh(), {"at": "blocks.0.hook_resid_post"})):
        with pytest.raises((ConfigError, SiteError), match="the activations are of"):
            sh.fit(acts, sae, **FAST, **more)
    other = fresh()
    other.cfg.metadata["model_name"] = "pythia-70m"
    with pytest.raises(ConfigError, match="the SAE is of the model 'pythia-70m', the activations are of"):
        sh.fit(acts, other, **FAST)
    assert not other.finished
    with pytest.raises(ConfigError, match="48 activations do not fill a batch of 100"):
        sh.fit(acts, fresh(), **{**FAST, "batch_size": 100})
    with pytest.raises(ConfigError, match="leave out where="):
        sh.fit(acts, fresh(), where=sh.last, **FAST)


def test_bad_requests_for_a_harvest_write_nothing(tiny_bridge, tmp_path):
    """No batches, an impossible filter or dtype, options without a folder, a value that float16 cannot hold."""
    folder = tmp_path / "acts"
    for batches, options, error in (
        ([], {}, ConfigError),
        (texts(), {"max_norm": 0.0}, ConfigError),
        (texts(), {"dtype": torch.int8}, ConfigError),
        ("one text", {}, ConfigError),
    ):
        with pytest.raises(error):
            sh.harvest(tiny_bridge, batches, SITE, to=folder, **options)
        assert not folder.exists()
    with pytest.raises(ConfigError, match="to="):
        sh.harvest(tiny_bridge, texts(), SITE, dtype=torch.float16)
    handle = tiny_bridge.hook_dict["blocks.1.hook_out"].register_forward_hook(lambda m, i, out: out * 1e6)
    with pytest.raises(NotFiniteError, match="float16"):
        sh.harvest(tiny_bridge, texts(), SITE, to=folder, dtype=torch.float16)
    handle.remove()


def test_a_full_disk_loses_only_the_shard_that_did_not_fit(tiny_bridge, tmp_path):
    """The error says what is kept, and the same call goes on when there is room again."""
    resource = pytest.importorskip("resource")
    sh.harvest(tiny_bridge, texts(), SITE, to=tmp_path / "whole", shard_bytes=SMALL)
    grown = [*texts(4), texts(1, rows=40)[0], *texts(4)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"could not be written .* rows before it are kept"):
            sh.harvest(tiny_bridge, grown, SITE, to=tmp_path / "cut", shard_bytes=SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cut").glob(".shard*"))
    sh.harvest(tiny_bridge, grown, SITE, to=tmp_path / "cut", shard_bytes=SMALL)
    got = torch.cat(list(sh.Activations(tmp_path / "cut", shuffle=False)))
    assert torch.equal(got, torch.cat(list(sh.harvest(tiny_bridge, grown, SITE))))


def test_two_writers_do_not_share_a_folder(tiny_bridge, tmp_path):
    """While one harvest writes, another into the same folder is refused; readers are not."""
    pytest.importorskip("fcntl")
    refused = []

    def batches():
        yield from texts(8)
        with pytest.raises(StorageError, match="another process"):
            sh.harvest(tiny_bridge, texts(), SITE, to=tmp_path, shard_bytes=SMALL)
        refused.append(True)
        with pytest.warns(UserWarning, match="interrupted"):
            assert sh.Activations(tmp_path).rows > 0
        yield from texts()[8:]

    assert sh.harvest(tiny_bridge, batches(), SITE, to=tmp_path, shard_bytes=SMALL).rows == 20 * 4 * 12
    assert refused
