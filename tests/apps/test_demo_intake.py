"""Uploaded pictures: every kind comes out right or is refused with a sentence, and the folder keeps its bounds."""

import io
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from vitfeats.apps.demo import intake
from vitfeats.apps.demo.intake import SHOWN, WORKING, Folder, Picture, own_folder, reduced, take_in
from vitfeats.configs import DemoConfig
from vitfeats.errors import ConfigError, ImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]
MOST = 64e6


def stored(folder: Path, picture: Image.Image, kind: str = "PNG", name: str = "x.png", **settings) -> Path:
    """Write a picture into a folder; return its path."""
    picture.save(folder / name, kind, **settings)
    return folder / name


def taken(path: Path, pixels: float = MOST) -> Picture:
    return take_in(path, path.parent, pixels=pixels)


def values(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image)


def blocks(width: int, height: int) -> Image.Image:
    """Return a picture in four colours: red, green / blue, white."""
    array = np.zeros((height, width, 3), np.uint8)
    array[: height // 2, : width // 2] = 255, 0, 0
    array[: height // 2, width // 2 :] = 0, 255, 0
    array[height // 2 :, : width // 2] = 0, 0, 255
    array[height // 2 :, width // 2 :] = 255, 255, 255
    return Image.fromarray(array)


def header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# Kinds of pictures ---------------------------------------------------------------------------------------------------


def palette_picture() -> tuple[Image.Image, np.ndarray]:
    """Return a picture with a palette, and its colours worked out by hand."""
    table = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    picture = Image.fromarray(GREY, "L").copy()
    picture = Image.frombytes("P", picture.size, picture.tobytes())
    picture.putpalette(table.tobytes())
    return picture, table[GREY]


def with_alpha(colours: np.ndarray) -> np.ndarray:
    return np.concatenate([colours, np.roll(GREY, 7, 1)[..., None]], -1)


def grey_of(array: np.ndarray) -> np.ndarray:
    return np.repeat(array[..., None], 3, -1)


DEEP = np.linspace(0, 65535, GREY.size).reshape(GREY.shape).round()


@pytest.mark.parametrize(
    ("picture", "kind", "settings", "wanted"),
    [
        pytest.param(Image.fromarray(PIXELS), "PNG", {}, PIXELS, id="RGB"),
        pytest.param(Image.fromarray(PIXELS), "BMP", {}, PIXELS, id="BMP"),
        pytest.param(Image.fromarray(PIXELS), "WEBP", {"lossless": True}, PIXELS, id="WebP"),
        pytest.param(Image.fromarray(GREY), "PNG", {}, grey_of(GREY), id="L"),
        pytest.param(Image.fromarray(with_alpha(GREY[..., None])), "PNG", {}, grey_of(GREY), id="LA"),
        pytest.param(Image.fromarray(with_alpha(PIXELS)), "PNG", {}, PIXELS, id="RGBA"),
        pytest.param(Image.fromarray(with_alpha(PIXELS)), "TIFF", {}, PIXELS, id="RGBA TIFF"),
        pytest.param(palette_picture()[0], "PNG", {}, palette_picture()[1], id="P"),
        pytest.param(palette_picture()[0], "GIF", {}, palette_picture()[1], id="GIF"),
        pytest.param(
            palette_picture()[0], "PNG", {"transparency": bytes(range(256))}, palette_picture()[1], id="P transparent"
        ),
        pytest.param(
            Image.fromarray(GREY > 127), "PNG", {}, grey_of(((GREY > 127) * 255).astype(np.uint8)), id="1 bit"
        ),
        pytest.param(Image.fromarray(DEEP.astype(np.uint16)), "PNG", {}, grey_of(DEEP / 257), id="I;16"),
        pytest.param(Image.fromarray(DEEP.astype(np.int32)), "TIFF", {}, grey_of(DEEP / 257), id="I"),
        pytest.param(Image.fromarray((DEEP / 65535).astype(np.float32)), "TIFF", {}, grey_of(DEEP / 257), id="F"),
    ],
)
def test_a_picture_of_every_mode_comes_out_in_its_colours(tmp_path, picture, kind, settings, wanted):
    found = taken(stored(tmp_path, picture, kind, **settings))
    assert found.image.mode == "RGB"
    assert np.abs(values(found) - wanted.astype(float)).max() <= 0.5 + 1e-3  # more than 8 bits are rounded
    assert found.scale == (1, 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_of_every_mode_comes_out_in_its_colours(tmp_path, mode):
    colour = {"L": 90, "RGB": (200, 90, 30), "CMYK": (50, 100, 20, 60)}[mode]
    cyan, magenta, yellow, black = (50, 100, 20, 60)
    by_hand = [(255 - ink) * (255 - black) / 255 for ink in (cyan, magenta, yellow)]
    wanted = {"L": [90] * 3, "RGB": [200, 90, 30], "CMYK": by_hand}[mode]
    found = values(taken(stored(tmp_path, Image.new(mode, (64, 48), colour), "JPEG", quality=95)))
    assert np.abs(found - np.array(wanted)).max() < 5


@pytest.mark.parametrize(
    "size",
    [(300, 200), (9000, 200)],
)
def test_ink_without_adobes_mark_has_one_meaning_at_every_size(tmp_path, size):
    stream = io.BytesIO()
    Image.new("CMYK", size, (255, 0, 0, 0)).save(stream, "JPEG")
    data = stream.getvalue()
    at = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[at + 2 : at + 4])[0]
    (tmp_path / "x.jpg").write_bytes(data[:at] + data[at + 2 + length :])
    # Pillow writes ink as its lack, as Adobe does; without the mark the numbers are ink: no cyan, all of the others.
    assert values(taken(tmp_path / "x.jpg")).max() < 10


@pytest.mark.parametrize(("kind", "settings"), [("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})])
def test_of_several_pictures_in_a_file_the_first_is_taken(tmp_path, kind, settings):
    colours = [(220, 20, 60), (0, 120, 30), (10, 40, 250)]
    first, *others = (Image.new("RGB", (40, 30), colour) for colour in colours)
    path = stored(tmp_path, first, kind, save_all=True, append_images=others, **settings)
    assert np.array_equal(values(taken(path)), np.full((30, 40, 3), colours[0]))


def test_a_picture_with_others_after_it_as_cameras_write_them_is_taken(tmp_path):
    first = blocks(3000, 2400)
    path = stored(tmp_path, first, "MPO", save_all=True, append_images=[Image.new("RGB", (300, 200), "black")])
    found = taken(path)
    assert found.image.size == (1024, 819)
    assert found.image.getpixel((1000, 800)) == pytest.approx((255, 255, 255), abs=3)


# Geometry ------------------------------------------------------------------------------------------------------------

TURNS = {  # of the EXIF orientations, what they do to an array
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_turned_picture_stands_upright(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"lossless": True} if kind == "WEBP" else {}
    found = taken(stored(tmp_path, Image.fromarray(PIXELS), kind, exif=exif, **settings))
    assert np.array_equal(values(found), TURNS[orientation](PIXELS))
    assert found.scale == (1, 1)


@pytest.mark.parametrize(("kind", "width", "height"), [("JPEG", 3000, 1400), ("PNG", 5000, 1300), ("TIFF", 5000, 1300)])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_picture_that_is_reduced_keeps_its_corners(tmp_path, kind, width, height, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = taken(stored(tmp_path, blocks(width, height), kind, exif=exif))
    upright = TURNS[orientation](np.asarray(blocks(width, height)))
    high, wide = upright.shape[:2]
    assert found.image.size == tuple(round(side * WORKING / max(wide, high)) for side in (wide, high))
    for x, y in ((0.1, 0.1), (0.9, 0.1), (0.1, 0.9), (0.9, 0.9)):
        here = found.inside(x * wide, y * high)
        seen = found.image.getpixel((int(here[0]), int(here[1])))
        assert seen == pytest.approx(tuple(map(int, upright[int(y * high), int(x * wide)])), abs=4)


@pytest.mark.parametrize("size", [(40, 30), (1024, 700), (1500, 1000), (3001, 77), (90, 4099), (6000, 101)])
def test_points_go_in_and_out_again_and_stay_inside(tmp_path, size):
    found = taken(stored(tmp_path, Image.new("RGB", size)))
    width, height = size
    for x, y in ((0, 0), (width, height), (width, 0), (0.5, 0.5), (width * 0.37, height * 0.81)):
        here = found.inside(x, y)
        assert here == pytest.approx((x / width * found.image.width, y / height * found.image.height))
        assert found.outside(*here) == pytest.approx((x, y))
    assert found.inside(width + 9, -9) == (found.image.width, 0)
    assert found.inside(-1, 10 * height) == (0, found.image.height)


@pytest.mark.parametrize("size", [(1500, 1000), (5000, 700), (700, 5000), (9000, 300)])
def test_a_large_picture_is_reduced_to_the_means_of_its_parts(tmp_path, size):
    small = np.random.default_rng(2).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    large = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    found = taken(stored(tmp_path, large))
    assert max(found.image.size) == WORKING
    wanted = large.convert("RGB").resize(found.image.size, Image.Resampling.BOX)
    assert np.abs(values(found).astype(float) - np.asarray(wanted)).mean() < 1


def test_a_small_picture_is_left_as_it_is(tmp_path):
    picture = Image.fromarray(PIXELS)
    assert reduced(picture, 60) is picture
    assert np.array_equal(values(taken(stored(tmp_path, picture))), PIXELS)


@pytest.mark.parametrize("size", [(1000, 16), (1024, 17), (6000, 100), (100, 6000)])
def test_a_picture_sixty_times_as_long_as_wide_is_taken(tmp_path, size):
    found = taken(stored(tmp_path, Image.new("RGB", size)))
    assert min(found.image.size) >= 16
    assert min(found.shown.size) >= 1
    assert max(found.shown.size) == SHOWN


@pytest.mark.parametrize("size", [(6000, 60), (15, 900), (8, 8), (1, 1)])
def test_a_picture_too_small_or_too_narrow_is_refused(tmp_path, size):
    told = f"at least 16 pixels a side.*'x.png' has {size[0]}×{size[1]}; cut out a part"
    with pytest.raises(ImageError, match=told):
        taken(stored(tmp_path, Image.new("RGB", size)))


def test_what_is_drawn_over_has_the_proportions_and_the_grey_of_the_picture(tmp_path):
    for size in ((2000, 1000), (640, 320), (40, 20)):  # small ones are enlarged
        found = taken(stored(tmp_path, blocks(*size)))
        assert found.shown.size == (640, 320)
        assert found.grey.shape == (320, 640)
        assert (int(found.grey[20, 20]), int(found.grey[300, 600])) == (76, 255)


@pytest.mark.parametrize("size", [(40, 30), (16, 900), (1024, 700), (1500, 1000), (3001, 77), (90, 4099)])
def test_points_are_drawn_at_their_share_of_each_side(tmp_path, size):
    found = taken(stored(tmp_path, Image.new("RGB", size)))
    assert max(found.shown.size) == SHOWN
    assert np.argmax(found.shown.size) == np.argmax(size)
    wide, high = found.shown.size
    for across, down in ((0, 0), (1, 1), (1, 0), (0.5, 0.5), (0.37, 0.81)):
        here = found.inside(across * size[0], down * size[1])
        assert found.drawn_at(*here) == pytest.approx((across * wide, down * high), abs=1e-5)


def test_pictures_have_one_key_exactly_where_they_are_the_same():
    def key(array: np.ndarray) -> str:
        return Picture(Image.fromarray(array), (1.0, 1.0)).key

    other = PIXELS.copy()
    other[3, 4, 1] ^= 1
    assert key(PIXELS) == key(PIXELS.copy())
    assert key(PIXELS) != key(other)
    flat = np.zeros((20, 30, 3), np.uint8)
    assert key(flat) != key(flat.transpose(1, 0, 2).copy())


# What is refused -----------------------------------------------------------------------------------------------------

FOREIGN = {
    "empty": (b"", "'x.png' is empty"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "'x.png' is an SVG drawing"),
    "svg with a head": (b"\xef\xbb\xbf<?xml version='1.0'?>\n<svg/>", "'x.png' is an SVG drawing"),
    "html": (b" \n<!DOCTYPE HTML><html></html>", "'x.png' is a web page"),
    "xml": (b"<?xml version='1.0'?><data/>", "'x.png' is XML"),
    "text": (b"not a picture", "'x.png' is none of these"),
    "pdf": (b"%PDF-1.4\n1 0 obj<<>>endobj", "'x.png' is none of these"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n", "is none of these"),
    "first bytes": (b"\x89PNG\r\n\x1a\n", "'x.png' is none of these"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_picture_is_refused_with_what_it_is(tmp_path, kind):
    data, told = FOREIGN[kind]
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"expected a picture \(JPEG, PNG, WebP, BMP, GIF or TIFF\)") as caught:
        taken(tmp_path / "x.png")
    assert told in str(caught.value)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "JPEG2000", "DDS"])
def test_pictures_of_other_formats_are_refused_whatever_their_name(tmp_path, kind):
    path = stored(tmp_path, Image.fromarray(PIXELS), kind)
    with Image.open(path) as opened:
        assert opened.format == kind
    with pytest.raises(ImageError, match="'x.png' is none of these"):
        taken(path)


@pytest.mark.parametrize("name", ["x.png", "x.eps", "x.pdf"])
def test_no_program_is_run_for_postscript(tmp_path, monkeypatch, name):
    begun = []

    def ghostscript(*given, **others):
        begun.append(given)
        raise OSError("not here")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    path = tmp_path / name
    Image.fromarray(PIXELS).save(path, "EPS")
    with pytest.raises(OSError, match="not here"), Image.open(path) as opened:
        opened.load()
    assert len(begun) == 1  # it is what Pillow would do
    with pytest.raises(ImageError, match=f"'{name}' is none of these"):
        taken(path)
    assert len(begun) == 1


@pytest.mark.parametrize("size", [(30000, 30000), (2**31 - 1, 1), (9000, 9000), (1_000_000, 65)])
def test_a_picture_that_claims_too_many_pixels_is_refused_before_any_is_read(tmp_path, monkeypatch, size):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("its pixels were read"))
    (tmp_path / "x.png").write_bytes(header(*size))
    with pytest.raises(ImageError, match=r"expected a picture of at most 64 million pixels, but 'x.png' (claims|has)"):
        taken(tmp_path / "x.png")


def test_pictures_of_more_than_8_bits_may_have_a_quarter_of_the_pixels(tmp_path):
    deep = Image.fromarray(np.full((60, 60), 30000, np.uint16))
    with pytest.raises(ImageError, match=r"of 16 bits of at most 3,000 pixels, but 'x.png' has 60×60; shrink it"):
        taken(stored(tmp_path, deep), pixels=12000)
    assert taken(stored(tmp_path, deep), pixels=14400).image.size == (60, 60)
    assert taken(stored(tmp_path, Image.new("RGB", (60, 60))), pixels=3600).image.size == (60, 60)
    with pytest.raises(ImageError, match=r"of at most 3,599 pixels, but 'x.png' has 60×60"):
        taken(stored(tmp_path, Image.new("RGB", (60, 60))), pixels=3599)


def test_a_limit_above_pillows_is_refused_before_it_is_served():
    with pytest.raises(ConfigError, match="expected megapixels of at least 0 and at most 178, got 400"):
        DemoConfig(megapixels=400)


@pytest.mark.parametrize("port", [0, 99999])
def test_a_port_that_no_machine_has_is_refused(port):
    with pytest.raises(ConfigError, match=f"expected port of at least 1 and at most 65535, got {port}"):
        DemoConfig(port=port)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_picture_that_breaks_off_is_refused(tmp_path, kind, share):
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    data = stored(tmp_path, noise, kind).read_bytes()
    (tmp_path / "x.png").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ImageError, match=r"expected a (whole )?(picture|image).*'x.png'"):
        taken(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_damage_gives_a_picture_or_a_sentence(tmp_path, kind):
    whole = stored(tmp_path, Image.fromarray(PIXELS), kind).read_bytes()
    rng = random.Random(kind)
    refused = []
    for _ in range(80):
        data = bytearray(whole[: rng.randrange(1, len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(min(len(data), rng.choice((60, len(data)))))] = rng.randrange(256)
        (tmp_path / "x.png").write_bytes(data)
        try:
            found = taken(tmp_path / "x.png", pixels=1e6)
        except ImageError as error:
            refused.append(str(error))
        else:
            assert found.image.mode == "RGB"
            assert max(found.image.size) <= WORKING
    assert refused
    assert all("'x.png'" in told and str(tmp_path) not in told for told in refused)


@pytest.mark.parametrize(
    ("width", "compression"),
    [
        (500, "raw"),
        (500, "tiff_lzw"),
        (5000, "tiff_lzw"),
        (5000, "raw"),
    ],
)
def test_a_tiff_with_fewer_strips_than_rows_is_refused_at_every_size(tmp_path, width, compression):
    path = stored(tmp_path, Image.new("RGB", (width, 300), "red"), "TIFF", compression=compression)
    data = bytearray(path.read_bytes())
    first = struct.unpack("<I", data[4:8])[0]
    for at in range(first + 2, first + 2 + 12 * struct.unpack("<H", data[first : first + 2])[0], 12):
        if struct.unpack("<H", data[at : at + 2])[0] == 257:  # rows: more of them than there are strips for
            data[at + 8 : at + 12] = struct.pack("<I", 900)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="'x.png' breaks off or is damaged"):
        taken(path)


# Where files may lie -------------------------------------------------------------------------------------------------

ELSEWHERE = "expected a picture that was uploaded here, got the path of another file"


@pytest.fixture
def inside(tmp_path) -> Path:
    folder = tmp_path / "uploads"
    folder.mkdir()
    stored(tmp_path, Image.fromarray(PIXELS), name="secret.png")
    return folder


def test_a_file_outside_of_the_folder_is_refused(inside):
    (inside / "link.png").symlink_to(inside.parent / "secret.png")
    (inside / "deep").symlink_to(inside.parent)
    (inside.parent / "uploads2").mkdir()
    stored(inside.parent / "uploads2", Image.fromarray(PIXELS))
    for name in ("../secret.png", "link.png", "deep/secret.png", "../uploads2/x.png", "x\0.png"):
        with pytest.raises(ImageError, match=ELSEWHERE):
            take_in(f"{inside}/{name}", inside, pixels=MOST)
    for path in ("", "x.png", "\0", "/", "/etc/passwd", inside.parent / "secret.png"):
        with pytest.raises(ImageError, match=ELSEWHERE):
            take_in(path, inside, pixels=MOST)


def test_a_file_inside_of_the_folder_is_taken_by_any_of_its_paths(inside):
    (inside / "a").mkdir()
    stored(inside / "a", Image.fromarray(PIXELS))
    (inside / "again.png").symlink_to(inside / "a" / "x.png")
    (inside.parent / "other").symlink_to(inside)
    for path in (inside / "a" / "x.png", inside / "a" / ".." / "again.png", inside.parent / "other" / "a" / "x.png"):
        assert np.array_equal(values(take_in(path, inside, pixels=MOST)), PIXELS)


def test_what_is_gone_or_no_file_is_refused(inside):
    (inside / "folder.png").mkdir()
    os.mkfifo(inside / "pipe.png")
    for name in ("gone.png", "folder.png", "pipe.png", "gone/x.png"):
        with pytest.raises(ImageError, match=f"expected '{Path(name).name}' to be here still, but uploads are deleted"):
            take_in(inside / name, inside, pixels=MOST)


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "x\ud800.png", "loop.png"], ids=["long", "no text", "loop"])
def test_a_path_that_no_file_can_have_is_refused(inside, name):
    (inside / "loop.png").symlink_to("loop.png")
    with pytest.raises(ImageError, match="expected"):
        take_in(f"{inside}/{name}", inside, pixels=MOST)


def test_a_file_that_vanishes_while_it_is_opened_is_refused_without_its_path(inside, monkeypatch):
    path = stored(inside, Image.fromarray(PIXELS))

    def opened(file, **others):
        raise FileNotFoundError(2, "No such file or directory", str(file))

    monkeypatch.setattr(Image, "open", opened)
    with pytest.raises(ImageError, match="expected") as caught:
        take_in(path, inside, pixels=MOST)
    assert str(inside) not in str(caught.value)


def test_a_long_name_is_told_in_short(inside):
    name = "begin" + "x" * 200 + "-the-end.png"
    (inside / name).write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"'beginx{35}…x+-the-end\.png' is none of these") as caught:
        take_in(inside / name, inside, pixels=MOST)
    assert len(str(caught.value)) < 160


def test_a_name_is_told_as_it_is(inside):
    name = "<img src=x onerror=alert(1)>.png"
    (inside / name).write_bytes(b"")
    with pytest.raises(ImageError, match=re.escape(f"'{name}' is empty")):
        take_in(inside / name, inside, pixels=MOST)


def test_filters_of_warnings_are_left_as_found_by_two_at_once(inside, monkeypatch):
    paths = [stored(inside, Image.fromarray(PIXELS), name=f"{name}.png") for name in "ab"]
    both_in, first_out = threading.Barrier(2, timeout=20), threading.Event()
    real = intake._taken

    def slowly(picture, name, pixels):
        found = real(picture, name, pixels)
        both_in.wait()
        if name == "'b.png'":
            first_out.wait(20)
        return found

    monkeypatch.setattr(intake, "_taken", slowly)
    threads = [threading.Thread(target=take_in, args=(path, inside), kwargs={"pixels": MOST}) for path in paths]
    with warnings.catch_warnings():
        warnings.filterwarnings("default", message="a filter of this test")
        before = list(warnings.filters)
        for thread in threads:
            thread.start()
            time.sleep(0.2)  # so that they come in one after the other
        threads[0].join()
        first_out.set()
        threads[1].join()
        assert list(warnings.filters) == before


# The folder ----------------------------------------------------------------------------------------------------------


def filled(folder: Folder, *names: str, size: int = 100) -> list[Path]:
    """Write files, each a second after the one before."""
    now = time.time()
    paths = []
    for number, name in enumerate(names):
        path = folder.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"0" * size)
        os.utime(path, (now, now + number - len(names)))
        paths.append(path)
    return paths


@pytest.fixture
def only_mtime(monkeypatch):
    """Let files be as old as their mtime says: tests cannot set ctime."""
    real = Path.lstat

    class Stat:
        def __init__(self, found: os.stat_result) -> None:
            self.st_mtime, self.st_ctime = found.st_mtime, found.st_mtime
            self.st_size = found.st_size

    monkeypatch.setattr(Path, "lstat", lambda self: Stat(real(self)))


@pytest.mark.usefixtures("only_mtime")
def test_a_sweep_deletes_the_oldest_of_what_is_too_much(tmp_path):
    folder = Folder(tmp_path, most_bytes=250, seconds=3600)
    paths = filled(folder, "a/1.png", "2.png", "b/3.png", "4.png")
    assert folder.sweep() == 200
    assert [path.exists() for path in paths] == [False, False, True, True]
    assert folder.sweep() == 200


@pytest.mark.usefixtures("only_mtime")
def test_a_sweep_deletes_what_is_too_old(tmp_path):
    folder = Folder(tmp_path, most_bytes=1e9, seconds=100)
    old, new = filled(folder, "old.png", "new.png")
    os.utime(old, (time.time() - 101,) * 2)
    assert folder.sweep() == 100
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.usefixtures("only_mtime")
def test_what_was_touched_is_young_again(tmp_path):
    folder = Folder(tmp_path, most_bytes=150, seconds=3600)
    used, other = filled(folder, "used.png", "other.png")
    os.utime(used)
    folder.sweep()
    assert (used.exists(), other.exists()) == (True, False)


def test_an_upload_with_an_old_date_is_as_old_as_its_upload(tmp_path):
    folder = Folder(tmp_path, most_bytes=1e9, seconds=100)
    (path,) = filled(folder, "x.png")
    os.utime(path, (5, 5))  # what unpacking and copying do
    folder.sweep()
    assert path.exists()


@pytest.mark.usefixtures("only_mtime")
def test_samples_stay_and_do_not_count(tmp_path):
    folder = Folder(tmp_path, most_bytes=100, seconds=100)
    sample, upload = filled(folder, "samples/cat.png", "x.png")
    os.utime(sample, (5, 5))
    assert folder.sweep() == 100
    assert sample.exists()
    assert upload.exists()


def test_a_sweep_follows_no_link_out_of_the_folder(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    folder = Folder(tmp_path / "folder", most_bytes=0, seconds=0)
    (folder.path / "link").symlink_to(outside)
    (folder.path / "file.txt").symlink_to(outside / "mine.txt")
    folder.sweep()
    assert (outside / "mine.txt").read_text() == "mine"


def test_a_sweep_does_not_mind_files_that_vanish_meanwhile(tmp_path, monkeypatch):
    folder = Folder(tmp_path, most_bytes=0, seconds=3600)
    paths = filled(folder, "1.png", "2.png", "3.png")
    real, looked_at = Path.lstat, []

    def lstat(self):
        if self == paths[0]:
            self.unlink()  # before it is looked at
        found = real(self)
        if self == paths[1]:
            self.unlink()  # afterwards, before it is deleted
        looked_at.append(self)
        return found

    monkeypatch.setattr(Path, "lstat", lstat)
    folder.sweep()
    assert set(looked_at) == set(paths[1:])
    assert not any(map(os.path.exists, paths))


def test_a_sweep_does_not_mind_folders_that_vanish_meanwhile(tmp_path, monkeypatch):
    folder = Folder(tmp_path, most_bytes=0, seconds=3600)
    (deep, other) = filled(folder, "gone/deep/1.png", "other/2.png")
    real = os.scandir

    def scandir(path="."):
        if str(path).endswith("gone"):
            shutil.rmtree(deep.parent.parent)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    folder.sweep()
    assert not other.exists()


def gone_within(path: Path, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return not path.exists()


def test_the_folder_is_swept_meanwhile_and_not_afterwards(tmp_path):
    folder = Folder(tmp_path, most_bytes=0, seconds=3600)
    with folder.swept(every=0.01):
        assert gone_within(filled(folder, "x.png")[0], 10)
    assert not [thread for thread in threading.enumerate() if thread.name == "vitfeats-demo-sweep"]
    assert not gone_within(filled(folder, "y.png")[0], 0.1)


def test_the_folder_is_swept_on_after_a_file_that_cannot_be_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda given: None)
    folder = Folder(tmp_path, most_bytes=0, seconds=3600)
    real, tried = Path.unlink, threading.Event()

    def unlink(self, missing_ok=False):
        if not tried.is_set():
            tried.set()
            raise PermissionError(13, "Permission denied", str(self))
        real(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with folder.swept(every=0.01):
        (path,) = filled(folder, "x.png")
        assert tried.wait(10)
        assert gone_within(path, 2)


def test_a_folder_of_ones_own_is_gone_at_the_end_even_after_an_error():
    with own_folder(most_bytes=1e9, seconds=3600) as folder:
        filled(folder, "a/b/x.png")
        (folder.path / "link").symlink_to(Path.home())
        first = folder.path
        assert first.stat().st_mode & 0o077 == 0
    assert not first.exists()
    assert Path.home().exists()

    def failing() -> None:
        with own_folder(most_bytes=1e9, seconds=3600) as folder:
            left.extend(filled(folder, "x.png"))
            raise ZeroDivisionError

    left: list[Path] = []
    with pytest.raises(ZeroDivisionError):
        failing()
    assert left[0].parent != first
    assert not left[0].parent.exists()


# Memory --------------------------------------------------------------------------------------------------------------

MEASURED = """
import resource, sys
from vitfeats.apps.demo.intake import take_in
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = take_in(sys.argv[1], __import__("pathlib").Path(sys.argv[1]).parent, pixels=64e6)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, *found.image.size)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "most"),  # MB; Pillow takes 4 bytes a pixel, as floats it would be 12
    [("JPEG", {}, 300), ("JPEG", {"progressive": True}, 400), ("PNG", {"compress_level": 1}, 800)],
)
def test_a_picture_of_60_megapixels_takes_little_memory(tmp_path, kind, settings, most):
    path = stored(tmp_path, Image.fromarray(PIXELS).resize((9480, 6320)), kind, **settings)
    done = subprocess.run([sys.executable, "-c", MEASURED, path], capture_output=True, text=True, check=True)
    taken_mb, width, height = map(float, done.stdout.split())
    assert (width, height) == (1024, 683)
    assert taken_mb < most
