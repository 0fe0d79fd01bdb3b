"""Shards: what was written comes back, the same images give the same bytes, and no damage passes unseen."""

import itertools
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from synthetic import random_descriptor
from torch import Tensor

from vitfeats.apps.bulk.shards import check_shard, read_header, read_image, write_shard
from vitfeats.descriptor import Descriptor, Descriptors
from vitfeats.errors import ConfigError, StoreError
from vitfeats.grid import Frame, PatchGrid

SETTINGS = {"model": "synthetic", "taps": ["key@1", "token@0"], "size": [48, 32], "stride": None}
PARTS = ("features", "cls", "registers")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_image(seed: int, rows: int = 3, cols: int = 2) -> Descriptors:
    """Return two taps of an image, each with a grid of its own; only one has heads, CLS and registers."""
    key = random_descriptor(
        seed,
        rows,
        cols,
        6,
        stride=4,
        source=(70, 51),
        cls=random(seed + 100, 1, 6),
        registers=random(seed + 200, 1, 4, 6),
        heads=3,
    )
    grid = PatchGrid(rows + 1, cols, (8, 16), (4, 8), (-0.5, 1.5))
    frame = Frame((31, 99), grid.network_size)
    token = Descriptor(
        random(seed + 300, 1, grid.tokens, 5), grid, (frame,), replace(key.tap, facet="token", layer=0), "synthetic"
    )
    return Descriptors([("key@1", key), ("token@0", token)])


def same_facts(found: Descriptors, written: Descriptors) -> bool:
    """Tell whether all but the numbers is the same, types among it."""
    return list(found) == list(written) and all(
        (d.grid, d.frames, d.tap, d.model, d.heads) == (w.grid, w.frames, w.tap, w.model, w.heads)
        and repr((d.grid, d.frames)) == repr((w.grid, w.frames))
        and [getattr(d, part) is None for part in PARTS] == [getattr(w, part) is None for part in PARTS]
        for d, w in zip(found.values(), written.values(), strict=True)
    )


def numbers(descriptors: Descriptors) -> list[Tensor]:
    return [value for d in descriptors.values() for part in PARTS if (value := getattr(d, part)) is not None]


def same(found: Descriptors, written: Descriptors) -> bool:
    pairs = zip(numbers(found), numbers(written), strict=True)
    return same_facts(found, written) and all(torch.equal(one, other) for one, other in pairs)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "part.safetensors"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_come_back_as_their_type_rounds_them(path, dtype):
    written = [of_image(0), of_image(1, 2, 5), of_image(2, 1, 1)]
    write_shard(path, list(zip("abc", written, strict=True)), settings=SETTINGS, dtype=dtype)
    for position, descriptors in enumerate(written):
        found = read_image(path, position)
        assert same_facts(found, descriptors)
        for one, other in zip(numbers(found), numbers(descriptors), strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other.to(getattr(torch, dtype)).float())


def test_int8_is_off_by_at_most_half_a_step_of_each_token(path):
    descriptors = of_image(3)
    key = descriptors["key@1"]
    sizes = 10.0 ** torch.arange(-3, 3)[:, None]  # tokens of very different sizes, whose steps must differ too
    key = replace(key, features=key.features * sizes)
    descriptors = Descriptors([("key@1", key), ("token@0", descriptors["token@0"])])
    write_shard(path, [("a", descriptors)], settings=SETTINGS, dtype="int8")
    found = read_image(path, 0)
    assert same_facts(found, descriptors)
    for one, other in zip(numbers(found), numbers(descriptors), strict=True):
        half_a_step = other.abs().amax(-1, keepdim=True) / 127 / 2
        assert one.dtype == torch.float32
        assert ((one - other).abs() <= half_a_step * 1.0001).all()
        assert not torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_tokens_of_zeros_stay_zeros(path, dtype):
    d = random_descriptor(0, cls=torch.zeros(1, 8))
    d = replace(d, features=torch.cat([torch.zeros(1, 1, 8), d.features[:, 1:]], 1))
    write_shard(path, [("a", Descriptors([("key@1", d)]))], settings=SETTINGS, dtype=dtype)
    found = read_image(path, 0)["key@1"]
    assert found.cls is not None
    assert not found.cls.any()
    assert not found.features[:, 0].any()
    assert found.features[:, 1:].any(-1).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_large_values_do_not_become_infinite(path, dtype):
    features = torch.tensor([[[3.4e38, -3.4e38, 1.0], [65504.0, 65520.0, -65520.0]]])
    d = replace(random_descriptor(0, 1, 2, 3), features=features)
    write_shard(path, [("a", Descriptors([("key@1", d)]))], settings=SETTINGS, dtype=dtype)
    found = read_image(path, 0)["key@1"].features
    assert found.isfinite().all()
    assert torch.equal(found.sign()[features.abs() > 1], features.sign()[features.abs() > 1])
    if dtype == "float16":
        assert found.tolist() == [[[65504.0, -65504.0, 1.0], [65504.0, 65504.0, -65504.0]]]


def test_features_of_other_types_and_layouts_are_written_as_well(path):
    d = random_descriptor(4)
    turned = replace(d, features=d.features.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_())
    half = replace(d, features=d.features.half())
    write_shard(
        path,
        [("turned", Descriptors([("key@1", turned)])), ("half", Descriptors([("key@1", half)]))],
        settings=SETTINGS,
        dtype="float32",
    )
    assert torch.equal(read_image(path, 0)["key@1"].features, d.features)
    assert torch.equal(read_image(path, 1)["key@1"].features, d.features.half().float())
    assert check_shard(path) is None


def test_no_registers_are_not_the_same_as_none(path):
    d = random_descriptor(5, registers=torch.zeros(1, 0, 8))
    for dtype in ("float32", "int8"):
        write_shard(path, [("a", Descriptors([("key@1", d)]))], settings=SETTINGS, dtype=dtype)
        found = read_image(path, 0)["key@1"].registers
        assert found is not None
        assert found.shape == (1, 0, 8)
        assert check_shard(path) is None


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_same_images_give_the_same_bytes(path, tmp_path, dtype):
    def written(name: str, seed: int = 0, **facts) -> bytes:
        images = [("a", of_image(seed)), ("b", of_image(1, 4, 4))]
        write_shard(tmp_path / name, images, **{"settings": SETTINGS, "dtype": dtype, **facts})
        return (tmp_path / name).read_bytes()

    assert len({written(f"{time}") for time in range(8)}) == 1
    assert written("reversed", settings=dict(reversed(SETTINGS.items()))) == written("0")
    assert written("other numbers", seed=7) != written("0")
    assert written("other broken", broken={"c": "why"}) != written("0")


def test_other_processes_write_the_same_bytes(tmp_path):
    # Orders that are drawn once a process, such as those of hashes, show only here.
    code = (
        "import sys; from pathlib import Path; from test_bulk_shards import SETTINGS, of_image;"
        "from vitfeats.apps.bulk.shards import write_shard;"
        "write_shard(Path(sys.argv[1]), [('a', of_image(0))], settings=SETTINGS, broken={'b': 'why'})"
    )
    places = [str(Path(__file__).parent), *sys.path]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {places!r}; {code}", tmp_path / "there"]
    subprocess.run(command, check=True)
    write_shard(tmp_path / "here", [("a", of_image(0))], settings=SETTINGS, broken={"b": "why"})
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


def test_the_header_has_ids_settings_and_what_was_broken(path):
    odd = ["a/b.png", "zeile\nzwei", 'quoted "name"', "日本 é \u2028", "byte \udcff", ""]
    broken = {'no\n"picture"': "expected an image, got …", "x": ""}
    write_shard(path, [(name, of_image(0)) for name in odd], settings=SETTINGS, broken=broken)
    header = read_header(path)
    assert header.ids == odd
    assert header.settings == SETTINGS
    assert header.broken == broken
    assert check_shard(path) is None
    assert same_facts(read_image(path, 3, header), of_image(0))


def test_a_shard_of_broken_images_alone_is_a_shard(path):
    for broken in ({}, {"a": "cut off"}):
        write_shard(path, [], settings=SETTINGS, broken=broken)
        assert check_shard(path) is None
        assert read_header(path).ids == []
        assert read_header(path).broken == broken


def test_more_than_ten_images_keep_their_places(path):
    written = [of_image(seed, 1, 1) for seed in range(12)]
    write_shard(path, [(f"{seed}", one) for seed, one in enumerate(written)], settings=SETTINGS, dtype="float32")
    header = read_header(path)
    assert all(same(read_image(path, position, header), one) for position, one in enumerate(written))
    assert check_shard(path) is None


def test_only_the_bytes_of_the_image_that_is_asked_for_matter(path):
    written = [of_image(0), of_image(1), of_image(2)]
    write_shard(path, list(zip("abc", written, strict=True)), settings=SETTINGS, dtype="float32")
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = read_header(path)
    places = [data.index(numbers(one)[0].numpy().tobytes(), start) for one in written]
    for damaged, place in enumerate(places):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        kept = [same(read_image(path, position, header), one) for position, one in enumerate(written)]
        assert kept == [position != damaged for position in range(3)]
        assert f"the features of '{'abc'[damaged]}' are not those that were written" in str(check_shard(path))


def test_taps_come_back_in_the_order_in_which_they_were_asked(path):
    written = of_image(0)
    turned = Descriptors([(str(tap), written[tap]) for tap in reversed(list(written))])
    write_shard(path, [("a", written), ("b", turned)], settings=SETTINGS)
    assert [list(map(str, read_image(path, position))) for position in (0, 1)] == [
        ["key@1", "token@0"],
        ["token@0", "key@1"],
    ]


def test_a_position_that_is_not_there_is_no_image(path):
    write_shard(path, [("a", of_image(0))], settings=SETTINGS)
    for position in (1, -1):
        with pytest.raises((IndexError, StoreError)):
            read_image(path, position)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, bytes]:
    """A shard and its bytes; each use writes what it needs to the path."""
    path = tmp_path_factory.mktemp("whole") / "part.safetensors"
    images = [("a", of_image(0, 1, 2)), ("é", of_image(1, 1, 1))]
    write_shard(path, images, settings=SETTINGS, dtype="int8", broken={"ß": "why"})
    return path, path.read_bytes()


def known(path: Path) -> tuple[object, ...]:
    header = read_header(path)
    images = [read_image(path, position) for position in range(len(header.images))]
    facts = [(d.grid, d.frames, d.tap, d.model, d.heads) for image in images for d in image.values()]
    return header, facts, [value.tolist() for image in images for value in numbers(image)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_found_or_changes_nothing(whole, data):
    path, content = whole
    path.write_bytes(content)
    before = known(path)
    # Half of the positions are in the header, which has its own ways to go wrong.
    start = 8 + int.from_bytes(content[:8], "little")
    ranges = st.integers(0, start - 1) | st.integers(start, len(content) - 1)
    place, bit = data.draw(ranges, "byte"), data.draw(st.integers(0, 7), "bit")
    path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
    assert check_shard(path) is not None or known(path) == before
    with suppress(StoreError):  # what is read without a check may be wrong, but raises no other error
        known(path)


def test_a_shard_that_was_cut_off_anywhere_is_found(whole):
    path, content = whole
    for length in itertools.chain(range(40), range(40, len(content), 7), range(len(content) - 9, len(content))):
        path.write_bytes(content[:length])
        assert "expected a whole shard" in str(check_shard(path)), length
        with pytest.raises(StoreError, match="cannot be read"):
            read_header(path)
        with pytest.raises(StoreError, match="cannot be read"):
            read_image(path, 0)
    path.write_bytes(content + b"\0")
    assert check_shard(path) is not None


def test_what_is_no_shard_is_refused(path, tmp_path):
    with pytest.raises(StoreError, match="expected a whole shard at '.*part.safetensors', but it cannot be read"):
        read_header(path)
    path.write_bytes(b"not a shard at all, whatever its name says")
    assert "it cannot be read" in str(check_shard(path))
    save_file({"x": torch.zeros(2)}, path)
    told = r"expected '.*part.safetensors' to be a shard \(vitfeats.store/1\), got a file of another kind"
    for read in (read_header, lambda path: read_image(path, 0)):
        with pytest.raises(StoreError, match=told):
            read(path)
    random_descriptor(0).save(path)
    with pytest.raises(StoreError, match="to be a shard"):
        read_header(path)
    assert check_shard(tmp_path) is not None


def test_a_header_that_was_edited_is_refused(path):
    write_shard(path, [("a", of_image(0))], settings=SETTINGS, broken={"b": "why"})
    edited = path.read_bytes().replace(b"why", b"Why")
    path.write_bytes(edited)
    with pytest.raises(
        StoreError, match="expected the header of '.*' as it was written, but it was changed or damaged"
    ):
        read_header(path)
    assert "changed or damaged" in str(check_shard(path))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("dtype", ["float64", "", "FLOAT16"])
def test_an_unknown_type_is_refused(path, dtype):
    with pytest.raises(ConfigError, match=f"expected dtype 'float32', 'float16', 'bfloat16', 'int8', got '{dtype}'"):
        write_shard(path, [("a", of_image(0))], settings=SETTINGS, dtype=dtype)
    assert not path.exists()


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(StoreError, match=r"expected to write '.*none/part', but"):
        write_shard(tmp_path / "none" / "part", [], settings=SETTINGS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="expected to write"):
        write_shard(tmp_path / "folder", [], settings=SETTINGS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
