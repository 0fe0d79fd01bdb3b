"""Laws of the geometry between pixels and tokens."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vitfeats.errors import ShapeError
from vitfeats.grid import Frame, PatchGrid, as_pair, check_stride, fit_size

settings.register_profile("grid", deadline=None, max_examples=60)  # a deadline would be a timed assertion
settings.load_profile("grid")

sides = st.integers(1, 12)
steps = st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9)))
grids = st.builds(PatchGrid, rows=sides, cols=sides, patch=steps, stride=steps)
sizes = st.tuples(st.integers(1, 2000), st.integers(1, 2000))
frames = st.builds(Frame, source_size=sizes, network_size=sizes)


@st.composite
def coverings(draw):
    patch = draw(st.integers(1, 16))
    stride = draw(st.sampled_from([s for s in range(1, patch + 1) if patch % s == 0]))
    rows, cols = draw(sides), draw(sides)
    return patch, stride, ((rows - 1) * stride + patch, (cols - 1) * stride + patch)


@given(grids)
def test_centres_find_their_own_token(grid):
    every = torch.arange(grid.tokens)
    assert torch.equal(grid.index_of(grid.centres()), every)
    assert torch.equal(grid.centres_of(every), grid.centres())


@given(grids)
def test_positions_of_centres_are_their_columns_and_rows(grid):
    expected = [[col, row] for row in range(grid.rows) for col in range(grid.cols)]
    assert torch.allclose(grid.positions_of(grid.centres()), torch.tensor(expected, dtype=torch.float32), atol=1e-5)


@given(grids)
def test_tokens_lie_inside_the_network_image_and_touch_its_edges(grid):
    height, width = grid.network_size
    (patch_h, patch_w), centres = as_pair(grid.patch), grid.centres()
    assert centres[:, 0].min() == patch_w / 2
    assert centres[:, 0].max() == width - patch_w / 2
    assert centres[:, 1].min() == patch_h / 2
    assert centres[:, 1].max() == height - patch_h / 2


@given(coverings())
def test_covering_is_what_enumeration_gives(case):
    patch, stride, (height, width) = case
    # Every square of the patch's side that starts at a multiple of the stride and lies inside, row by row.
    tops = [top for top in range(0, height, stride) if top + patch <= height]
    lefts = [left for left in range(0, width, stride) if left + patch <= width]
    grid = PatchGrid.covering((height, width), patch, stride)
    assert (grid.rows, grid.cols, grid.tokens) == (len(tops), len(lefts), len(tops) * len(lefts))
    assert grid.network_size == (height, width)
    expected = [[left + patch / 2, top + patch / 2] for top in tops for left in lefts]
    assert grid.centres().tolist() == expected


@given(coverings(), st.integers(0, 10_000), st.integers(0, 10_000))
def test_index_of_is_the_nearest_centre(case, across, down):
    patch, stride, size = case
    grid = PatchGrid.covering(size, patch, stride)
    # Also points outside, which go to the border.
    point = torch.tensor([[across / 10_000 * 1.4 - 0.2, down / 10_000 * 1.4 - 0.2]]) * torch.tensor(size[::-1])
    distance = (grid.centres() - point).norm(dim=1)
    assert distance[grid.index_of(point)] <= distance.min() * (1 + 1e-4) + 1e-4


@given(frames, st.lists(st.tuples(st.floats(0, 2000), st.floats(0, 2000)), min_size=1, max_size=5))
def test_frames_go_there_and_back(frame, pairs):
    points = torch.tensor(pairs, dtype=torch.float32)
    assert torch.allclose(frame.to_source(frame.to_network(points)), points, rtol=1e-5, atol=1e-3)


@given(frames)
def test_frames_map_corners_to_corners(frame):
    corners = torch.tensor([[0.0, 0.0], [frame.source_size[1], frame.source_size[0]]])
    expected = torch.tensor([[0.0, 0.0], [frame.network_size[1], frame.network_size[0]]])
    assert torch.allclose(frame.to_network(corners), expected, rtol=1e-5)


@given(sizes, st.integers(1, 40), st.integers(1, 600))
def test_the_shorter_side_is_snapped_to_the_nearest_multiple(source, patch, size):
    assume(size >= patch)
    fitted = fit_size(source, size, patch)
    shorter = source.index(min(source))
    assert all(side % patch == 0 for side in fitted)
    # Exactly, and the same for every source: half a patch is rounded up.
    assert fitted[shorter] == (2 * size + patch) // (2 * patch) * patch
    # The other side keeps the aspect as nearly as whole patches allow.
    wanted = size * source[1 - shorter] / source[shorter]
    assert abs(fitted[1 - shorter] - wanted) <= patch / 2 * (1 + 1e-9)


def test_half_a_patch_is_rounded_up_whatever_the_source():
    # 12 is half-way between 8 and 16; in floating point 12 / 188 * 188 is less than 12.
    assert {fit_size((side, side), 12, 8) for side in range(20, 700)} == {(16, 16)}


@given(sizes, st.integers(1, 40), st.tuples(st.integers(1, 600), st.integers(1, 600)))
def test_a_size_of_two_sides_gives_the_aspect_up(source, patch, size):
    assume(min(size) >= patch)
    assert fit_size(source, size, patch) == tuple((2 * side + patch) // (2 * patch) * patch for side in size)


@given(sizes, st.integers(1, 20))
def test_a_turned_image_has_a_turned_size(source, patches):
    size = 14 * patches
    assert fit_size(source, size, 14) == fit_size(source[::-1], size, 14)[::-1]


@pytest.mark.parametrize("size", [15, (15, 300), (300, 3), 0, -4])
def test_a_size_below_one_patch_is_refused(size):
    with pytest.raises(ShapeError, match=r"expected a size of at least one patch \(16 pixels\), got .*; try size=224"):
        fit_size((300, 451), size, 16)


@pytest.mark.parametrize("stride", [0, -2, 3, 5, 16, 32])
def test_a_stride_that_does_not_divide_the_patch_is_refused_with_those_that_do(stride):
    with pytest.raises(
        ShapeError,
        match=rf"expected a stride that divides the patch size 14, got {stride}; try one of \[1, 2, 7, 14\]",
    ):
        check_stride(14, stride)


@given(st.integers(1, 64))
def test_every_divisor_is_a_stride(patch):
    for stride in range(1, patch + 1):
        if patch % stride == 0:
            check_stride(patch, stride)
        else:
            with pytest.raises(ShapeError, match="divides the patch size"):
                check_stride(patch, stride)


@pytest.mark.parametrize("size", [(15, 32), (32, 15), (30, 32), (32, 30)])
def test_covering_refuses_what_it_cannot_cover(size):
    with pytest.raises(ShapeError, match=r"at least one patch \(16\) plus whole strides \(4\), got"):
        PatchGrid.covering(size, 16, 4)


@pytest.mark.parametrize("change", [{"rows": 0}, {"cols": 0}, {"patch": 0}, {"stride": (8, 0)}, {"patch": (-1, 8)}])
def test_an_empty_grid_is_refused(change):
    with pytest.raises(ShapeError, match="expected rows, cols, patch and stride of at least 1, got PatchGrid"):
        PatchGrid(**{"rows": 2, "cols": 2, "patch": 8, "stride": 8, **change})


@pytest.mark.parametrize("sizes_", [((0, 4), (4, 4)), ((4, 4), (4, -1))])
def test_an_empty_frame_is_refused(sizes_):
    with pytest.raises(ShapeError, match=r"expected sizes \(height, width\) of at least 1 pixel, got Frame"):
        Frame(*sizes_)
