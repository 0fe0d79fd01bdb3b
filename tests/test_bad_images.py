"""Every odd, broken or hostile image gives the right tensor or a named error: no crash, no hang, no wrong values."""

import faulthandler
import io
import os
import random
import re
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageOps
from torch import nn

import vitfeats
import vitfeats as vf
from vitfeats.errors import ImageError, ShapeError
from vitfeats.hooks import count_hooks
from vitfeats.preprocess import Preprocess, load_image

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
DEEP = np.linspace(0, 65535, 24 * 32).round().reshape(24, 32).astype(np.uint16)
PACKAGE = str(Path(vitfeats.__file__).parent)


def rgb(picture: Image.Image) -> torch.Tensor:
    """Return an RGB picture as (3, height, width) in 0..1."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def grey(values: np.ndarray) -> torch.Tensor:
    """Return values (height, width) as a grey image (3, height, width)."""
    return torch.from_numpy(values.astype(np.float32)).expand(3, -1, -1)


def encoded(picture: Image.Image, kind: str, **settings) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **settings)
    return stream.getvalue()


def both_ways(path: Path, data: bytes):
    """Write a file; return what a path and an opened picture of it give."""
    path.write_bytes(data)
    with Image.open(path) as picture:
        return load_image(path), load_image(picture)


@contextmanager
def within(seconds: float):
    """End the test run with a traceback of every thread where something hangs."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


# Files that no library writes, made by hand ---------------------------------------------------------------------------


def png(width: int, height: int, bits: int, colours: int, rows: bytes) -> bytes:
    """Return a PNG with this header and these unfiltered rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(width: int, height: int, bits: int, data: bytes, *, kind: int = 1, black: int = 1) -> bytes:
    """Return a grey TIFF of one strip; ``kind`` is the sample format, ``black`` = 0 says that 0 is white."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: black, 277: 1, 278: height, 279: len(data), 339: kind}
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + data


def without_segment(jpeg: bytes, marker: bytes) -> bytes:
    start = jpeg.index(marker)
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :]


# Modes: colour --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "CMYK", "RGBX", "RGBA", "LA", "PA", "P", "1", "L"])
def test_every_mode_of_eight_bits_is_what_pillow_makes_of_it(mode):
    picture = Image.fromarray(PIXELS)
    picture = picture.quantize(16).convert("PA") if mode == "PA" else picture.convert(mode)
    assert picture.mode == mode
    assert torch.equal(load_image(picture), rgb(picture.convert("RGB")))


@pytest.mark.parametrize(("mode", "full"), [("La", "LA"), ("RGBa", "RGBA")])
def test_premultiplied_alpha_is_divided_out_again(mode, full):
    picture = Image.fromarray(PIXELS).convert(full)
    picture.putalpha(Image.new("L", picture.size, 128))
    expected = rgb(picture.convert("RGB"))
    # Half of the last bit is lost when the colours are multiplied.
    assert (load_image(picture.convert(mode)) - expected).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_and_the_colours_below_it_stay(tmp_path, mode):
    opaque = Image.fromarray(PIXELS).convert(mode)
    clear = opaque.copy()
    clear.putalpha(Image.new("L", clear.size, 0))
    for loaded in both_ways(tmp_path / "clear.png", encoded(clear, "png")):
        assert torch.equal(loaded, rgb(opaque.convert("RGB")))


@pytest.mark.parametrize("transparency", [3, bytes([0, 128, 255])], ids=["one colour", "a table"])
@pytest.mark.parametrize("kind", ["png", "gif"])
def test_alpha_of_a_palette_is_dropped_without_a_warning(tmp_path, kind, transparency):
    palette = Image.fromarray(PIXELS).quantize(16)
    if kind == "gif" and isinstance(transparency, bytes):
        transparency = 0  # GIF knows one colour only
    data = encoded(palette, kind, transparency=transparency)
    expected = rgb(Image.open(io.BytesIO(encoded(palette, kind))).convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loaded in both_ways(tmp_path / f"clear.{kind}", data):
            assert torch.equal(loaded, expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_outside_a_palette_is_dropped_too(tmp_path, mode):
    picture = Image.fromarray(PIXELS).convert(mode)
    transparency = picture.getpixel((0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loaded in both_ways(tmp_path / "clear.png", encoded(picture, "png", transparency=transparency)):
            assert torch.equal(loaded, rgb(picture.convert("RGB")))


def test_the_picture_of_the_caller_is_not_changed():
    picture = Image.open(io.BytesIO(encoded(Image.fromarray(PIXELS).quantize(16), "png", transparency=3)))
    picture.getexif()[0x0112] = 6
    before = (picture.mode, picture.size, dict(picture.info), picture.load() and picture.tobytes())
    assert load_image(picture).shape == (3, 60, 40)
    assert (picture.mode, picture.size, picture.info, picture.tobytes()) == before
    assert picture.getexif()[0x0112] == 6


def test_cmyk_jpeg_comes_out_in_its_colours_whoever_wrote_it(tmp_path):
    ink = Image.new("CMYK", (32, 32), (0, 200, 180, 10))
    adobe = encoded(ink, "jpeg", quality=100)  # Pillow writes as Adobe does: how much ink is missing
    # Without the mark, the numbers are ink. The same data then show the opposite ink.
    plain = without_segment(adobe, b"\xff\xee")
    for data, expected in ((adobe, ink), (plain, ImageChops.invert(ink))):
        for loaded in both_ways(tmp_path / "ink.jpg", data):
            assert (loaded - rgb(expected.convert("RGB"))).abs().max() < 3 / 255


# Modes: more than eight bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "kind"), [("png", "png"), ("tif", "tiff"), ("pgm", "ppm"), ("jp2", "jpeg2000")])
def test_sixteen_bits_of_grey_are_divided_by_65535(tmp_path, suffix, kind):
    data = encoded(Image.fromarray(DEEP), kind)
    for loaded in both_ways(tmp_path / f"deep.{suffix}", data):
        assert torch.equal(loaded, grey(DEEP.astype(np.float32) / 65535))


@pytest.mark.parametrize(("mode", "layout"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I;16L", "<u2"), ("I", "=i4")])
def test_every_mode_of_sixteen_bits_is_read_at_its_scale(mode, layout):
    picture = Image.frombytes(mode, (32, 24), DEEP.astype(layout).tobytes())
    assert torch.equal(load_image(picture), grey(DEEP.astype(np.float32) / 65535))


def test_sixteen_bits_big_endian_tiff_is_read_at_its_scale(tmp_path):
    data = encoded(Image.frombytes("I;16B", (32, 24), DEEP.astype(">u2").tobytes()), "tiff")
    for loaded in both_ways(tmp_path / "deep.tif", data):
        assert torch.equal(loaded, grey(DEEP.astype(np.float32) / 65535))


@pytest.mark.parametrize(("colours", "channels"), [(2, 3), (6, 4), (4, 2)], ids=["RGB", "RGBA", "LA"])
def test_sixteen_bits_of_colour_are_right_to_the_eighth(tmp_path, colours, channels):
    values = np.random.default_rng(0).integers(0, 65536, (12, 16, channels)).astype(">u2")
    data = png(16, 12, 16, colours, b"".join(b"\0" + row.tobytes() for row in values))
    wanted = values[..., :3] if channels > 2 else values[..., :1].repeat(3, 2)
    expected = torch.from_numpy(wanted.astype(np.float32) / 65535).permute(2, 0, 1)
    for loaded in both_ways(tmp_path / "deep.png", data):
        assert (loaded - expected).abs().max() <= 1 / 255


@pytest.mark.parametrize("low", [0, -0.1])
def test_grey_floats_in_0_to_1_are_taken_as_they_are(tmp_path, low):
    values = np.linspace(low, 1, 24 * 32).reshape(24, 32).astype(np.float32)
    for loaded in both_ways(tmp_path / "float.tif", encoded(Image.fromarray(values), "tiff")):
        assert torch.equal(loaded, grey(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (DEEP / 65535 * 255, r"expected values in 0..1, got 0..255; divide by 255$"),
        (DEEP / 1, r"expected values in 0..1, got 0..6.55e\+04; divide by the value that is white$"),
        (DEEP / 65535 - 0.5, r"expected values in 0..1, got -0.5..0.5; pass the image before normalisation"),
        (DEEP * np.nan, r"expected finite values in 0..1, got NaN or infinity"),
    ],
    ids=["8 bits", "16 bits", "centred", "nan"],
)
def test_other_grey_floats_are_refused_with_the_cure(values, message):
    with pytest.raises(ImageError, match=message):
        load_image(Image.fromarray(values.astype(np.float32)))


@pytest.mark.parametrize(("low", "high"), [(0, 65536), (-1, 100), (0, 255), (0, 1), (0, 2**31 - 1)])
def test_32_bits_that_are_not_clearly_16_are_refused(tmp_path, low, high):
    # Up to 255 they may be those of 8 bits in a wider box: divided by 65535, the picture would be black.
    values = np.full((8, 9), low, np.int32)
    values[3, 4] = high
    path = tmp_path / "deep.tif"
    Image.fromarray(values).save(path)
    for image in (path, Image.fromarray(values)):
        with pytest.raises(
            ImageError,
            match=rf"expected a picture of 8 or 16 bits a channel, got Pillow's mode 'I' with values {low}..{high}; "
            r"divide by the value that is white and pass an array \(height, width, 3\) of floats in 0..1$",
        ):
            load_image(image)


def test_black_is_black_in_every_mode():
    for mode in ("I", "I;16", "I;16B", "F", "L"):
        assert torch.equal(load_image(Image.new(mode, (5, 4))), torch.zeros(3, 4, 5))


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"bits": 16, "black": 0}, "0 is white"),
        ({"bits": 16, "kind": 2}, "numbers have 16 bits and a sign"),
        ({"bits": 12}, "numbers have 12 bits"),
    ],
    ids=["inverted", "signed", "12 bits"],
)
def test_deep_tiffs_that_pillow_takes_at_another_scale_are_refused(tmp_path, facts, what):
    # All of them open, and would come out inverted or too dark.
    path = tmp_path / "deep.tif"
    path.write_bytes(tiff(32, 24, data=(DEEP // 2).tobytes(), **facts))
    for image in (path, Image.open(path)):
        with pytest.raises(
            ImageError,
            match=rf"expected a grey TIFF of 16 bits without a sign in which 0 is black, got one whose {what}; read it "
            r"yourself and pass an array \(height, width, 3\) of floats in 0..1$",
        ):
            load_image(image)


# Many pictures in one file --------------------------------------------------------------------------------------------

FRAMES = [Image.new("RGB", (48, 32), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]


@pytest.mark.parametrize(("suffix", "kind"), [("gif", "gif"), ("webp", "webp"), ("png", "png"), ("tif", "tiff")])
def test_the_first_of_several_pictures_is_taken(tmp_path, suffix, kind):
    settings = {"lossless": True} if kind == "webp" else {}
    data = encoded(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:], **settings)
    path = tmp_path / f"many.{suffix}"
    for loaded in both_ways(path, data):
        assert (loaded - rgb(FRAMES[0])).abs().max() < 0.05
    with Image.open(path) as picture:
        assert picture.n_frames == 3
        picture.seek(1)
        assert (load_image(picture) - rgb(FRAMES[1])).abs().max() < 0.05  # the one it stands at
        assert picture.tell() == 1


# EXIF -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_an_opened_picture_is_turned_as_its_file_is(tmp_path, kind, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # What Pillow does to turn it upright, backwards: only the quarter turns differ from their own inverse.
    tag = Image.Exif()
    tag[0x0112] = {6: 8, 8: 6}.get(orientation, orientation)
    picture = Image.fromarray(upright)
    picture.info["exif"] = tag.tobytes()
    stored = ImageOps.exif_transpose(picture)
    stored.info.clear()
    path = tmp_path / f"turned.{kind}"
    stored.save(path, kind, exif=exif, **({"quality": 95} if kind in ("jpeg", "webp") else {}))
    with Image.open(path) as opened:
        for image in (path, opened, opened.convert("RGB"), ImageOps.exif_transpose(opened)):
            loaded = load_image(image)
            assert loaded.shape == (3, 32, 48)
            assert (loaded - rgb(Image.fromarray(upright))).abs().mean() < 0.02


def test_deep_pictures_are_turned_too():
    for mode, layout in (("I;16", "<u2"), ("I;16B", ">u2"), ("I", "=i4"), ("F", "=f4")):
        values = DEEP if mode != "F" else DEEP / 65535
        picture = Image.frombytes(mode, (32, 24), values.astype(layout).tobytes())
        picture.getexif()[0x0112] = 6
        expected = np.rot90(DEEP.astype(np.float32) / 65535, -1)
        assert torch.allclose(load_image(picture), grey(expected.copy()))


def test_a_frame_of_a_turned_picture_is_upright(mini):
    picture = Image.fromarray(PIXELS)
    picture.getexif()[0x0112] = 6
    assert mini(picture, "key@1").frames[0].source_size == (60, 40)


# Paths ----------------------------------------------------------------------------------------------------------------


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    with (
        within(20),
        pytest.raises(
            ImageError,
            match=r"expected an image file, but '.*pipe.png' is a pipe, a socket or a device; read it yourself "
            r"and pass a PIL image$",
        ),
    ):
        load_image(path)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty", "/dev/random"])
def test_a_device_is_refused_without_reading_it(device):
    if not os.path.exists(device):
        pytest.skip(f"no {device} here")
    with within(20), pytest.raises(ImageError, match=f"'{device}' is a pipe, a socket or a device; read it yourself"):
        load_image(device)


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's whole path may have 108 bytes only
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        with pytest.raises(ImageError, match="'socket.png' is a pipe, a socket or a device; read it yourself"):
            load_image("socket.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read_is_refused(tmp_path):
    path = tmp_path / "locked.png"
    Image.fromarray(PIXELS).save(path)
    path.chmod(0)
    with pytest.raises(
        ImageError, match=r"expected a readable image, but '.*locked.png' could not be opened: .*denied"
    ):
        load_image(path)


@pytest.mark.parametrize("place", ["os.stat", "PIL.Image.open"])
def test_what_the_system_refuses_is_named(tmp_path, monkeypatch, place):
    path = tmp_path / "locked.png"
    Image.fromarray(PIXELS).save(path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(place, refuse)
        with pytest.raises(
            ImageError, match=r"expected a readable image, but '.*locked.png' could not be opened: .*den"
        ):
            load_image(str(path))


def test_a_name_that_is_too_long_or_a_ring_of_links_is_named(tmp_path):
    (tmp_path / "ring.png").symlink_to(tmp_path / "ring.png")
    for path in (tmp_path / "ring.png", tmp_path / ("x" * 300 + ".png")):
        with pytest.raises(ImageError, match=r"expected a readable image, but '.*' could not be opened: \[Errno"):
            load_image(path)


def test_names_that_no_file_can_have_are_missing(tmp_path):
    (tmp_path / "file.png").write_bytes(b"x")
    for name in ("", "nul\0byte.png", tmp_path / "file.png" / "inside.png", "https://example.com/cat.jpg"):
        with pytest.raises(ImageError, match="expected an image file, but there is none at '"):
            load_image(name)


@pytest.mark.parametrize("name", ["кот.png", "猫 ü.png", "new\nline.png", os.fsdecode(b"\xff\xfe.png")])
def test_names_in_any_script_are_read_and_can_be_printed(tmp_path, name):
    path = tmp_path / name
    try:
        Image.fromarray(PIXELS).save(path, "png")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such name")
    assert torch.equal(load_image(path), rgb(Image.fromarray(PIXELS)))
    path.write_bytes(b"no picture")
    with pytest.raises(ImageError, match="is not one that Pillow can read") as caught:
        load_image(path)
    assert str(caught.value).encode("utf-8")


def test_a_path_object_of_bytes_is_read(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    (entry,) = os.scandir(os.fsencode(tmp_path))
    assert torch.equal(load_image(entry), rgb(Image.fromarray(PIXELS)))


def test_a_link_is_followed(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    (tmp_path / "link").symlink_to(tmp_path / "image.png")
    assert torch.equal(load_image(tmp_path / "link"), rgb(Image.fromarray(PIXELS)))


# Broken files ---------------------------------------------------------------------------------------------------------

KINDS = ["png", "jpeg", "gif", "webp", "tiff", "bmp"]
MORE_KINDS = ["ppm", "tga", "jpeg2000", "pcx", "sgi", "dds", "avif", "ico"]


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_truncated_file_of_every_format_is_refused(tmp_path, kind, part):
    try:
        data = encoded(Image.fromarray(PIXELS).resize((64, 64)), kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    path = tmp_path / "half"
    path.write_bytes(data[: int(len(data) * part)])
    message = r"is not one that Pillow can read|breaks off or is damaged: |could not be opened: "
    with pytest.raises(ImageError, match=rf"expected .* but '.*half' ({message})"):
        load_image(path)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_tiff_that_claims_more_rows_than_it_has_is_refused(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = bytearray(encoded(Image.fromarray(PIXELS), "tiff", exif=exif))
    path = tmp_path / "tall.tif"
    for loaded in both_ways(path, data):
        assert loaded.shape == ((3, 40, 60) if orientation == 1 else (3, 60, 40))
    entry = next(data.index(tag) for tag in (b"\x01\x01\x03\0", b"\x01\x01\x04\0") if tag in data)  # ImageLength
    data[entry + 8 : entry + 10] = struct.pack("<H", 4000)
    path.write_bytes(data)
    for image in (path, Image.open(path)):
        with pytest.raises(ImageError, match="breaks off or is damaged: it has 2400 of 240000 pixels$"):
            load_image(image)


def test_a_postscript_program_is_refused(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n{} loop\n%%EOF\n")
    with (
        within(20),
        pytest.raises(
            ImageError,
            match=r"expected a picture, but '.*picture.jpg' is a PostScript program, which may never end; "
            r"pass it as PNG$",
        ),
    ):
        load_image(path)


def test_a_picture_whose_file_was_closed_is_refused(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    with Image.open(path) as picture:
        pass
    with pytest.raises(ImageError, match="expected a whole image, but the PIL image breaks off or is damaged: "):
        load_image(picture)


# Headers that claim too much ------------------------------------------------------------------------------------------


def _claims(kind: str, side: int) -> bytes:
    data = bytearray(encoded(Image.fromarray(PIXELS).resize((64, 64)), kind))
    if kind == "png":
        return png(side, side, 8, 2, b"\0" * 100)
    if kind == "tiff":
        return tiff(side, side, 8, b"\0" * 100)
    place, layout = {
        "gif": (6, "<HH"),
        "bmp": (18, "<ii"),
        "jpeg": (data.find(b"\xff\xc0") + 5, ">HH"),
    }[kind]
    struct.pack_into(layout, data, place, side, side)
    return bytes(data)


@pytest.mark.parametrize("kind", ["png", "tiff", "gif", "bmp", "jpeg"])
def test_a_small_file_that_claims_billions_of_pixels_costs_nothing(tmp_path, kind):
    resource = pytest.importorskip("resource")
    path = tmp_path / f"bomb.{kind}"
    path.write_bytes(_claims(kind, 60_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        within(20),
        pytest.raises(
            ImageError,
            match=r"expected an image within Pillow's limit, but '.*bomb.*' claims more pixels "
            r"\(.*3600000000 pixels.*\); where you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS$",
        ),
    ):
        load_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes, of the 10 gigabytes


def test_between_once_and_twice_the_limit_a_picture_is_read_and_only_pillow_warns(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.fromarray(PIXELS).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(load_image(path), rgb(Image.fromarray(PIXELS)))
    assert [warning.category for warning in caught] == [Image.DecompressionBombWarning]
    assert not any(warning.filename.startswith(PACKAGE) for warning in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"within Pillow's limit, but .* claims more pixels \(.*2400 pixels"):
            load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 // 2 - 1)
    with pytest.raises(ImageError, match=r"within Pillow's limit, but .* claims more pixels \(.*2400 pixels"):
        load_image(path)


def test_a_claim_inside_the_file_is_refused_too(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.fromarray(PIXELS).save(path)

    def refuse(self):
        raise Image.DecompressionBombError("Image size (9 pixels) exceeds limit")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", refuse)
    with pytest.raises(ImageError, match=r"within Pillow's limit, but .* claims more pixels \(Image size \(9 pixels\)"):
        load_image(path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("place", ["PIL.PngImagePlugin.PngImageFile.load", "vitfeats.preprocess._as_tensor"])
def test_a_picture_that_does_not_fit_in_memory_is_named(tmp_path, monkeypatch, place, error):
    path = tmp_path / "large.png"
    Image.fromarray(PIXELS).save(path)
    monkeypatch.setattr(place, lambda *args: _raise(error)())
    with pytest.raises(ImageError, match=r"an image that fits in memory, but '.*' has 60×40 pixels; shrink it$"):
        load_image(path)


# Fuzz -----------------------------------------------------------------------------------------------------------------


def _damaged(data: bytes, draw: random.Random) -> bytes:
    """Return a file with flipped bytes, a cut end, or two swapped fields of its header."""
    changed, way = bytearray(data), draw.randrange(4)
    if way == 0:
        return data[: draw.randrange(1, len(data))]
    if way == 1:
        for _ in range(draw.randrange(1, 8)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif way == 2:
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(min(64, len(changed)))] = draw.randrange(256)
    else:
        size = draw.choice((1, 2, 4))
        one, two = (draw.randrange(min(64, len(changed) - size) // size) * size for _ in range(2))
        changed[one : one + size], changed[two : two + size] = changed[two : two + size], changed[one : one + size]
    return bytes(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_any_kind_ends_in_an_image_or_an_image_error(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**22)  # a damaged header asks for what it likes
    data, draw, path, refused = encoded(Image.fromarray(PIXELS), kind), random.Random(kind), tmp_path / "damaged", 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(50):
            path.write_bytes(_damaged(data, draw))
            try:
                with within(60):
                    loaded = load_image(path)
            except ImageError:
                refused += 1
            else:
                assert loaded.dtype == torch.float32
                assert loaded.shape[0] == 3
                assert 0 <= loaded.min() <= loaded.max() <= 1
    assert 0 < refused < 50
    assert not [str(warning.message) for warning in caught if warning.filename.startswith(PACKAGE)]


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_one_pixel_is_an_image(mini):
    for image in (Image.new("RGB", (1, 1), (10, 200, 30)), torch.tensor([10, 200, 30.0]).view(3, 1, 1) / 255):
        prepared = mini.preprocess(image)
        assert prepared.pixels.shape == (1, 3, 112, 112)
        colour = prepared.pixels[0, :, :1, :1]
        assert torch.allclose(prepared.pixels[0], colour.expand(3, 112, 112), atol=1e-5)
        described = mini(image, "key@2")
        assert described.frames[0].source_size == (1, 1)
        assert described.features.isfinite().all()


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_a_strip_is_refused_before_it_is_resized(mini, monkeypatch, size):
    image = torch.full((3, *size), 0.5)
    long = size[0] > size[1]
    message = re.escape(
        f"expected an image that comes to at most 16777216 network pixels, got {size[0]}×{size[1]} pixels, which "
        f"size=112 makes a network size of {(2_240_000, 112) if long else (112, 2_240_000)} with 980000 tokens; pass "
        f"size=(h, w), for example size={(224, 112) if long else (112, 224)}, or crop the image"
    )

    def fail(*args):
        raise AssertionError("resized")

    with monkeypatch.context() as patch:
        patch.setattr("vitfeats.preprocess.resize_images", fail)
        for give in (
            lambda: mini.preprocess.network_size(size),
            lambda: mini(image, "key@1"),
            lambda: list(mini.each([image], "key@1")),
        ):
            with pytest.raises(ShapeError, match=f"{message}$"):
                give()
    # The way out works.
    described = mini.resized(size=(112, 224))(image, "key@1")
    assert described.grid.network_size == (112, 224)
    assert described.frames[0].source_size == size


def test_the_limit_is_on_pixels_and_only_where_the_shape_of_the_image_decides():
    facts = {"patch": 16, "stride": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert Preprocess(4096, **facts).network_size((10, 10)) == (4096, 4096)
    with pytest.raises(ShapeError, match=r"\(4096, 4112\) with 65792 tokens; pass .* example size=\(4096, 4112\), or"):
        Preprocess(4096, **facts).network_size((1024, 1028))
    assert Preprocess((4096, 4112), **facts).network_size((1024, 1028)) == (4096, 4112)


# Memory ---------------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = (
    r"expected images that fit in the memory of cpu, got {} of 49 tokens each \(network size \(112, 112\)\); lower "
    r"size= or the number of images \(batch_size= of ex.each\), raise stride=, or load with dtype='bfloat16'$"
)


def _no_memory() -> torch.Tensor:
    return torch.empty(1 << 50)


def _raise(error: Exception):
    def fail() -> torch.Tensor:
        raise error

    return fail


@pytest.mark.parametrize(
    "fail",
    [
        _no_memory,
        _raise(MemoryError()),
        lambda: np.empty(1 << 50),
        _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        _raise(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")),
        _raise(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")),
        _raise(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")),
    ],
    ids=["torch, real", "python", "numpy, real", "cuda", "windows", "mps", "cublas"],
)
@pytest.mark.parametrize("number", [1, 2])
def test_running_out_of_memory_inside_a_block_says_what_to_lower(mini, monkeypatch, fail, number):
    before, image = count_hooks(mini.model), Image.fromarray(PIXELS[:, :40])
    expected = OUT_OF_MEMORY.format("1 image" if number == 1 else "2 images")
    with monkeypatch.context() as patch:
        patch.setattr(mini.model.blocks[3].mlp, "forward", lambda tokens: fail())
        for call in (
            lambda: mini([image] * number, ["key@2", "key@9"]),
            lambda: list(mini.each([image] * number, "key@9")),
            lambda: mini.attention([image] * number, 9),
        ):
            with pytest.raises(ShapeError, match=expected) as caught:
                call()
            assert isinstance(caught.value.__cause__, MemoryError | RuntimeError)
            assert count_hooks(mini.model) == before
    assert mini([image] * number, "key@9").features.isfinite().all()


def test_running_out_of_memory_while_resizing_says_the_size(mini):
    large = mini.resized(size=(1 << 21, 1 << 21))
    with pytest.raises(
        ShapeError,
        match=r"expected images that fit in the memory of cpu, got images at size=\(2097152, 2097152\); lower size=",
    ):
        large(Image.fromarray(PIXELS), "key@1")


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), NotImplementedError("x")])
def test_other_errors_of_a_model_pass_unchanged(mini, monkeypatch, error):
    monkeypatch.setattr(mini.model.blocks[3].mlp, "forward", lambda tokens: _raise(error)())
    with pytest.raises(type(error)) as caught:
        mini(Image.fromarray(PIXELS), "key@9")
    assert caught.value is error
    assert caught.value.__cause__ is None


def test_a_process_with_little_memory_ends_in_the_same_words():
    pytest.importorskip("resource")
    code = (
        "import resource, torch, vitfeats as vf\n"
        "torch.set_num_threads(1)\n"
        "ex = vf.load_extractor('mini', size=112, device='cpu')\n"
        "image = torch.rand(3, 64, 64)\n"
        "ex(image, 'key@11')\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    ex.resized(size=(4096, 4096))(image, 'key@11')\n"
        "except vf.ShapeError as error:\n"
        "    print(error)\n"
        "print(ex(image, 'key@11').features.shape)\n"
    )
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc here")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    told, after = ran.stdout.splitlines()
    assert told.startswith("expected images that fit in the memory of cpu, got ")
    assert "lower size= or the number of images" in told
    assert after == "torch.Size([1, 49, 192])"


# Arrays and tensors ---------------------------------------------------------------------------------------------------


def test_sixteen_bit_arrays_are_refused_because_nothing_says_what_is_white():
    values = np.full((8, 9, 3), 4095, np.uint16)
    for image in (values, values.astype(">u2"), torch.from_numpy(values).permute(2, 0, 1)):
        with pytest.raises(
            ImageError,
            match=r"expected uint8 in 0..255 or floats in 0..1, got .*u.*16; divide the image by the value that is "
            r"white, 255 or 65535$",
        ):
            load_image(image)
    # The cure works.
    assert torch.equal(load_image(values / 4095), torch.ones(3, 8, 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_floats_of_few_bits_are_taken(dtype):
    image = torch.full((3, 4, 5), 0.5, dtype=dtype)
    assert torch.equal(load_image(image), torch.full((3, 4, 5), 0.5))


def test_the_memory_of_an_array_may_lie_any_way():
    values = (PIXELS / 255).astype(np.float32)
    expected = torch.from_numpy(values).permute(2, 0, 1)
    read_only = values.copy()
    read_only.flags.writeable = False
    for array in (
        np.flip(np.flip(values).copy()),  # negative strides
        values.astype(">f4"),
        values.astype(">f8"),
        np.asfortranarray(values),
        np.repeat(values, 2, axis=1)[:, ::2],
        read_only,
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.allclose(load_image(array), expected, atol=1e-7)


def test_the_extractor_says_what_is_wrong_with_an_image(mini, tmp_path):
    assert isinstance(mini.model, nn.Module)
    (tmp_path / "text.jpg").write_text("hello")
    for give in (lambda: mini(tmp_path / "text.jpg"), lambda: list(mini.each([tmp_path / "text.jpg"]))):
        with pytest.raises(vf.ImageError, match="is not one that Pillow can read"):
            give()
