"""Every reader sees the pixels that a viewer shows, whatever the file's orientation, values and transparency."""

import errno
import io
import logging
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from dat.utils import images
from dat.utils.errors import DataError, ImageError, TooManyFilesError
from dat.utils.images import check_size, decode, has_contrast, read_image, to_image, upright_size

# Quarters of four colours, so that every orientation looks different.
UPRIGHT = np.zeros((16, 24, 3), np.uint8)
UPRIGHT[:8, :12], UPRIGHT[:8, 12:], UPRIGHT[8:, :12] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
# How an upright image is stored under each orientation, as EXIF defines them: rows and columns of the stored image.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.swapaxes(0, 1),
    6: UPRIGHT.swapaxes(0, 1)[::-1],
    7: UPRIGHT.swapaxes(0, 1)[::-1, ::-1],
    8: UPRIGHT.swapaxes(0, 1)[:, ::-1],
}


@pytest.fixture(autouse=True)
def short_strips(monkeypatch):
    """Images as small as those of the tests are converted in strips too."""
    monkeypatch.setattr(images, "STRIP_PIXELS", 100)


def encode(pixels, kind="PNG", **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def stored(orientation, kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    return encode(STORED[orientation], kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_is_followed_unless_only_the_stored_size_fits(orientation, kind):
    def near(image, pixels):
        return image.size == pixels.shape[1::-1] and np.abs(np.asarray(image).astype(int) - pixels).max() < 8

    file, sides = stored(orientation, kind), (24, 16)
    assert near(read_image(file), UPRIGHT)
    assert upright_size(file) == sides
    assert near(read_image(file, sides), UPRIGHT)
    found = decode(file, sides[::-1])
    turns = orientation >= 5
    assert (found.orientation, found.followed) == (orientation, not turns)
    assert near(found.image, STORED[orientation] if turns else UPRIGHT)
    # Neither size fits: the image is upright.
    assert near(read_image(file, (5, 5)), UPRIGHT)


def test_square_images_and_images_in_memory_follow_exif():
    square = UPRIGHT[:, 4:20]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = encode(square.swapaxes(0, 1)[::-1], exif=exif)
    np.testing.assert_array_equal(read_image(file, (16, 16)), square)
    with Image.open(file) as image:
        np.testing.assert_array_equal(to_image(image), square)


@pytest.mark.parametrize("exif", [b"Exif\0\0nothing", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01", b""])
def test_malformed_exif_does_not_cost_the_image(exif):
    np.testing.assert_array_equal(read_image(encode(UPRIGHT, exif=exif)), UPRIGHT)


RAMP = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
SHOWN = np.round(RAMP * 255)


@pytest.mark.parametrize("top", [1, 255, 1023, 4095, 16383, 65535])
def test_floats_are_scaled_by_their_range(top):
    found = read_image(encode(RAMP * np.float32(top), "TIFF"))
    assert found.mode == "RGB"
    np.testing.assert_allclose(np.asarray(found)[..., 1], SHOWN, atol=1)


def test_floats_that_overshoot_are_clipped():
    found = np.asarray(read_image(encode(RAMP * 1.1 - 0.05, "TIFF")))[..., 0]
    np.testing.assert_allclose(found, np.round((RAMP * 1.1 - 0.05).clip(0, 1) * 255), atol=1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("top", [255, 1023, 4095, 16383, 65535])
def test_integers_are_scaled_by_their_range(kind, top):
    found = read_image(encode((RAMP * top).astype(np.uint16), kind))
    np.testing.assert_allclose(np.asarray(found)[..., 1], SHOWN, atol=1)


def png_48(pixels):
    """A PNG of RGB or RGBA with 16 bits per channel, which Pillow does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = 2 if pixels.shape[2] == 3 else 6
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_48(pixels, order, orientation=1):
    """An uncompressed TIFF of RGB with 16 bits per channel, in byte order "<" or ">"."""
    height, width = pixels.shape[:2]
    content = pixels.astype(f"{order}u2").tobytes()
    tags = {
        256: width, 257: height, 258: 16, 259: 1, 262: 2, 273: 8, 274: orientation, 277: 3, 278: height,
        279: len(content),
    }  # fmt: skip
    # One number stands for the bits of all three channels, as in other writers' files.
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value) for tag, value in tags.items()
    )
    bits = 8 + len(content) + 2 + 12 * len(tags) + 4
    entries = entries.replace(struct.pack(f"{order}HHII", 258, 4, 1, 16), struct.pack(f"{order}HHII", 258, 3, 3, bits))
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(content))
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return start + content + directory + struct.pack(f"{order}3H", 16, 16, 16)


@pytest.mark.parametrize("top", [1023, 4095, 16383, 65535])
@pytest.mark.parametrize("kind", ["png", "opaque png", "<", ">"])
def test_rgb_of_16_bits_is_scaled_by_its_range(kind, top):
    shown = np.stack([SHOWN, SHOWN[::-1], SHOWN.T], -1)
    pixels = np.round(shown / 255 * top)
    if kind == "opaque png":
        pixels = np.dstack((pixels, np.full_like(pixels[..., 0], 65535)))
    content = tiff_48(pixels, kind) if kind in "<>" else png_48(pixels)
    np.testing.assert_allclose(np.asarray(read_image(io.BytesIO(content))).astype(int), shown, atol=1.01)


def test_rgb_of_16_bits_is_turned():
    content = tiff_48(STORED[6].astype(int) * 16, "<", orientation=6)
    np.testing.assert_allclose(np.asarray(read_image(io.BytesIO(content))).astype(int), UPRIGHT, atol=1)


@pytest.mark.parametrize("factor", [256, 257])
def test_dark_images_of_8_bits_stored_in_16_stay_dark(factor):
    dark = np.arange(16, dtype=np.uint16).reshape(4, 4)
    np.testing.assert_array_equal(np.asarray(read_image(encode(dark * factor)))[..., 0], dark)


def test_the_range_that_a_file_states_counts():
    dark = (RAMP * 1000).astype(np.uint16)
    found = read_image(encode(dark, "TIFF", tiffinfo={images.MAX_SAMPLE: 4095}))
    np.testing.assert_allclose(np.asarray(found)[..., 0], RAMP * 1000 / 4095 * 255, atol=1)
    # A PGM names its largest value; Pillow scales to it.
    pgm = b"P5 4 4 65535\n" + (RAMP * 1000).astype(">u2").tobytes()
    np.testing.assert_allclose(np.asarray(read_image(io.BytesIO(pgm)))[..., 0], RAMP * 1000 / 257, atol=1)


def test_0_is_white_where_the_file_says_so():
    found = read_image(encode((RAMP * 65535).astype(np.uint16), "TIFF", tiffinfo={images.PHOTOMETRIC: 0}))
    np.testing.assert_allclose(np.asarray(found)[..., 0], 255 - SHOWN, atol=1)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.where(RAMP > 0.5, np.nan, RAMP), "some of its pixels are NaN or infinite"),
        (np.where(RAMP > 0.5, np.inf, RAMP), "some of its pixels are NaN or infinite"),
        (RAMP * 2 - 1, "its pixels are -1 to 1, should be 0 to 65535 or, of floats, 0 to 1"),
        (RAMP * 1e6, r"its pixels are 0 to 1e\+06, should be"),
        ((RAMP * 4000 - 1024).astype(np.int32), "its pixels are -1024 to 2976, should be"),
    ],
)
def test_other_values_are_refused_by_one_line(tmp_path, pixels, message):
    path = tmp_path / "odd.tif"
    path.write_bytes(encode(pixels, "TIFF").getvalue())
    with pytest.raises(ImageError, match=rf"odd.tif: cannot be read as an image: {message}") as raised:
        read_image(path)
    assert "\n" not in str(raised.value)


def big_endian(pixels):
    """A big-endian TIFF of 16-bit grey pixels, which Pillow opens in mode I;16B."""
    return encode(Image.frombytes("I;16B", pixels.shape[::-1], pixels.astype(">u2").tobytes()), "TIFF")


def test_other_modes_stay_right():
    grey = np.full((4, 4), 200, np.uint8)
    wide = np.repeat((UPRIGHT.astype(">u2") * 257)[..., None], 1, axis=-1)
    ppm = b"P6 24 16 65535\n" + wide.tobytes()
    np.testing.assert_array_equal(read_image(io.BytesIO(ppm)), UPRIGHT)
    assert (np.asarray(read_image(big_endian(np.full((4, 4), 200 * 257)))) == 200).all()
    one_bit = Image.fromarray(grey).point(lambda x: 255).convert("1")
    assert (np.asarray(read_image(encode(one_bit))) == 255).all()
    for mode in ("LA", "P", "CMYK", "YCbCr"):
        source = Image.fromarray(grey).convert("RGB").quantize() if mode == "P" else Image.fromarray(grey)
        found = np.asarray(to_image(source.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else source))
        assert (found == 200).all(), mode


TRANSPARENT = np.dstack([UPRIGHT, np.full((16, 24), 255, np.uint8)])
TRANSPARENT[:, :6, 3], TRANSPARENT[:, 6:12, 3] = 0, 51
ON_WHITE = UPRIGHT.copy()
ON_WHITE[:, :6] = 255
ON_WHITE[:, 6:12] = np.round(UPRIGHT[:, 6:12] * 0.2 + 255 * 0.8)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_show_white(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    found = read_image(encode(TRANSPARENT, kind, **options))
    np.testing.assert_allclose(np.asarray(found).astype(int), ON_WHITE, atol=1)


def test_transparent_arrays_tensors_palettes_and_greys_show_white():
    tensor = torch.from_numpy(TRANSPARENT).permute(2, 0, 1)
    for source in (TRANSPARENT, tensor, tensor / 255, Image.fromarray(TRANSPARENT)):
        np.testing.assert_allclose(np.asarray(to_image(source)).astype(int), ON_WHITE, atol=1)
    palette = Image.fromarray(UPRIGHT).quantize(8)
    red = palette.getpixel((0, 0))
    for transparency in (red, bytes(0 if k == red else 255 for k in range(8))):
        found = np.asarray(read_image(encode(palette, transparency=transparency)))
        assert (found[:8, :12] == 255).all()
        np.testing.assert_array_equal(found[8:], np.asarray(palette.convert("RGB"))[8:])
    grey = Image.fromarray(np.dstack([np.zeros((8, 8)), np.eye(8) * 255]).astype(np.uint8), "LA")
    np.testing.assert_array_equal(np.asarray(read_image(encode(grey)))[..., 0], 255 - np.eye(8) * 255)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_read_and_that_is_said_once(kind, caplog):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime")]
    file = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    images._warn_of_frames.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert np.asarray(read_image(file))[0, 0].argmax() == 0
    assert [record.getMessage() for record in caplog.records] == [
        "warning: some images are animated or have several pages, of which the first is read"
    ]
    assert decode(file).frames
    # The other images in a phone's photograph are no frames.
    phone = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert not decode(phone).frames
    assert not decode(encode(frames[0], kind)).frames


HEIC = b"\0\0\0\x18ftypheic" + bytes(200)


@pytest.mark.parametrize("name", ["photo.HEIC", "photo.jpg"])
def test_heic_says_what_to_install(tmp_path, name, monkeypatch):
    formats = [form for form in images._formats() if form != "HEIF"]
    monkeypatch.setattr(images, "_formats", lambda: formats)
    (tmp_path / name).write_bytes(HEIC)
    message = rf"{name}: cannot be read as an image: it is HEIC \(pip install pillow-heif\)"
    with pytest.raises(ImageError, match=message) as raised:
        read_image(tmp_path / name)
    assert raised.value.reason == "HEIC (pip install pillow-heif)"


def test_heic_is_read_where_its_package_is_installed():
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra 'heic'")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(UPRIGHT.repeat(4, 0).repeat(4, 1))).save(file, quality=95)
    found = read_image(io.BytesIO(file.getvalue()))
    assert found.size == (96, 64)
    np.testing.assert_allclose(np.asarray(found).astype(int)[16, 24], (250, 0, 0), atol=12)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 1), "dot: 1x1 pixels are too small; the shorter side should be at least 4"),
        ((300, 3), "dot: 300x3 pixels are too small"),
        ((4, 4000), "dot: 4x4000 pixels are too thin; .* the longer side at most 500 times that"),
        ((4, 4), ""),
        ((2000, 4), ""),
    ],
)
def test_images_that_show_nothing_are_refused(size, message):
    image = Image.new("RGB", size)
    if not message:
        check_size(image)
        return
    with pytest.raises(ImageError, match=message):
        check_size(image, "dot")
    with pytest.raises(DataError, match="the image: "):
        to_image(image)


def test_contrast():
    pixels = np.random.default_rng(0).integers(0, 15, (100, 100, 3), dtype=np.uint8)
    assert not has_contrast(Image.fromarray(pixels))
    assert not has_contrast(Image.new("RGB", (100, 100), "white"))
    # A few wrong pixels are no contrast, a small object is.
    pixels[0, :3] = 255
    assert not has_contrast(Image.fromarray(pixels))
    pixels[:8, :8, 2] = 200
    assert has_contrast(Image.fromarray(pixels))


def jpeg_of_scans(count, comment=b""):
    """A progressive JPEG of 24x16 pixels, whose last scan is repeated; `comment`: bytes of its metadata."""
    content = encode(UPRIGHT, "JPEG", progressive=True, comment=comment).getvalue()
    last = content.rindex(b"\xff\xda")
    first_scans = content[:last].replace(comment, b"").count(b"\xff\xda")
    return io.BytesIO(content[:last] + content[last:-2] * (count - first_scans) + content[-2:])


def test_jpegs_of_too_many_scans_are_refused_before_they_are_decoded(monkeypatch):
    assert read_image(jpeg_of_scans(images.MOST_SCANS)).size == (24, 16)
    with pytest.raises(ImageError, match="cannot be read as an image: it is a JPEG of more than 100 scans"):
        read_image(jpeg_of_scans(images.MOST_SCANS + 1))
    monkeypatch.setattr(images, "MOST_SCANNED", 50 * 24 * 16)
    assert read_image(jpeg_of_scans(50)).size == (24, 16)
    with pytest.raises(ImageError, match="more than 50 scans, the most for 24x16 pixels"):
        read_image(jpeg_of_scans(51))


def test_scans_in_the_metadata_of_a_jpeg_do_not_count():
    assert read_image(jpeg_of_scans(20, comment=b"\xff\xda" * 500)).size == (24, 16)


def test_what_pillow_raises_for_damaged_avif_is_an_unreadable_image(monkeypatch, tmp_path):
    def fail(*arguments, **named):
        raise RuntimeError("Failed to decode image: Missing or empty image item")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageError, match=r"a.avif: cannot be read as an image: Failed to decode image: Missing"):
        read_image(tmp_path / "a.avif")


def test_too_many_open_files_are_not_blamed_on_the_image(monkeypatch, tmp_path):
    def fail(*arguments, **named):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(TooManyFilesError, match="ulimit -n"):
        read_image(tmp_path / "a.png")


def test_a_folder_is_no_image(tmp_path):
    message = f"{tmp_path}: is a folder, should be an image or a list of images; the commands dat detect predict and "
    with pytest.raises(ImageError, match=re.escape(message)):
        to_image(tmp_path)


@pytest.mark.parametrize("memory", [False, True])
def test_what_is_no_image_is_said_without_the_object_that_holds_it(tmp_path, memory):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r": cannot be read as an image: it has no known format of images$"):
        read_image(io.BytesIO(b"nothing") if memory else tmp_path / "a.png")
