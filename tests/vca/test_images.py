"""Images are read as a well-kept viewer shows them: colours in sRGB, deep samples, transparency, orientation."""

import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

import vca
from tests.helpers.vits import make_vca_vit
from vca import drawing, images
from vca.images import UnreadableImage, upright_rgb

ROWS, COLS = np.mgrid[0:60, 0:90]
COLORS = np.stack([40 + 2 * COLS, 60 + 2 * ROWS, 200 - COLS - ROWS], -1).clip(0, 255).astype(np.uint8)
RAMP = np.tile(np.linspace(0, 1, 90), (60, 1))
GREY = np.repeat((RAMP * 255).round().astype(np.uint8)[..., None], 3, -1)


def opened(image: Image.Image, format: str, **options) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return Image.open(stream)


def tiff(samples: np.ndarray, **options) -> Image.Image:
    stream = io.BytesIO()
    tifffile.imwrite(stream, samples, **options)
    stream.seek(0)
    return Image.open(stream)


def assert_shows(file: Image.Image, truth: np.ndarray, tolerance: float = 1.0, **options) -> None:
    image = upright_rgb(file, **options)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, float) - truth.astype(float)).mean() < tolerance


# ---- Colours


def profile(gamma: float, order: tuple[int, int, int] = (0, 1, 2)) -> bytes:
    """A matrix profile with sRGB's primaries in another order and a power curve."""
    content = bytearray(ImageCms.ImageCmsProfile(images.SRGB).tobytes())
    count = int.from_bytes(content[128:132], "big")
    tags = {bytes(content[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    entries = [bytes(content[tags[name] + 4 : tags[name] + 12]) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    for name, place in zip((b"rXYZ", b"gXYZ", b"bXYZ"), order, strict=True):
        content[tags[name] + 4 : tags[name] + 12] = entries[place]
    if gamma:
        start = int.from_bytes(content[tags[b"rTRC"] + 4 : tags[b"rTRC"] + 8], "big")
        content[start : start + 14] = b"curv\0\0\0\0\0\0\0\1" + round(gamma * 256).to_bytes(2, "big")
        for name in (b"rTRC", b"gTRC", b"bTRC"):
            content[tags[name] + 4 : tags[name] + 12] = start.to_bytes(4, "big") + (14).to_bytes(4, "big")
    return bytes(content)


def srgb_of(light: np.ndarray) -> np.ndarray:
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


SWAPPED = profile(0, (2, 0, 1))  # the first channel is blue, the second red, the third green


@pytest.mark.parametrize("format, options", [("PNG", {}), ("JPEG", dict(quality=95)), ("TIFF", {}), ("WEBP", {})])
def test_a_profile_is_converted(format, options):
    file = opened(Image.fromarray(COLORS), format, icc_profile=SWAPPED, **options)
    assert_shows(file, COLORS[..., [1, 2, 0]], 5.0)


def test_linear_light_is_converted():
    file = opened(Image.fromarray(COLORS), "PNG", icc_profile=profile(1.0))
    assert_shows(file, srgb_of(COLORS / 255))


def test_transparency_and_palette_keep_their_profile():
    image = Image.fromarray(COLORS).convert("RGBA")
    image.putalpha(Image.fromarray(np.where(COLS < 45, 255, 0).astype(np.uint8)))
    truth = COLORS[..., [1, 2, 0]].copy()
    truth[:, 45:] = 255
    assert_shows(opened(image, "PNG", icc_profile=SWAPPED), truth)
    few = Image.fromarray(COLORS).quantize(256)
    shown = np.asarray(few.convert("RGB"))[..., [1, 2, 0]]
    assert_shows(opened(few, "PNG", icc_profile=SWAPPED), shown)


@pytest.mark.parametrize("damaged", [b"no profile", SWAPPED[:200], SWAPPED[:-100] + bytes(100), b"\0" * 5_000_000])
def test_a_damaged_profile_is_no_reason_to_refuse(damaged):
    image = Image.fromarray(COLORS)
    image.format, image.info = "PNG", dict(icc_profile=damaged)
    assert upright_rgb(image).size == image.size


def test_the_gamma_of_a_png():
    image = Image.fromarray(GREY)
    image.info = dict(gamma=1.0)
    assert_shows(image, srgb_of(GREY / 255))
    for plain in (dict(gamma=0.45455), dict(gamma=1.0, srgb=0), dict(gamma=0)):
        image.info = plain
        assert_shows(image, GREY, 0.01)


def test_cmyk_and_lab():
    image = Image.fromarray(COLORS)
    assert_shows(opened(image.convert("CMYK"), "TIFF"), COLORS)
    lab = ImageCms.profileToProfile(image, images.SRGB, ImageCms.createProfile("LAB"), outputMode="LAB")
    assert_shows(opened(lab, "TIFF"), COLORS, 2.0)


# ---- Samples

DEEP = {
    "uint8": (RAMP * 255).astype(np.uint8),
    "int8": (RAMP * 255 - 128).round().astype(np.int8),
    "uint16": (RAMP * 65535).astype(np.uint16),
    "int16": (RAMP * 65535 - 32768).round().astype(np.int16),
    "uint32": (RAMP * (2**32 - 1)).astype(np.uint32),
    "int32": (RAMP * (2**32 - 1) - 2**31).astype(np.int32),
    "float32": (7 * RAMP - 3).astype(np.float32),
    "float64": 7e9 * RAMP,
}


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", DEEP)
def test_greys_of_a_tiff(kind, order, photometric, tmp_path):
    samples = DEEP[kind].astype(DEEP[kind].dtype.newbyteorder(order))
    tifffile.imwrite(tmp_path / "grey.tif", samples, photometric=photometric, byteorder=order)
    try:
        file = Image.open(tmp_path / "grey.tif")
    except Exception:  # Pillow does not open it
        file = images.read_tiff(tmp_path / "grey.tif", 10**6)
    assert_shows(file, GREY if photometric == "minisblack" else 255 - GREY)


@pytest.mark.parametrize(
    "kind, photometric",
    [(kind, "minisblack") for kind in ("uint8", "int8", "uint16", "uint32", "int32", "float32")]
    + [(kind, "miniswhite") for kind in ("uint8", "uint16", "float32")],  # Pillow does not open the others
)
def test_compressed_greys_of_a_tiff(kind, photometric):
    file = tiff(DEEP[kind], photometric=photometric, compression="zlib")
    assert_shows(file, GREY if photometric == "minisblack" else 255 - GREY)


def test_what_is_not_a_number_is_black():
    samples = RAMP.astype(np.float32)
    samples[:, 60:] = np.nan
    assert_shows(tiff(samples), np.where(np.arange(90)[None, :, None] < 60, GREY / GREY[0, 59, 0] * 255, 0), 1.5)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("samples", [COLORS.astype(np.uint16) * 257, COLORS, (COLORS / np.float32(255))], ids=str)
def test_colours_of_a_tiff(samples, planar, tmp_path):
    stored = np.moveaxis(samples, -1, 0) if planar == "separate" else samples
    tifffile.imwrite(tmp_path / "colors.tif", stored, photometric="rgb", planarconfig=planar)
    try:
        file = Image.open(tmp_path / "colors.tif")
    except Exception:
        file = images.read_tiff(tmp_path / "colors.tif", 10**6)
    assert_shows(file, COLORS)


def test_a_tiff_that_would_be_read_wrongly_is_refused():
    stored = np.moveaxis(COLORS.astype(np.uint16) * 257, -1, 0)
    with pytest.raises(UnreadableImage):
        upright_rgb(tiff(stored, photometric="rgb", planarconfig="separate", compression="zlib"))


def test_the_first_of_several_pages():
    pages = np.stack([COLORS, 255 - COLORS])
    assert_shows(tiff(pages, photometric="rgb"), COLORS, 0.01)


# ---- Size


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "F", "I;16"])
def test_reducing_in_bands_is_reducing(mode, monkeypatch):
    image = Image.fromarray(GREY[..., 0]) if mode == "I;16" else Image.fromarray(GREY).convert(mode)
    image = Image.fromarray((RAMP * 65535).astype(np.uint16)) if mode == "I;16" else image
    whole = upright_rgb(image, 7)
    assert whole.size == (13, 9)
    monkeypatch.setattr(images, "BAND_PIXELS", 100)
    assert np.abs(np.asarray(upright_rgb(image, 7), float) - np.asarray(whole)).max() <= 1
    assert upright_rgb(image).tobytes() == upright_rgb(image).tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = opened(Image.fromarray(COLORS), "PNG", exif=exif)
    turned = np.asarray(upright_rgb(file))
    assert turned.shape == ((60, 90, 3) if orientation < 5 else (90, 60, 3))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert (turned[corner[orientation]] == COLORS[0, 0]).all()


def test_what_somebody_opened_is_preprocessed_and_drawn_upright(tmp_path):
    model = make_vca_vit()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    upright = Image.fromarray(np.rot90(pixels, -1).copy())
    with Image.open(tmp_path / "turned.png") as opened:
        assert torch.equal(vca.preprocess(model, opened), vca.preprocess(model, upright))
        assert drawing.backdrop(opened, (4, 4)).tobytes() == drawing.backdrop(upright, (4, 4)).tobytes()
    clear = image.convert("RGBA")
    clear.putalpha(0)
    white = vca.preprocess(model, Image.new("RGB", image.size, "white"))
    assert torch.equal(vca.preprocess(model, clear), white)
    assert vca.preprocess(model, image.convert("L")).shape == (1, 3, 16, 16)
