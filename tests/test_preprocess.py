"""From what people have to what a network takes."""

import io
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import as_users_run
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from vitfeats.errors import ImageError, ShapeError
from vitfeats.preprocess import Preprocess, load_image, load_images, to_pil

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
TENSOR = torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255


def prepare(size=32, patch=8, stride=None, **facts) -> Preprocess:
    return Preprocess(size, patch, patch if stride is None else stride, MEAN, STD, **facts)


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    return path


# Every way in ---------------------------------------------------------------------------------------------------------

WAYS = {
    "path": lambda path: path,
    "text": str,
    "bytes-free PathLike": lambda path: os.fspath(path),
    "PIL": lambda path: Image.fromarray(PIXELS),
    "PIL, opened": Image.open,
    "array uint8": lambda path: PIXELS,
    "array float32": lambda path: (PIXELS / 255).astype(np.float32),
    "array float64": lambda path: PIXELS / 255,
    "array, big-endian": lambda path: (PIXELS / 255).astype(">f4"),
    "array, strided": lambda path: np.ascontiguousarray(PIXELS[::-1, ::-1])[::-1, ::-1],
    "array, read-only": lambda path: np.frombuffer(PIXELS.tobytes(), np.uint8).reshape(PIXELS.shape),
    "tensor float32": lambda path: TENSOR,
    "tensor float64": lambda path: TENSOR.double(),
    "tensor uint8": lambda path: torch.from_numpy(PIXELS).permute(2, 0, 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_give_an_image_gives_the_same_tensor(png, way):
    image = WAYS[way](png)
    loaded = load_image(image)
    assert loaded.dtype == torch.float32
    assert torch.allclose(loaded, TENSOR, atol=1e-7)
    listed = load_images([image, image])
    assert len(listed) == 2
    assert all(torch.equal(one, loaded) for one in (*listed, *load_images(image), *load_images((image,))))


@pytest.mark.parametrize(
    "batch",
    [
        np.stack([PIXELS, PIXELS[::-1]]),
        torch.stack([TENSOR, TENSOR.flip(1)]),
        [torch.stack([TENSOR, TENSOR.flip(1)])],
        [TENSOR, PIXELS[::-1]],
        (TENSOR, Image.fromarray(np.ascontiguousarray(PIXELS[::-1]))),
    ],
    ids=["array", "tensor", "list of a batch", "mixed list", "mixed tuple"],
)
def test_every_way_to_give_a_batch_gives_the_same_tensors(batch):
    first, second = load_images(batch)
    assert torch.allclose(first, TENSOR, atol=1e-7)
    assert torch.allclose(second, TENSOR.flip(1), atol=1e-7)
    prepared = prepare()(batch)
    assert torch.allclose(prepared.pixels, prepare()([TENSOR, TENSOR.flip(1)]).pixels, atol=1e-6)


def test_the_source_is_not_changed():
    array, tensor = PIXELS / 255, TENSOR.clone()
    prepare()([array, tensor])
    assert np.array_equal(array, PIXELS / 255)
    assert torch.equal(tensor, TENSOR)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_kinds_of_pictures_become_rgb(tmp_path, mode):
    picture = Image.fromarray(PIXELS).convert(mode)
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    picture.save(path)
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    assert torch.equal(load_image(picture), expected)
    assert torch.equal(load_image(path), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pictures_of_more_than_eight_bits_are_not_silently_cut_off(tmp_path, dtype):
    # Pillow converts them to RGB by clipping at 255: an image of 16 bits would come out white.
    values = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    values = values.astype(dtype) if dtype == np.float32 else (values * 65535).round().astype(dtype)
    path = tmp_path / "deep.tif"
    Image.fromarray(values).save(path)
    expected = torch.from_numpy(values / np.float32(1 if dtype == np.float32 else 65535)).expand(3, -1, -1)
    for image in (path, Image.fromarray(values)):
        assert torch.allclose(load_image(image), expected.float(), atol=1e-7)


# EXIF -----------------------------------------------------------------------------------------------------------------

# What has to be done to an upright picture so that the orientation, applied, makes it upright again.
UNDO = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", UNDO)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientations_come_out_upright(tmp_path, orientation, suffix):
    # Four plain quarters survive JPEG.
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(np.ascontiguousarray(UNDO[orientation](upright))).save(
        path, exif=exif, **({"quality": 95, "subsampling": 0} if suffix == "jpg" else {})
    )
    loaded = load_image(path)
    assert loaded.shape == (3, 32, 48)
    expected = torch.from_numpy(upright).permute(2, 0, 1) / 255
    assert (loaded - expected).abs().mean() < 0.01


# Resizing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32, 80, (16, 48), (64, 24)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_is_torchvisions_antialiased_in_float(size, interpolation):
    prepared = prepare(size, interpolation=interpolation)(TENSOR)
    expected = tv.resize(
        TENSOR, list(prepared.grid.network_size), InterpolationMode(interpolation), antialias=True
    ).clamp(0, 1)
    expected = tv.normalize(expected, list(MEAN), list(STD))
    assert torch.allclose(prepared.pixels[0], expected, atol=1e-5)


def test_shrinking_is_antialiased():
    # Lines one pixel wide are grey from afar. Without the filter, every second of them would be all that is left.
    lines = torch.zeros(3, 64, 64)
    lines[:, ::2] = 1
    pixels = prepare(16)(lines).pixels[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert (pixels[:, 2:-2] - 0.5).abs().max() < 0.05


def test_an_image_of_the_right_size_is_only_normalised():
    image = TENSOR[:, :32, :48]
    prepared = prepare()(image)
    assert torch.allclose(prepared.pixels[0], tv.normalize(image, list(MEAN), list(STD)), atol=1e-6)


def test_geometry_is_kept():
    prepared = prepare(size=32, patch=16, stride=4)(TENSOR)
    assert prepared.pixels.shape == (1, 3, 32, 48)
    assert (prepared.grid.rows, prepared.grid.cols, prepared.grid.patch, prepared.grid.stride) == (5, 9, 16, 4)
    assert prepared.frames[0].source_size == (40, 60)
    assert prepared.frames[0].network_size == prepared.grid.network_size == (32, 48)


def test_images_of_several_sizes_share_a_batch_where_the_network_size_is_one():
    small = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    together = prepare()([TENSOR, small, TENSOR])
    assert [frame.source_size for frame in together.frames] == [(40, 60), (20, 30), (40, 60)]
    for index, image in enumerate((TENSOR, small, TENSOR)):
        assert torch.allclose(together.pixels[index], prepare()(image).pixels[0], atol=1e-6)


def test_gradients_reach_every_pixel():
    image = (TENSOR * 0.8 + 0.1).double().requires_grad_()  # away from 0 and 1, where the clamp has no slope
    weights = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    pixels = prepare((24, 40))(image).pixels
    (pixels * weights).sum().backward()
    assert (image.grad != 0).all()
    # Against a finite difference, in the one direction that matters most.
    direction = image.grad / image.grad.norm()
    with torch.no_grad():
        step = 0.02 * direction
        ahead, behind = (((prepare((24, 40))(image + s).pixels) * weights).sum() for s in (step, -step))
    assert torch.isclose((ahead - behind).double() / 0.04, image.grad.norm(), rtol=0.02)


def test_gradients_reach_a_list_of_tensors():
    images = [TENSOR.clone().requires_grad_(), TENSOR[:, :20, :30].clone().requires_grad_()]
    prepare()(images).pixels.square().sum().backward()
    assert all(image.grad is not None and image.grad.abs().sum() > 0 for image in images)


def test_to_pil_goes_there_and_back():
    assert np.array_equal(np.array(to_pil(TENSOR)), PIXELS)
    assert torch.equal(load_image(to_pil(TENSOR)), TENSOR)
    out_of_range = torch.tensor([-0.2, 0.5, 1.2]).view(3, 1, 1).requires_grad_()
    assert to_pil(out_of_range).getpixel((0, 0)) == (0, 128, 255)


# What is refused: files -----------------------------------------------------------------------------------------------


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "jpeg")
    return stream.getvalue()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ImageError, match=r"expected an image file, but there is none at '.*missing.png'"):
        load_image(tmp_path / "missing.png")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ImageError, match=r"expected an image file, got the folder '.*'; pass its files one by one to"):
        load_image(tmp_path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"expected an image, got an empty file: '.*empty\.png'"):
        load_image(tmp_path / "empty.png")


def test_text_that_is_called_an_image_is_refused(tmp_path):
    (tmp_path / "text.jpg").write_text("hello, I am not an image")
    with pytest.raises(ImageError, match=r"expected an image, but '.*text\.jpg' is not one that Pillow can read"):
        load_image(tmp_path / "text.jpg")


def test_a_truncated_file_is_refused(tmp_path):
    (tmp_path / "half.jpg").write_bytes(jpeg()[: len(jpeg()) // 2])
    with pytest.raises(ImageError, match=r"expected a whole image, but '.*half\.jpg' breaks off or is damaged: "):
        load_image(tmp_path / "half.jpg")
    # Pillow reads lazily: the picture opens, and only its pixels are missing.
    with pytest.raises(ImageError, match="expected a whole image, but the PIL image breaks off or is damaged: "):
        load_image(Image.open(tmp_path / "half.jpg"))


@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged metadata
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_damage_ends_in_an_image_or_an_image_error(tmp_path, kind):
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, kind)
    draw, path, refused = random.Random(0), tmp_path / f"damaged.{kind}", 0
    for attempt in range(40):
        damaged = bytearray(stream.getvalue())
        if attempt % 2:
            damaged = damaged[: draw.randrange(1, len(damaged))]
        else:
            for _ in range(3):
                damaged[draw.randrange(min(200, len(damaged)))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            loaded = load_image(path)
        except ImageError:
            refused += 1
        else:
            assert loaded.shape[0] == 3
            assert loaded.min() >= 0
            assert loaded.max() <= 1
    assert refused > 0


def test_the_file_is_closed_again(png):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("no /proc here")
    for _ in range(5):
        load_image(png)
    assert len(os.listdir("/proc/self/fd")) == before


# What is refused: values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    array = PIXELS / 255
    array[3, 4, 1] = bad
    for image in (array, torch.from_numpy(array).permute(2, 0, 1)):
        with pytest.raises(ImageError, match=r"expected finite values in 0..1, got NaN or infinity"):
            load_image(image)


def test_floats_up_to_255_are_refused():
    for image in (PIXELS.astype(np.float32), TENSOR * 255):
        with pytest.raises(ImageError, match=r"expected values in 0..1, got 0..255; divide by 255"):
            load_image(image)


def test_normalised_floats_are_refused():
    normalised = tv.normalize(TENSOR, list(MEAN), list(STD))
    with pytest.raises(
        ImageError, match=r"expected values in 0..1, got -2.12..2.64; pass the image before normalisation; vitfeats"
    ):
        load_image(normalised)


def test_a_little_overshoot_is_let_through():
    # An image that is being optimised may leave 0..1 a little from step to step.
    overshot = TENSOR * 1.3 - 0.15
    assert torch.equal(load_image(overshot), overshot)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            np.zeros((8, 9)),
            r"array \(height, width, 3\) with 3 channels, got shape \(8, 9\); repeat a grey image over 3",
        ),
        (torch.zeros(8, 9), r"tensor \(3, height, width\) with 3 channels, got shape \(8, 9\); repeat a grey image"),
        (np.zeros((8, 9, 1)), r"got shape \(8, 9, 1\); repeat the grey channel 3 times"),
        (torch.zeros(1, 8, 9), r"got shape \(1, 8, 9\); repeat the grey channel 3 times"),
        (np.zeros((8, 9, 4)), r"got shape \(8, 9, 4\); drop the alpha channel"),
        (torch.zeros(4, 8, 9), r"got shape \(4, 8, 9\); drop the alpha channel"),
        (np.zeros((8, 9, 2)), r"with 3 channels, got shape \(8, 9, 2\)$"),
        (torch.zeros(2, 8, 9), r"with 3 channels, got shape \(2, 8, 9\)$"),
        (
            np.zeros((3, 8, 9)),
            r"array \(height, width, 3\) .* \(3, 8, 9\); the channels are on the other end: move them",
        ),
        (torch.zeros(8, 9, 3), r"tensor \(3, height, width\) .* \(8, 9, 3\); the channels are on the other end: move"),
        (torch.zeros(3), r"got shape \(3,\)$"),
        (np.zeros((0, 9, 3)), r"expected an image of at least 1×1 pixel, got shape \(3, 0, 9\)"),
        (torch.zeros(3, 8, 0), r"expected an image of at least 1×1 pixel, got shape \(3, 8, 0\)"),
    ],
)
def test_wrong_shapes_are_refused_with_the_cure(image, message):
    with pytest.raises(ImageError, match=message):
        load_image(image)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "uint16", "bool", "complex64"])
def test_other_types_of_numbers_are_refused(dtype):
    for image in (np.zeros((8, 9, 3), dtype), torch.from_numpy(np.zeros((3, 8, 9), dtype))):
        cure = (
            "convert the image to floats$" if dtype in ("bool", "complex64") else "divide the image by the value that"
        )
        with pytest.raises(ImageError, match=rf"uint8 in 0..255 or floats in 0..1, got .*{dtype}; {cure}"):
            load_image(image)


@pytest.mark.parametrize("dtype", ["object", "longdouble", "<U3"])
def test_types_of_numbers_that_torch_does_not_have_are_refused(dtype):
    with pytest.raises(ImageError, match=r"uint8 in 0..255 or floats in 0..1, got .*; convert the image to floats$"):
        load_image(np.zeros((8, 9, 3), dtype))


@pytest.mark.parametrize("thing", [3, 2.5, None, b"bytes", {"image": 1}, object()])
def test_things_that_are_no_images_are_refused(thing):
    expected = (
        r"expected a path, a PIL image, an array \(height, width, 3\) or a tensor \(3, height, width\), "
        f"got {type(thing).__name__}"
    )
    for give in (lambda: load_image(thing), lambda: load_images(thing), lambda: load_images([TENSOR, thing])):
        with as_users_run(), pytest.raises(ImageError, match=expected):
            give()


@pytest.mark.parametrize("nothing", [[], (), torch.zeros(0, 3, 8, 8), np.zeros((0, 8, 8, 3))])
def test_no_images_are_refused(nothing):
    for give in (load_images, prepare()):
        with pytest.raises(ShapeError, match="expected at least one image, got none"):
            give(nothing)


# What is refused: sizes -----------------------------------------------------------------------------------------------


def test_images_of_several_network_sizes_are_refused_with_two_ways_out():
    with pytest.raises(
        ShapeError,
        match=r"expected images that share one network size, got \(32, 48\) and \(48, 32\) \(height, width\); "
        r"pass size=\(h, w\) to load_extractor, for example size=\(32, 48\), or use ex.each for mixed sizes",
    ):
        prepare()([TENSOR, TENSOR.transpose(1, 2)])
    # The first way out works.
    assert prepare((32, 48))([TENSOR, TENSOR.transpose(1, 2)]).pixels.shape == (2, 3, 32, 48)


@pytest.mark.parametrize("size", [7, (7, 32), (32, 7)])
def test_a_size_below_one_patch_is_refused_before_any_image(size):
    with pytest.raises(ShapeError, match=r"expected a size of at least one patch \(8 pixels\), got .*; try size=112"):
        prepare(size)


def test_a_stride_that_does_not_divide_is_refused_before_any_image():
    with pytest.raises(ShapeError, match=r"divides the patch size 8, got 3; try one of \[1, 2, 4, 8\]"):
        prepare(stride=3)
