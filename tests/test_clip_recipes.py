"""The CLIP recipes on the packaged model, SAE and photos: they run, write what they say, and say what is wrong."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import saehooks as sh

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

pytest.importorskip("open_clip")
Image = pytest.importorskip("PIL.Image")

import clip_ablation  # noqa: E402
import clip_common  # noqa: E402
import clip_concepts  # noqa: E402
import clip_topn_classification as topn  # noqa: E402

from saehooks.demo import photos as packaged_photos  # noqa: E402
from saehooks.demo import small_clip  # noqa: E402
from saehooks.demo.data import ASSETS  # noqa: E402
from saehooks.errors import ConfigError  # noqa: E402

SAE_FOLDER = ASSETS / "sae-tinyclip-l4"


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def sae():
    return sh.load(SAE_FOLDER)


@pytest.fixture
def npz(tmp_path):
    """Writes an .npz of 6 train and 3 test photos of "cat", "dog" and "owl", with changes."""
    found = packaged_photos("train")

    def write(**changes):
        arrays = {
            "train_images": found.images[:6],
            "train_labels": np.array([0, 1, 2, 0, 1, 2]),
            "test_images": found.images[6:9],
            "test_labels": np.array([0, 1, 2]),
            "class_names": np.array(["cat", "dog", "owl"]),
        }
        path = tmp_path / "photos.npz"
        np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
        return str(path)

    return write


# ------------------------------------------------------------------------ photos


def test_npz(npz, clip):
    """An .npz gives photos, labels and names, preprocessed when asked for."""
    found = clip_common.load_photos(npz(), "train", clip[1])
    assert len(found) == 6
    assert found.names == ["cat", "dog", "owl"]
    assert found.pixels([0, 5]).shape == (2, 3, 32, 32)
    assert np.abs(found.seen(0).astype(int) - packaged_photos("train").images[0]).max() <= 1


def test_pictures_look_as_they_are_however_the_model_was_opened():
    """What the pages show is the photo, not what its normalisation makes of it."""
    opened = clip_common.open_clip_model("tinyclip")
    found = clip_common.load_photos(None, "train", opened.preprocess)
    assert np.abs(found.seen(3).astype(int) - packaged_photos("train").images[3]).max() <= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_images": None}, "expected train_images and train_labels"),
        ({"train_images": np.zeros((6, 3, 32, 32), np.uint8)}, "expected uint8"),
        ({"train_images": np.zeros((6, 32, 32, 3), np.float32)}, "float32"),
        ({"train_images": np.zeros((0, 32, 32, 3), np.uint8)}, "0 images, 6 labels"),
        ({"train_labels": np.array([0, 1, 2, 0, 1, 9])}, "labels run from 0 to 9"),
    ],
)
def test_bad_npz(npz, clip, changes, said):
    """Arrays that are no labelled pictures are refused, saying what was found."""
    with pytest.raises(ConfigError, match=said):
        clip_common.load_photos(npz(**changes), "train", clip[1])


def test_folder(tmp_path, clip, capsys):
    """A folder of class folders is split by every fifth picture; any size and mode fits; broken files are named."""
    for name, sizes in {"big_dog": [(40, 50)] * 5, "cat": [(20, 20)] * 5, "owl": []}.items():
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            Image.new("L" if i else "RGB", size, 10 * i).save(tmp_path / name / f"{i}.png")
    (tmp_path / "cat" / "broken.png").write_bytes(b"no picture")
    train = clip_common.load_photos(str(tmp_path), "train", clip[1])
    said = capsys.readouterr().err
    assert train.names == ["big dog", "cat", "owl"]
    assert "broken.png" in said
    assert "no train pictures of owl" in said
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert train.pixels([0, 7]).shape == (2, 3, 32, 32)
    assert clip_common.load_photos(str(tmp_path), "test", clip[1]).labels.tolist() == [0, 1]


def test_no_pictures(tmp_path, clip):
    """An empty folder, and something that is neither folder nor .npz, are refused."""
    with pytest.raises(ConfigError, match="one folder per class"):
        clip_common.load_photos(str(tmp_path), "train", clip[1])
    with pytest.raises(ConfigError, match="neither a folder"):
        clip_common.load_photos("nowhere", "train", clip[1])


# ----------------------------------------------------------------------- training


def test_class_token_and():
    """Of each picture the class token and so many random patches are learned from."""
    codes = sh.Codes.from_dense(torch.zeros(4, 17, 2))
    mask = clip_common.class_token_and(5, seed=0)(None, codes)
    assert mask[:, 0].all()
    assert mask.sum(1).tolist() == [6] * 4
    assert not torch.equal(mask[0], mask[1])


def test_train_saes(clip):
    """Several SAEs learn on the same forwards, and remember where they belong."""
    saes = {"one": sh.SAE(128, 64, key_scale=2.0), "two": sh.SAE(128, 64, "linear", "topk", k=4)}
    before = saes["two"].dictionary.W_dec.detach().clone()
    photos = clip_common.load_photos(None, "train", clip[1]).first(48)
    clip_common.train_saes(clip[0], saes, photos, losses={}, copies=2, patches=20, passes=2)
    assert not torch.equal(before, saes["two"].dictionary.W_dec)
    for sae in saes.values():
        assert sae.hook_name == clip_common.SITE
        assert sae.cfg.metadata["training"]["steps"] >= 1
        assert "class token" in sae.cfg.metadata["training"]["positions"]


# --------------------------------------------------------------------- top-n recipe


def test_scores_by_hand(clip, sae):
    """A latent's frequency in a class is its firings over the positions of that class's photos."""
    photos = clip_common.load_photos(None, "train", clip[1]).first(12)
    scores = topn.score_latents(clip[0], {"a": sae}, photos)["a"]
    with torch.no_grad(), sh.read(clip[0], sae) as trace:
        clip[0].encode_image(photos.pixels(range(12)))
    label = int(photos.labels[0])
    own = trace.codes[photos.labels == label]
    expected = own.counts() / own.sizes.numel()
    torch.testing.assert_close(scores["frequency"][label], expected.double())
    assert scores["frequency"].shape == (10, sae.d_sae)


def test_top_leaves_out_silent_latents():
    """Fewer than n latents are kept where fewer ever fire."""
    assert topn.top(torch.tensor([0.1, 0.0, 0.5]), 3) == [2, 0]


def test_topn_recipe(tmp_path, monkeypatch):
    """The whole recipe on a few photos: a table, a CSV and a picture; run again, it measures nothing twice."""
    args = ["--saes", str(SAE_FOLDER), "--limit", "20", "--counts", "1", "5", "--rank", "frequency"]
    topn.main([*args, "--out", str(tmp_path)])
    with (tmp_path / "clip_topn.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["SAE"] == "sae-tinyclip-l4"
    assert float(row["photos"]) == 20
    assert all(0 <= float(row[name]) <= 100 for name in ("clean", "spliced", "on 1", "off 5", "drawn 5"))
    assert float(row["clean"]) > 30
    assert 0 < float(row["NMSE"]) < 0.5
    assert "| on 1 |" in (tmp_path / "clip_topn.md").read_text()
    assert (tmp_path / "clip_topn.png").stat().st_size > 1000
    monkeypatch.setattr(topn, "classify", None)
    topn.main([*args, "--out", str(tmp_path)])
    with (tmp_path / "clip_topn.csv").open() as file:
        (again,) = csv.DictReader(file)
    assert again["on 5"] == row["on 5"]


def test_topn_of_an_sae_refined_afterwards(clip, tmp_path):
    """An SAE that does not refine stands there twice: with the same latents a token, and a smaller error."""
    torch.manual_seed(0)
    plain = sh.SAE(128, 256, hook_name=clip_common.SITE, key_scale=2.0)
    photos = clip_common.load_photos(None, "train", clip[1]).first(20)
    plain.initialise(torch.cat(list(sh.harvest(clip[0], photos.batches(), clip_common.SITE))))
    plain.eval().save(tmp_path / "plain")
    saes = ["--saes", str(tmp_path / "plain"), str(SAE_FOLDER)]
    args = [*saes, "--limit", "20", "--counts", "1", "--rank", "frequency", "--afterwards", "2"]
    topn.main([*args, "--out", str(tmp_path)])
    with (tmp_path / "clip_topn.csv").open() as file:
        first, packaged, refined = csv.DictReader(file)
    assert (packaged["SAE"], refined["SAE"]) == ("sae-tinyclip-l4", "plain, refined afterwards")
    assert refined["L0"] == first["L0"]
    assert float(refined["NMSE"]) < 0.9 * float(first["NMSE"])


def test_topn_without_a_class(npz, tmp_path, sae):
    """A class without photos keeps its prompt and is left out of the rows."""
    data = npz(test_labels=np.array([0, 0, 1]), train_labels=np.array([0, 1, 0, 0, 1, 1]))
    topn.main(
        ["--data", data, "--saes", str(SAE_FOLDER), "--counts", "1", "--rank", "contrast", "--out", str(tmp_path)]
    )
    with (tmp_path / "clip_topn.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["photos"]) == 3


# -------------------------------------------------------------------- concepts recipe


def test_concepts_recipe(tmp_path):
    """One self-contained page: no script, nothing fetched, pictures inside."""
    out = tmp_path / "page.html"
    clip_concepts.main(["--limit", "20", "--random", "2", "--photos", "2", "--out", str(out)])
    page = out.read_text()
    assert page.count("data:image/png") >= 10
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "Most and least complex" in page


def test_concepts_of_asked_latents(tmp_path, capsys, sae):
    """A latent that never fires is said to, one out of range is an error."""
    args = ["--limit", "4", "--photos", "1", "--out", str(tmp_path / "page.html"), "--latents"]
    photos = clip_common.load_photos(None, "test", small_clip()[1]).first(4)
    survey = clip_concepts.look(small_clip()[0], sae, photos)
    silent = survey.silent[0]
    living = int(survey.share.sum(0).argmax())
    clip_concepts.main([*args, str(silent), str(living)])
    assert f"latent {silent} never fires" in capsys.readouterr().err
    assert f"Latent {living}<" in (tmp_path / "page.html").read_text()
    with pytest.raises(ConfigError, match="latents 0 to"):
        clip_concepts.main([*args, "99999"])


def test_drawing_by_hand():
    """A mask is one block of pixels per patch, dark where the latent is silent; maps run from dark to bright."""
    image = np.full((4, 4, 3), 100, np.uint8)
    lit = clip_concepts.lit(image, np.array([[0.0, 1.0], [0.0, 0.0]]))
    assert lit[0, 3].tolist() == [100] * 3
    assert lit[3, 0].tolist() == [15] * 3
    heat = clip_concepts.heat(np.array([[1, 5], [1, 1]]), (4, 4))
    assert heat[0, 2].tolist() == [255, 225, 70]
    assert heat[3, 3].tolist() == [25, 28, 80]


def test_patches_must_be_square():
    """Maps need a square grid of patches."""
    assert clip_concepts.grid_of(64) == (8, 8)
    with pytest.raises(ConfigError, match="no square"):
        clip_concepts.grid_of(60)


# -------------------------------------------------------------------- ablation recipe


def test_ablation_recipe(tmp_path):
    """A pair and a single photo: a page, a table, and the class's latents matter more than random ones."""
    out = tmp_path / "page.html"
    clip_ablation.main(["--pairs", "cat:dog", "--exact", "4", "--singles", "1", "--limit", "150", "--out", str(out)])
    text = out.with_suffix(".md").read_text()
    assert "cat → dog" in text
    assert "<script" not in out.read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "| cat" in line]
    assert [row[3] for row in rows] == ["1", "2", "5", "10", "20"]
    stay, stay_random = float(rows[2][4]), float(rows[2][6])
    assert stay < stay_random  # with five latents ablated


def test_ablation_of_unknown_class(tmp_path):
    """A class name that is not there is refused, with the names that are."""
    with pytest.raises(ConfigError, match="airplane, automobile"):
        clip_ablation.main(["--pairs", "ship:zeppelin", "--limit", "20", "--out", str(tmp_path / "page.html")])
