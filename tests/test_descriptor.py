"""The Descriptor: it holds what it says, gives it back at points, and survives a disk."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from synthetic import as_users_run, describe, random_descriptor

from vitfeats import descriptor as module
from vitfeats.descriptor import Descriptor, Descriptors
from vitfeats.errors import ShapeError, StoreError, TapError
from vitfeats.grid import Frame, PatchGrid
from vitfeats.taps import Tap

GRID = PatchGrid(2, 3, 8, 8)
FRAME = Frame((40, 50), GRID.network_size)


def make(features=None, grid=GRID, frames=(FRAME,), **facts) -> Descriptor:
    features = torch.zeros(1, 6, 4) if features is None else features
    return Descriptor(features, grid, frames, Tap("key", 1), "synthetic", **facts)


def full(batch: int = 2) -> Descriptor:
    """Return a descriptor with everything in it, on a grid whose patch is not square."""
    grid = PatchGrid(2, 3, (8, 6), (4, 6))
    generator = torch.Generator().manual_seed(3)
    frames = tuple(Frame((40 + i, 50), grid.network_size) for i in range(batch))
    arrays = (torch.randn(batch, *shape, generator=generator) for shape in ((6, 4), (4,), (2, 4)))
    features, cls, registers = arrays
    return Descriptor(features, grid, frames, Tap("out", "up1.res1", 25), "synthetic", cls, registers, heads=2)


def assert_same(a: Descriptor, b: Descriptor) -> None:
    for name in ("features", "cls", "registers"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None)
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right))
    assert (a.grid, a.frames, a.tap, a.model, a.heads) == (b.grid, b.frames, b.tap, b.model, b.heads)


# Validation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"features": torch.zeros(1, 5, 4)}, r"expected features \(batch, 6, dim\) for a grid of 2×3, got \(1, 5, 4\)"),
        ({"features": torch.zeros(6, 4)}, r"expected features \(batch, 6, dim\) for a grid of 2×3, got \(6, 4\)"),
        ({"frames": ()}, r"expected one frame an image \(1\), got 0"),
        ({"frames": (FRAME, FRAME)}, r"expected one frame an image \(1\), got 2"),
        ({"cls": torch.zeros(2, 4)}, r"expected cls \(1, 4\), got \(2, 4\)"),
        ({"cls": torch.zeros(1, 1, 4)}, r"expected cls \(1, 4\), got \(1, 1, 4\)"),
        ({"registers": torch.zeros(1, 4)}, r"expected registers \(1, r, 4\), got \(1, 4\)"),
        ({"registers": torch.zeros(1, 2, 5)}, r"expected registers \(1, r, 4\), got \(1, 2, 5\)"),
        (
            {"frames": (Frame((40, 50), (16, 16)),)},
            r"expected frames with the grid's network size \(16, 24\), got \(16, 16\)",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(facts, message):
    with as_users_run(), pytest.raises(ShapeError, match=message):
        make(**facts)


def test_map_is_a_view_in_rows_and_columns():
    d = random_descriptor(0, rows=2, cols=3, dim=4, batch=2)
    assert d.map.shape == (2, 4, 2, 3)
    assert d.map.data_ptr() == d.features.data_ptr()
    for row in range(2):
        for col in range(3):
            assert torch.equal(d.map[:, :, row, col], d.features[:, row * 3 + col])


def test_properties_and_repr():
    d = full()
    assert (d.dim, d.dtype, d.device, len(d)) == (4, torch.float32, torch.device("cpu"), 2)
    assert repr(d) == (
        "Descriptor(out@up1.res1#25 of synthetic: batch 2, 2×3 tokens of 4, cls, registers, float32 on cpu)"
    )


# At points ------------------------------------------------------------------------------------------------------------


def naive_at(d: Descriptor, image: int, x: float, y: float) -> torch.Tensor:
    """Interpolate between token centres, one point at a time, the border value held beyond the outermost centres."""
    (patch_h, patch_w), (step_y, step_x) = (
        (value, value) if isinstance(value, int) else value for value in (d.grid.patch, d.grid.stride)
    )
    (source_h, source_w), (net_h, net_w) = d.frames[image].source_size, d.frames[image].network_size
    col = min(max((x * net_w / source_w - patch_w / 2) / step_x, 0), d.grid.cols - 1)
    row = min(max((y * net_h / source_h - patch_h / 2) / step_y, 0), d.grid.rows - 1)
    left, top = min(math.floor(col), d.grid.cols - 1), min(math.floor(row), d.grid.rows - 1)
    right, bottom = min(left + 1, d.grid.cols - 1), min(top + 1, d.grid.rows - 1)
    across, down = col - left, row - top
    token = d.features[image].double().reshape(d.grid.rows, d.grid.cols, d.dim)
    above = token[top, left] * (1 - across) + token[top, right] * across
    below = token[bottom, left] * (1 - across) + token[bottom, right] * across
    return above * (1 - down) + below * down


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6),
)
def test_at_is_the_interpolation_written_out(shape, patch, stride, source, shares):
    grid = PatchGrid(*shape, patch, stride)
    # Two images of different sizes on one grid: each has its own frame.
    frames = (Frame(source, grid.network_size), Frame((source[0] + 7, source[1] + 3), grid.network_size))
    features = torch.randn(2, grid.tokens, 3, generator=torch.Generator().manual_seed(0))
    d = make(features, grid, frames)
    points = [(x * source[1], y * source[0]) for x, y in shares]
    found = d.at(points)
    assert found.shape == (2, len(points), 3)
    for image in range(2):
        expected = torch.stack([naive_at(d, image, *point) for point in points])
        assert torch.allclose(found[image].double(), expected, atol=2e-3)  # float32 positions on a steep map


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stride", [4, 8])
def test_at_is_exact_at_token_centres(dtype, stride):
    # 50 columns: more than bfloat16 can count in quarters.
    d = random_descriptor(1, rows=7, cols=50, stride=stride, source=(451, 300)).to(dtype)
    centres = d.frames[0].to_source(d.grid.centres())
    assert d.at(centres).dtype == dtype
    assert torch.allclose(d.at(centres).float(), d.features.float(), atol=1e-4 if dtype == torch.float32 else 0.02)


def test_at_takes_tensors_arrays_and_pairs():
    d = random_descriptor(2)
    points = [(3.0, 4.5), (20.0, 1.0)]
    assert torch.equal(d.at(points), d.at(torch.tensor(points)))
    assert torch.equal(d.at(points), d.at(np.array(points)))
    assert d.at(torch.zeros(0, 2)).shape == (1, 0, 8)


def test_gradients_flow_through_at():
    features = torch.randn(1, 6, 4, requires_grad=True)
    make(features).at([(25.0, 20.0)]).sum().backward()  # the middle: between two columns and two rows
    assert torch.allclose(features.grad.sum((0, 1)), torch.ones(4))
    assert (features.grad != 0).sum() >= 8


@pytest.mark.parametrize("point", [(-0.1, 5.0), (5.0, -0.1), (50.1, 5.0), (5.0, 40.1)])
def test_points_outside_are_refused(point):
    inside = (50.0, 40.0)  # the bottom-right corner is still inside
    make().at([inside])
    with pytest.raises(
        ShapeError,
        match=rf"expected points \(x, y\) inside the image of 50×40 pixels, got \[{point[0]}, {point[1]}\]; "
        r"are x and y the wrong way round\?",
    ):
        make().at([inside, point])


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(2, 3), r"expected points \(n, 2\), \(x, y\) in pixels, got shape \(2, 3\)"),
        (torch.zeros(2), r"got shape \(2,\); one: \[\(x, y\)\]"),
        ([3.0, 4.0], r"got shape \(2,\); one: \[\(x, y\)\]"),
        ([(1.0,), (1.0, 2.0)], r"expected points \(n, 2\), \(x, y\) in pixels, got \[\(1.0,\), \(1.0, 2.0\)\]"),
        ("ab", r"expected points \(n, 2\), \(x, y\) in pixels, got 'ab'"),
        ([(math.nan, 1.0)], "expected finite points, got NaN or infinity; leave absent points out"),
        ([(math.inf, 1.0)], "expected finite points, got NaN or infinity; leave absent points out"),
    ],
)
def test_points_that_are_none_are_refused(points, message):
    with as_users_run(), pytest.raises(ShapeError, match=message):
        make().at(points)


# As a sequence --------------------------------------------------------------------------------------------------------


def test_indexing_keeps_a_batch_of_one():
    d = full(batch=3)
    for index in (0, 1, 2, -1, -3):
        one = d[index]
        assert len(one) == 1
        assert torch.equal(one.features[0], d.features[index])
        assert torch.equal(one.cls[0], d.cls[index])
        assert torch.equal(one.registers[0], d.registers[index])
        assert one.frames == (d.frames[index],)
        assert (one.grid, one.tap, one.model, one.heads) == (d.grid, d.tap, d.model, d.heads)


def test_slicing_and_iterating():
    d = full(batch=3)
    assert_same(d[:], d)
    assert [one.frames[0] for one in d] == list(d.frames)
    assert torch.equal(torch.cat([one.features for one in d]), d.features)
    assert torch.equal(d[1:].features, d.features[1:])
    assert len(d[3:]) == 0


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_out_of_range_is_an_index_error(index):
    with pytest.raises(IndexError, match=rf"expected an image index from -3 to 2, got {index}"):
        full(batch=3)[index]


def test_to_converts_every_array():
    half = full().to(torch.float16)
    assert {half.features.dtype, half.cls.dtype, half.registers.dtype} == {torch.float16}
    assert_same(full().to("cpu"), full())


def test_detach_cuts_every_graph():
    features, cls = torch.zeros(1, 6, 4, requires_grad=True), torch.zeros(1, 4, requires_grad=True)
    d = make(features * 1, cls=cls * 1)
    assert d.features.requires_grad
    assert not d.detach().features.requires_grad
    assert not d.detach().cls.requires_grad


def test_numpy_is_float32():
    d = random_descriptor(0)
    for one in (d, d.to(torch.bfloat16), make(torch.zeros(1, 6, 4, requires_grad=True))):
        assert one.numpy().dtype == np.float32
        assert np.array_equal(one.numpy(), one.features.detach().float().numpy())


# On disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_saved_is_loaded(tmp_path, dtype):
    for number, d in enumerate((full().to(dtype), make(), make(cls=torch.ones(1, 4)))):
        path = d.save(tmp_path / f"{number}.safetensors")
        assert path == tmp_path / f"{number}.safetensors"
        assert_same(Descriptor.load(path), d)
        assert_same(Descriptor.load(str(path)), d)


def test_views_and_graphs_are_saved_as_their_values(tmp_path):
    # A cls tap shares its memory between features and cls, which the file format refuses.
    cls = torch.ones(1, 4, requires_grad=True) * 2
    d = make(cls[:, None].expand(1, 6, 4), cls=cls)
    loaded = Descriptor.load(d.save(tmp_path / "d.safetensors"))
    assert_same(loaded, d.detach())


def test_saving_replaces_the_old_file(tmp_path):
    path = tmp_path / "d.safetensors"
    full().save(path)
    make().save(path)
    assert_same(Descriptor.load(path), make())
    assert [file.name for file in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failing_write_leaves_nothing_behind(tmp_path, monkeypatch, failure, where):
    path = full().save(tmp_path / "old.safetensors")
    before = path.read_bytes()

    def fail(*_arguments):
        raise failure

    monkeypatch.setattr(module.os, where, fail)
    expected = StoreError if isinstance(failure, OSError) else KeyboardInterrupt
    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(expected, match="No space left" if expected is StoreError else None):
            make().save(target)
    assert [file.name for file in tmp_path.iterdir()] == ["old.safetensors"]
    assert path.read_bytes() == before


def test_where_nothing_can_be_written_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("")
    for path in ("missing/d.safetensors", "file/d.safetensors", "folder", "x" * 300, "folder/..", "."):
        with pytest.raises(StoreError, match=r"expected to write '.*', but: "):
            make().save(tmp_path / path)
    with pytest.raises(StoreError, match=r"expected to write '\.', but: "):
        make().save(".")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder", "inside"]


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("x" * 255)
    assert_same(Descriptor.load(make().save(path)), make())


def test_missing_and_broken_files_are_store_errors(tmp_path):
    whole = full().save(tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-10])
    (tmp_path / "head.safetensors").write_bytes(whole[:20])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("not a descriptor at all, but text")
    for name in ("missing.safetensors", "short.safetensors", "head.safetensors", "empty.safetensors", "."):
        with pytest.raises(StoreError, match=r"expected a descriptor at '.*', but it cannot be read: "):
            Descriptor.load(tmp_path / name)
    with pytest.raises(StoreError, match=r"expected a descriptor at '.*text.safetensors', but it cannot be read: "):
        Descriptor.load(tmp_path / "text.safetensors")


def test_a_foreign_file_is_a_store_error(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"features": torch.zeros(1, 6, 4)}, path)
    with pytest.raises(
        StoreError, match=r"to be written by Descriptor.save \(vitfeats.descriptor/1\), got format None"
    ):
        Descriptor.load(path)
    save_file({"features": torch.zeros(1, 6, 4)}, path, metadata={"format": "pt"})
    with pytest.raises(StoreError, match="got format 'pt'"):
        Descriptor.load(path)


GOOD_FACTS = {
    "format": "vitfeats.descriptor/1",
    "grid": json.dumps({"rows": 2, "cols": 3, "patch": 8, "stride": 8}),
    "frames": json.dumps([{"source_size": [40, 50], "network_size": [16, 24]}]),
    "tap": "key@1",
    "model": "synthetic",
    "heads": "null",
}


@pytest.mark.parametrize(
    "change",
    [
        {"grid": "{"},
        {"grid": "[]"},
        {"grid": '{"rows": 2}'},
        {"grid": json.dumps({"rows": 2, "cols": 2, "patch": 8, "stride": 8})},
        {"frames": "[]"},
        {"frames": "7"},
        {"frames": "[7]"},
        {"tap": "nothing"},
        {"tap": "kye@1"},
        {"heads": "{"},
    ],
)
def test_a_descriptor_with_wrong_facts_is_a_store_error(tmp_path, change):
    path = tmp_path / "d.safetensors"
    save_file({"features": torch.zeros(1, 6, 4)}, path, metadata=GOOD_FACTS)
    assert_same(Descriptor.load(path), make())  # so that it is the change that is refused
    save_file({"features": torch.zeros(1, 6, 4)}, path, metadata={**GOOD_FACTS, **change})
    with as_users_run(), pytest.raises(StoreError, match=r"expected a whole descriptor in '.*', got: "):
        Descriptor.load(path)


def test_a_descriptor_without_features_or_facts_is_a_store_error(tmp_path):
    path = tmp_path / "d.safetensors"
    save_file({"cls": torch.zeros(1, 4)}, path, metadata=GOOD_FACTS)
    with pytest.raises(StoreError, match=r"expected a whole descriptor in '.*', got: 'features'"):
        Descriptor.load(path)
    save_file({"features": torch.zeros(1, 6, 4)}, path, metadata={"format": GOOD_FACTS["format"]})
    with pytest.raises(StoreError, match=r"expected a whole descriptor in '.*', got: 'grid'"):
        Descriptor.load(path)


# Several taps ---------------------------------------------------------------------------------------------------------


def test_descriptors_are_found_by_tap_by_text_and_as_asked():
    nine, eleven = describe(torch.zeros(1, 6, 4), 2, 3, tap="key@9"), describe(torch.ones(1, 6, 4), 2, 3, tap="cls@11")
    ds = Descriptors([("key@-3", nine), ("cls@11", eleven)])
    assert ds["key@9"] is ds["key@-3"] is ds[Tap("key", 9)] is ds[Tap("key", -3)] is nine
    assert list(ds) == [Tap("key", 9), Tap("cls", 11)]
    assert list(ds.values()) == [nine, eleven]
    assert len(ds) == 2
    assert "key@9" in ds
    assert "key@-3" in ds
    assert "key@8" not in ds
    assert "nonsense" not in ds
    assert 9 not in ds
    assert ds.get("key@8") is None
    assert repr(ds) == f"Descriptors(\n  {nine!r}\n  {eleven!r}\n)"


def test_a_tap_that_was_not_asked_for_is_a_key_error():
    ds = Descriptors([("key@9", describe(torch.zeros(1, 6, 4), 2, 3, tap="key@9"))])
    with pytest.raises(KeyError, match="expected one of key@9, got 'key@8'"):
        ds["key@8"]
    with pytest.raises(TapError, match="expected a tap written facet@layer"):
        ds["nonsense"]
