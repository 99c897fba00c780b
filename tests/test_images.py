"""Pictures in: every kind of file, array and dataset comes out as it looks, and what cannot be read is named."""

import numpy as np
import pytest
import torch
from PIL import Image

import saehooks as sh
from saehooks.errors import ConfigError


def seen(picture):
    """(3, height, width) in 0 .. 1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255


def ramp():
    """(24, 32) uint8, dark at the left, bright at the right."""
    return (np.arange(32)[None].repeat(24, 0) * 8).astype(np.uint8)


COLOUR = np.stack([ramp(), ramp()[::-1], ramp()[:, ::-1]], -1)
RIGHT = torch.from_numpy(COLOUR.copy()).permute(2, 0, 1) / 255
GREY = torch.from_numpy(ramp()).expand(3, -1, -1) / 255


def only(source, **options):
    batch = torch.cat(list(sh.ImageBatches(seen, source, **options)))
    return batch[0]


@pytest.mark.parametrize("bits", ["I;16", "I"])
def test_sixteen_bits_keep_their_brightness(tmp_path, bits):
    """A 16-bit picture is as bright as it looks in a viewer, not clipped to white."""
    deep = ramp().astype(np.uint16) * 257
    picture = Image.fromarray(deep if bits == "I;16" else deep.astype(np.int32))
    picture.save(tmp_path / "a.png" if bits == "I;16" else tmp_path / "a.tif")
    assert (only(tmp_path) - GREY).abs().max() < 0.01


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_camera_says(tmp_path, orientation):
    """All eight orientations come out upright."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose
    turned = Image.fromarray(COLOUR)
    if orientation > 1:
        turned = turned.transpose(undo[orientation])
    exif = turned.getexif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(only(tmp_path), RIGHT)


@pytest.mark.parametrize("ending", ["bmp", "tif", "webp", "gif", "ppm", "png", "TIFF"])
def test_files_of_every_ending_are_found(tmp_path, ending):
    """A folder's pictures are read whatever their format, below it too."""
    (tmp_path / "below").mkdir()
    options = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(ramp()).convert("RGB").save(tmp_path / "below" / f"a.{ending}", **options)
    (tmp_path / ".hidden.png").write_bytes(b"no picture")
    assert (only(tmp_path) - GREY).abs().max() < 0.02


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "1", "L"])
def test_other_colour_modes_look_the_same(tmp_path, mode):
    """Palette, alpha, CMYK and two-colour pictures are shown in their colours."""
    picture = Image.fromarray((ramp() > 127).astype(np.uint8) * 255).convert(mode)
    picture.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    right = torch.from_numpy((ramp() > 127).astype(np.float32)).expand(3, -1, -1)
    assert (only(tmp_path) - right).abs().max() < 0.02


def test_what_is_transparent_is_white(tmp_path):
    """Transparent pixels do not show the colour hidden under them."""
    hidden = np.zeros((24, 32, 4), np.uint8)
    Image.fromarray(hidden).save(tmp_path / "a.png")
    assert (only(tmp_path) == 1).all()


@pytest.mark.parametrize(
    "given",
    [
        COLOUR[None],
        COLOUR.transpose(2, 0, 1)[None].copy(),
        (COLOUR[None] / 255).astype(np.float32),
        (COLOUR.transpose(2, 0, 1)[None] / 255).astype(np.float64),
        COLOUR[None].astype(np.uint16) * 257,
        torch.from_numpy(COLOUR[None].copy()),
    ],
    ids=["uint8", "channels first", "float", "float channels first", "uint16", "tensor"],
)
def test_arrays_of_the_usual_layouts(given, tmp_path):
    """Layout and dtype of an array are told apart; from a file too."""
    assert (only(given) - RIGHT).abs().max() < 0.005
    np.savez(tmp_path / "a.npz", images=np.asarray(given))
    np.save(tmp_path / "a.npy", np.asarray(given))
    assert (only(tmp_path / "a.npz") - RIGHT).abs().max() < 0.005
    assert (only(tmp_path / "a.npy") - RIGHT).abs().max() < 0.005


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.random.default_rng(0).normal(size=(2, 8, 8, 3)), "float64 from -"),
        (np.full((2, 8, 8, 3), 255.0), "from 255 to 255"),
        (np.zeros((2, 8, 8, 3), np.int64), "int64"),
        (np.zeros((2, 3, 8, 3), np.uint8), "which axis"),
        (np.zeros((8, 8, 3), np.uint8), "shape"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), "shape"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(given, said):
    """Nothing is guessed of an array that could be something else."""
    with pytest.raises(ConfigError, match=said):
        sh.ImageBatches(seen, given)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named(tmp_path, workers):
    """A truncated file among good ones is an error with its name, with worker processes too."""
    for name in ("1.png", "2.png", "3.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:300])
    with pytest.raises(ConfigError, match=r"2\.png cannot be read"):
        list(sh.ImageBatches(seen, tmp_path, workers=workers))


def test_workers_and_later_starts_give_the_same_batches(tmp_path):
    """Batches do not depend on who reads them, nor on where the reading starts."""
    given = np.random.default_rng(0).integers(0, 255, (11, 8, 8, 3), dtype=np.uint8)
    one, two = (sh.ImageBatches(seen, given, batch_size=4, limit=10, workers=n) for n in (0, 2))
    assert [len(batch) for batch in one] == [4, 4, 2]
    assert len(one) == 3
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(list(one)[1:], two.from_batch(1), strict=True))
    assert torch.equal(torch.cat(list(one)), torch.from_numpy(given[:10]).permute(0, 3, 1, 2) / 255)


def test_items_of_datasets_are_taken_apart():
    """Pairs with labels, dicts with an image, and lists of PIL images are read."""
    picture = Image.fromarray(COLOUR)
    for source in ([(picture, 3)], [{"image": picture, "label": 3}], [picture], [COLOUR]):
        assert torch.equal(only(source), RIGHT)
    with pytest.raises(ConfigError, match="expected 'image'"):
        only([{"photo": picture}])


def test_a_place_without_pictures_is_an_error(tmp_path):
    """An empty folder, a missing one, another file."""
    with pytest.raises(ConfigError, match="no pictures in"):
        sh.ImageBatches(seen, tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        sh.ImageBatches(seen, tmp_path / "nowhere")
    np.savez(tmp_path / "a.npz", other=COLOUR[None])
    with pytest.raises(ConfigError, match="holds other"):
        sh.ImageBatches(seen, tmp_path / "a.npz")
