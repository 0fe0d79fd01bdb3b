"""Search over a store against all vectors in one array, its index against the search that reads everything."""

import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import as_users_run, describe, random_descriptor
from torch import Tensor

from vitfeats.apps.bulk import create_store, extract, write_shard
from vitfeats.apps.bulk import index as module
from vitfeats.apps.bulk.search import Hits, build_index, open_index, search_images, search_patches
from vitfeats.apps.bulk.store import Store
from vitfeats.descriptor import Descriptors
from vitfeats.errors import ConfigError, MissingDependencyError, ShapeError, StoreError

faiss = pytest.importorskip("faiss", reason="faiss is not installed; the extra `index` has it")

DIM = 6
GRIDS = [(2, 3), (4, 4), (1, 5), (3, 2), (1, 1)]
COUNT = 17
BROKEN = ("03.png", "08.png", "16.png")
Images = dict[str, Descriptors]
Hit = tuple[str, float, tuple[float, float]]


def of_image(seed: int) -> Descriptors:
    """Return two taps: tokens on one of several grids, and one vector."""
    rows, cols = GRIDS[seed % len(GRIDS)]
    key = random_descriptor(seed, rows, cols, DIM, stride=4 + 4 * (seed % 2), source=(70 + seed, 51))
    vector = random_descriptor(seed + 1000, 1, 1, 4, tap="cls@2")
    return Descriptors([("key@1", key), ("cls@2", vector)])


def of_features(features: Tensor, rows: int, cols: int) -> Descriptors:
    return Descriptors([("key@1", describe(features.float()[None], rows, cols))])


IMAGES = {f"{seed:02}.png": of_image(seed) for seed in range(COUNT)}


def make(
    folder: Path, images: Images, per_shard: int = 5, dtype: str = "float32", broken: Sequence[str] = BROKEN
) -> Store:
    taps = [str(tap) for tap in next(iter(images.values()))]
    store = create_store(folder, list(images), {"model": "synthetic", "taps": taps}, per_shard)
    for number in range(store.shards):
        names = store.ids_of(number)
        whole = [(name, images[name]) for name in names if name not in broken]
        bad = {name: "it is cut off" for name in names if name in broken}
        write_shard(store.shard_path(number), whole, settings=store.settings, dtype=dtype, broken=bad)  # type: ignore[arg-type]
    return Store(folder)


@pytest.fixture
def store(tmp_path) -> Store:
    """A store of 17 images, three of them broken, in 4 shards."""
    return make(tmp_path / "store", IMAGES)


def one(vector: np.ndarray) -> np.ndarray:
    length = np.sqrt((vector**2).sum())
    return vector / length if length else vector


def naive(
    store: Store, asked: Tensor, k: int, *, tap: str = "key@1", patches: bool = False, per_image: int | None = 1
) -> list[list[Hit]]:
    """Return the hits of each query from all vectors of a store, a pair at a time in float64."""
    found = []
    broken = store.broken()
    for query in asked.double().numpy():
        rows: list[Hit] = []
        for name in store.ids:
            if name in broken:
                continue
            d = store[name][tap]
            tokens = d.features[0].double().numpy()
            if not patches:
                rows.append((name, float(np.dot(one(query), one(tokens.mean(0)))), (0, 0)))
                continue
            (height, width), (net_h, net_w) = d.frames[0].source_size, d.frames[0].network_size
            here = []
            for number, token in enumerate(tokens):
                row, col = divmod(number, d.grid.cols)
                x, y = (col * d.grid.stride + d.grid.patch / 2, row * d.grid.stride + d.grid.patch / 2)
                here.append((name, float(np.dot(one(query), one(token))), (x * width / net_w, y * height / net_h)))
            rows += sorted(here, key=lambda hit: -hit[1])[:per_image]
        found.append(sorted(rows, key=lambda hit: -hit[1])[:k])
    return found


def assert_hits(found: Hits, expected: list[list[Hit]], tolerance: float = 1e-6) -> None:
    assert found.ids == [[name for name, _, _ in row] for row in expected]
    assert np.allclose(found.scores, [[score for _, score, _ in row] for row in expected], atol=tolerance)
    if found.points is not None:
        assert np.allclose(found.points, [[point for _, _, point in row] for row in expected], atol=1e-3)


def same(one: Hits, other: Hits) -> bool:
    points = one.points is None if other.points is None else torch.equal(one.points, other.points)
    return one.ids == other.ids and torch.equal(one.scores, other.scores) and points


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("per_shard", [1, 5, 100])
def test_images_are_those_of_the_highest_cosine_similarity(tmp_path, dtype, per_shard):
    store = make(tmp_path, IMAGES, per_shard, dtype)
    queries = random(1, 7, DIM)
    found = search_images(store, queries, k=6)
    assert found.points is None
    assert (len(found), found.scores.dtype, found.scores.shape) == (7, torch.float32, (7, 6))
    assert repr(found) == "Hits(7 queries, 6 images each)"
    assert_hits(found, naive(store, queries, 6))


def test_a_tap_of_one_vector_is_that_vector(store):
    queries = random(2, 3, 4)
    assert_hits(search_images(store, queries, tap="cls@2", k=5), naive(store, queries, 5, tap="cls@2"))


def test_long_tokens_count_for_more_in_the_mean(tmp_path):
    features = torch.tensor([[10.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    store = make(tmp_path, {"a": of_features(features, 1, 3)})
    found = search_images(store, torch.tensor([[1.0, 0.0]]))
    assert found.scores.item() == pytest.approx(10 / np.hypot(10, 2))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_an_image_is_its_own_best_hit(tmp_path, dtype):
    store = make(tmp_path, IMAGES, 5, dtype)
    for name in store.ids:
        if name not in BROKEN:
            found = search_images(store, store[name]["key@1"], k=1)
            assert found.ids == [[name]]
            assert found.scores.item() == pytest.approx(1, abs=1e-6)


def test_queries_come_as_one_descriptor_as_several_or_as_vectors(store):
    batch = random_descriptor(3, 2, 2, DIM, batch=3)
    expected = search_images(store, batch.features.double().mean(1), k=4)
    assert len(expected) == 3
    assert same(search_images(store, batch, k=4), expected)
    assert same(search_images(store, [batch[0], batch[1:]], k=4), expected)
    other = random_descriptor(4, 3, 5, DIM)
    assert search_images(store, [other, batch], k=4).ids[1:] == expected.ids
    assert search_images(store, 1e-3 * batch.features.mean(1), k=4).ids == expected.ids
    assert not search_images(store, batch.features.mean(1).requires_grad_()).scores.requires_grad


def test_fewer_are_returned_where_there_are_fewer(store):
    found = search_images(store, random(5, 2, DIM), k=1000)
    assert found.scores.shape == (2, COUNT - len(BROKEN))
    for names in found.ids:
        assert sorted(names) == [name for name in IMAGES if name not in BROKEN]
    assert (found.scores.diff(dim=1) <= 0).all()


def test_a_store_without_images_has_no_hits(tmp_path):
    for folder, images in {"none": {}, "broken": dict.fromkeys(BROKEN)}.items():
        store = create_store(tmp_path / folder, list(images), {"model": "synthetic", "taps": ["key@1"]}, 2)
        for number in range(store.shards):
            broken = dict.fromkeys(store.ids_of(number), "it is cut off")
            write_shard(store.shard_path(number), [], settings=store.settings, broken=broken)
        found = search_images(store, random(5, 2, DIM))
        assert found.ids == [[], []]
        assert found.scores.shape == (2, 0)
        assert search_patches(store, random_descriptor(0, dim=DIM), [(1, 1)]).points.shape == (1, 0, 2)
        for kind in ("flat", "auto"):
            with pytest.raises(
                StoreError, match="expected images that could be read and finite vectors in .* got none"
            ):
                build_index(store, kind=kind)


# Patches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_image", [1, 2, None])
@pytest.mark.parametrize(("dtype", "per_shard"), [("float32", 1), ("float16", 5), ("int8", 100)])
def test_patches_are_those_of_the_highest_cosine_similarity(tmp_path, per_image, dtype, per_shard):
    store = make(tmp_path, IMAGES, per_shard, dtype)
    d = random_descriptor(50, 4, 3, DIM, source=(90, 60))
    points = [(0.0, 0.0), (31.5, 44.0), (60.0, 90.0)]
    for k in (1, 7, 20):
        found = search_patches(store, d, points, k=k, per_image=per_image)
        assert_hits(found, naive(store, d.at(points)[0], k, patches=True, per_image=per_image))
    assert repr(found) == f"Hits(3 queries, {len(found.ids[0])} patches each)"


def test_a_clicked_patch_finds_itself_at_the_centre_of_its_token(store):
    for name in store.ids:
        if name in BROKEN:
            continue
        d = store[name]["key@1"]
        centres = d.frames[0].to_source(d.grid.centres())
        found = search_patches(store, d, centres, k=1)
        assert found.ids == [[name]] * d.grid.tokens
        assert torch.allclose(found.points[:, 0], centres)
        assert torch.allclose(found.scores, torch.ones(d.grid.tokens, 1), atol=1e-5)


def test_an_image_has_no_more_hits_than_are_asked_for(store):
    d = IMAGES["01.png"]["key@1"]
    for per_image in (1, 2, 3, 100):
        (names,) = search_patches(store, d, [(20, 20)], k=1000, per_image=per_image).ids
        tokens = {name: IMAGES[name]["key@1"].grid.tokens for name in IMAGES if name not in BROKEN}
        assert {name: names.count(name) for name in tokens} == {name: min(n, per_image) for name, n in tokens.items()}


# The way through the store --------------------------------------------------------------------------------------------


def test_hits_do_not_depend_on_the_size_of_blocks_and_shards(tmp_path):
    # Of each image there are three, not beside each other, so that everything ties.
    images = {f"{turn}-{name}": ds for turn in "cab" for name, ds in IMAGES.items()}
    queries, d, points = random(6, 3, DIM), random_descriptor(51, 3, 3, DIM), [(3, 3), (20, 14)]
    kept: list[Hits] = []
    for per_shard in (1, 4, 17, 1000):
        store = make(tmp_path / str(per_shard), images, per_shard, broken=())
        for chunk in (1, 2, 7, 20, None):
            found = [search_images(store, queries, k=8, chunk=chunk)]
            found += [search_patches(store, d, points, k=8, per_image=most, chunk=chunk) for most in (1, 2, None)]
            kept = kept or found
            assert all(same(one, other) for one, other in zip(found, kept, strict=True)), (per_shard, chunk)
    order = list(images)
    for names in kept[0].ids:
        for first, second in ((0, 1), (1, 2), (3, 4), (4, 5)):
            assert names[first][2:] == names[second][2:]
            assert order.index(names[first]) < order.index(names[second])


def test_one_shard_is_in_memory_at_a_time(store, monkeypatch):
    alive: list[weakref.ref] = []
    read: list[int] = []
    rows = Store.rows

    def watched(self, number, tap):
        assert not [one for one in alive if one() is not None]
        found = rows(self, number, tap)
        alive.extend([weakref.ref(found), weakref.ref(found.vectors)])
        read.append(number)
        return found

    monkeypatch.setattr(Store, "rows", watched)
    search_images(store, random(7, 3, DIM), k=5)
    search_patches(store, IMAGES["01.png"]["key@1"], [(1, 1), (9, 9)], k=5)
    assert read == 2 * [0, 1, 2, 3]
    build_index(store, of="patches", kind="flat")
    assert read == 3 * [0, 1, 2, 3]
    build_index(store)
    assert read == 5 * [0, 1, 2, 3], "once to see how the vectors are spread"


def test_what_is_not_finite_is_no_hit_and_zero_has_score_zero(tmp_path):
    eye = torch.eye(3)
    images = {
        "nan": of_features(torch.stack([eye[0], torch.full((3,), torch.nan)]), 1, 2),
        "inf": of_features(torch.stack([eye[0] * torch.inf, eye[1]]), 2, 1),
        "zero": of_features(torch.zeros(2, 3), 1, 2),
        "good": of_features(torch.stack([eye[0], 3 * eye[0]]), 1, 2),
        "opposite": of_features(torch.stack([-eye[0], -eye[0]]), 1, 2),
        "tiny": of_features(1e-6 * torch.stack([eye[0], eye[0]]), 1, 2),
        "huge": of_features(3e38 * torch.stack([eye[0], eye[0]]), 1, 2),
    }
    store = make(tmp_path, images, 2)
    indexes = [None, build_index(store, path=tmp_path / "one"), build_index(store, of="patches", path=tmp_path / "two")]
    for index in indexes[:2]:
        found = search_images(store, eye[:1], k=100, index=index)
        assert found.ids == [["good", "tiny", "huge", "zero", "opposite"]]
        assert torch.allclose(found.scores, torch.tensor([[1.0, 1, 1, 0, -1]]))
        assert torch.equal(search_images(store, torch.zeros(1, 3), k=100, index=index).scores, torch.zeros(1, 5))
    for index in indexes[::2]:
        found = search_patches(store, images["good"]["key@1"], [(4, 4)], k=100, per_image=None, index=index)
        assert found.ids == [
            ["nan", *2 * ["good"], *2 * ["tiny"], *2 * ["huge"], "inf", *2 * ["zero"], *2 * ["opposite"]]
        ]
        assert found.scores.isfinite().all()


def test_missing_shards_are_told(store):
    store.shard_path(2).unlink()
    message = "expected a whole store, but in '.*' 1 of 4 shards are missing; run the extraction again"
    for search in (
        lambda: search_images(store, random(0, 1, DIM)),
        lambda: search_patches(store, IMAGES["00.png"]["key@1"], [(1, 1)]),
        lambda: build_index(store),
    ):
        with pytest.raises(StoreError, match=message):
            search()


def test_queries_that_do_not_fit_are_refused(store):
    d = IMAGES["00.png"]["key@1"]
    wrong = random_descriptor(0, dim=5)
    index = open_index(store, build_index(store))
    message = (
        r"expected queries of 6 channels, as key@1 of the store has, got 5; make them with its model \(synthetic\)"
    )
    for given in (None, index):
        with pytest.raises(ShapeError, match=message):
            search_images(store, wrong, index=given)
        with pytest.raises(ShapeError, match="expected finite queries, got NaN or infinity"):
            search_images(store, torch.full((1, DIM), torch.nan), index=given)
    with pytest.raises(ShapeError, match=message):
        search_patches(store, wrong, [(1, 1)])
    with pytest.raises(ShapeError, match=r"expected queries with as many channels, got \[5, 6\]"):
        search_images(store, [d, wrong])
    with pytest.raises(ShapeError, match=r"expected vectors \(n, dim\), one a query, got shape \(6,\)"):
        search_images(store, torch.zeros(DIM))
    for nothing in ([], torch.zeros(0, DIM)):
        with pytest.raises(ShapeError, match="expected at least one query, got none"):
            search_images(store, nothing)
    with pytest.raises(ShapeError, match="expected at least one query, got none"):
        search_patches(store, d, torch.zeros(0, 2))
    with pytest.raises(ShapeError, match="expected a descriptor of one image, got a batch of 2"):
        search_patches(store, random_descriptor(0, dim=DIM, batch=2), [(1, 1)])
    with pytest.raises(ShapeError, match="inside the image"):
        search_patches(store, d, [(1000, 1)])


def test_settings_out_of_range_are_refused(store):
    d = IMAGES["00.png"]["key@1"]
    for name in ("k", "chunk", "probes", "per_image"):
        with pytest.raises(ConfigError, match=f"expected {name} of at least 1, got 0"):
            search_patches(store, d, [(1, 1)], **{name: 0})
    for name in ("k", "chunk", "probes"):
        with pytest.raises(ConfigError, match=f"expected {name} of at least 1, got -3"):
            search_images(store, d, **{name: -3})
    with pytest.raises(ConfigError, match=r"expected a tap of the store \(key@1, cls@2\), got 'key@3'"):
        search_images(store, d, tap="key@3")


def test_hits_that_do_not_fit_each_other_are_refused():
    with as_users_run(), pytest.raises(ShapeError, match=r"as scores has \(1, 2\), got 1 lists of \[1\]"):
        Hits([["a"]], torch.zeros(1, 2))
    with as_users_run(), pytest.raises(ShapeError, match=r"as scores has \(1, 2\), got 2 lists of \[2\]"):
        Hits([["a", "b"], ["a", "b"]], torch.zeros(1, 2))


def test_images_that_were_extracted_are_found(mini, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    y, x = np.mgrid[:120, :160] / 20
    for number in range(5):
        waves = np.stack([np.sin((number + 1) * x), np.cos(number * y), np.sin(x * y + number)], -1)
        Image.fromarray(((waves + 1) * 127).astype(np.uint8)).save(folder / f"{number}.png")
    extract(folder, tmp_path / "store", model=mini, taps=["key@1", "cls@1"], per_shard=2, batch_size=2)
    store = Store(tmp_path / "store")
    for name in store.ids:
        ds = mini(Image.open(folder / name), ["key@1", "cls@1"])
        for tap in ("key@1", "cls@1"):
            found = search_images(store, ds[tap], tap=tap, k=3)
            assert found.ids[0][0] == name
            assert found.scores[0, 0] == pytest.approx(1, abs=1e-3), "the store is in half precision"
            assert (found.scores[0, 1:] < found.scores[0, 0]).all()
    d = mini(Image.open(folder / "2.png"), "key@1")
    centre = d.frames[0].to_source(d.grid.centres())[10:11]
    hits = search_patches(store, d, centre, k=1)
    assert hits.ids == [["2.png"]]
    assert torch.allclose(hits.points[0], centre)


# Indexes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", [False, True])
def test_a_flat_index_finds_what_reading_everything_finds(store, opened):
    given = {of: build_index(store, "key@1", of=of) for of in ("images", "patches")}
    assert given["images"] == store.path / "indexes" / "images-key@1"
    if opened:
        given = {of: open_index(store, path) for of, path in given.items()}
        assert repr(given["patches"]).startswith("Index(96 patches, key@1 of '")
    queries, d, points = random(8, 6, DIM), random_descriptor(52, 4, 4, DIM), [(4, 4), (11, 23), (30, 17)]
    for k in (1, 5, 1000):
        exact, found = search_images(store, queries, k=k), search_images(store, queries, k=k, index=given["images"])
        assert found.ids == exact.ids
        assert torch.allclose(found.scores, exact.scores, atol=1e-6)
        for per_image in (1, 2, None):
            exact = search_patches(store, d, points, k=k, per_image=per_image)
            found = search_patches(store, d, points, k=k, per_image=per_image, index=given["patches"])
            assert found.ids == exact.ids
            assert torch.equal(found.points, exact.points)
            assert torch.allclose(found.scores, exact.scores, atol=1e-6)


def clustered(folder: Path, count: int = 3000, dim: int = 16) -> tuple[Store, Tensor]:
    """Return a store of one vector an image, around 150 centres, and vectors of the same kind to ask for."""
    centres = random(9, 150, dim)
    vectors = centres[torch.arange(count + 50) % 150] + 0.6 * random(10, count + 50, dim)
    images = {str(number): of_features(vectors[number, None], 1, 1) for number in range(count)}
    return make(folder, images, 1000, "float16"), vectors[count:]


def recall(found: Hits, exact: Hits) -> float:
    shares = [len(set(one) & set(other)) / len(other) for one, other in zip(found.ids, exact.ids, strict=True)]
    return float(np.mean(shares))


def test_an_index_of_lists_finds_most_and_more_with_more_probes(tmp_path):
    store, queries = clustered(tmp_path / "store")
    index = open_index(store, build_index(store, kind="ivf"))
    assert index.faiss.nlist == 3000 // 39
    assert index.faiss.code_size == 2 * 16
    exact = search_images(store, queries)
    found = {probes: search_images(store, queries, index=index, probes=probes) for probes in (1, 8, 77)}
    shares = [recall(one, exact) for one in found.values()]
    assert shares == sorted(shares)
    assert shares[0] < 0.9, "one list is too few, or nothing is left to measure"
    assert shares[1] > 0.95
    assert shares[2] > 0.99
    assert torch.allclose(found[77].scores, exact.scores, atol=1e-3), "rows are in half precision"
    # No list has so many images: more lists are looked into, until there are enough.
    many = search_images(store, queries[:2], k=1000, index=index, probes=1)
    assert many.scores.shape == (2, 1000)
    assert recall(many, search_images(store, queries[:2], k=1000)) > 0.8
    assert same(search_images(store, queries, index=index, probes=10_000), found[77])


def test_the_kind_follows_from_the_number_of_rows(tmp_path, monkeypatch):
    store, queries = clustered(tmp_path / "store", 400)
    assert isinstance(open_index(store, build_index(store)).faiss, faiss.IndexFlat)
    monkeypatch.setattr(module, "FEW", 399)
    assert open_index(store, build_index(store)).faiss.nlist == 400 // 39
    assert isinstance(open_index(store, build_index(store, kind="flat")).faiss, faiss.IndexFlat)
    coded = open_index(store, build_index(store, kind="PCAR8,IVF4,SQ8"))
    exact, found = (search_images(store, queries, index=index, probes=2) for index in (None, coded))
    assert 0.3 < recall(found, exact) < 1
    assert same(search_images(store, queries, index=coded, probes=2), found)


def test_an_index_goes_on_until_there_are_enough_images(tmp_path):
    # An image of 400 tokens, each more similar than any token of the others.
    near = torch.tensor([1.0, 0, 0]) + 0.01 * random(11, 400, 3)
    others = {f"{n}": of_features(torch.tensor([1.0, 1.0 + n, 0]).expand(2, -1), 1, 2) for n in range(4)}
    store = make(tmp_path / "store", {"many": of_features(near, 20, 20), **others})
    index = build_index(store, of="patches")
    for per_image in (1, 2):
        exact, found = (
            search_patches(store, others["0"]["key@1"], [(4, 4)], k=4, per_image=per_image, index=given)
            for given in (None, index)
        )
        assert found.ids == exact.ids
    d = describe(torch.tensor([[[1.0, 0, 0]]]), 1, 1)
    assert search_patches(store, d, [(4, 4)], k=4, index=index).ids == [["many", "0", "1", "2"]]


def test_the_same_seed_gives_the_same_index(tmp_path):
    store, _ = clustered(tmp_path / "store", 400)
    paths = [build_index(store, kind="ivf", path=tmp_path / str(n), seed=seed) for n, seed in enumerate((0, 0, 1))]
    first, second, third = ((path / "index.faiss").read_bytes() for path in paths)
    assert first == second != third


def test_every_row_is_as_likely_to_be_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SAMPLE", 60)
    images = {str(n): of_features(torch.tensor([[1.0, n]]), 1, 1) for n in range(300)}
    store = make(tmp_path, images, 70)
    taken = np.zeros(300)
    for seed in range(40):
        sample, count = module._sample(store, "key@1", "images", seed)
        assert (sample.shape, count) == ((60, 2), 300)
        numbers = (sample[:, 1] / sample[:, 0]).round().astype(int)
        assert len(set(numbers)) == 60
        taken[numbers] += 1
    tenths = taken.reshape(10, 30).sum(1)  # 240 each, with a deviation of 14
    assert (abs(tenths - 240) < 70).all()


def test_an_index_of_another_store_or_of_before_is_refused(store, tmp_path):
    path = build_index(store)
    message = "expected an index of '.*' as it is now, but '.*' was built of another store, or before shards"
    changed = IMAGES | {"06.png": of_image(600 + len(GRIDS) * 5 + 1)}
    assert changed["06.png"]["key@1"].grid == IMAGES["06.png"]["key@1"].grid
    other = make(tmp_path / "other", changed)
    with pytest.raises(StoreError, match=message):
        search_images(other, random(0, 1, DIM), index=path)
    content, size = other.shard_path(1).read_bytes(), store.shard_path(1).stat().st_size
    assert len(content) == size, "nothing but numbers differs"
    search_images(store, random(0, 1, DIM), index=path)
    store.shard_path(1).write_bytes(content)
    with pytest.raises(StoreError, match=message):
        search_images(Store(store.path), random(0, 1, DIM), index=path)
    build_index(Store(store.path))
    search_images(Store(store.path), random(0, 1, DIM), index=path)
    store.shard_path(1).unlink()
    with pytest.raises(StoreError, match="in '.*' 1 of 4 shards are missing"):
        open_index(store, path)


def test_an_index_of_something_else_is_refused(store, tmp_path):
    images, patches = build_index(store), build_index(store, of="patches")
    d = IMAGES["00.png"]["key@1"]
    with pytest.raises(
        ConfigError, match=r"expected an index of images, key@1 of '.*', got Index\(96 patches, key@1 of"
    ):
        search_images(store, d, index=patches)
    with pytest.raises(
        ConfigError, match=r"expected an index of patches, key@1 of '.*', got Index\(14 images, key@1 of"
    ):
        search_patches(store, d, [(1, 1)], index=images)
    with pytest.raises(
        ConfigError, match=r"expected an index of images, cls@2 of '.*', got Index\(14 images, key@1 of"
    ):
        search_images(store, d, tap="cls@2", index=images)
    other = make(tmp_path / "other", IMAGES, 3)
    with pytest.raises(ConfigError, match=r"expected an index of images, key@1 of '.*other', got Index\(14"):
        search_images(other, d, index=open_index(store, images))
    with pytest.raises(StoreError, match=r"expected an index \(vitfeats.index/1\) at '.*nothing', but there is none"):
        search_images(store, d, index=tmp_path / "nothing")


def test_a_damaged_index_is_told(store):
    for name, message in {
        "index.faiss": "expected a whole index at '.*', but it cannot be read",
        "places.npz": "expected a whole index at '.*', but it cannot be read",
        "index.json": "but there is none",
    }.items():
        path = build_index(store)
        file = path / name
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(StoreError, match=message):
            open_index(store, path)
        if name == "index.json":
            with pytest.raises(StoreError, match="expected an index or nothing at '.*', got something else"):
                build_index(store)
    build_index(store, path=path.parent / "more")
    (path.parent / "more" / "index.faiss").replace(path.parent / "kept")
    faiss.write_index(faiss.IndexFlatIP(DIM), str(path.parent / "more" / "index.faiss"))
    with pytest.raises(StoreError, match="expected an index of 14 rows at '.*', got 0; build it again"):
        open_index(store, path.parent / "more")


def test_an_index_appears_whole_or_not_at_all(store, tmp_path, monkeypatch):
    path = build_index(store, path=tmp_path / "new" / "index")
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def failing(index, name):
        Path(name).write_bytes(b"half")
        raise RuntimeError("no space is left")

    with monkeypatch.context() as patched:
        patched.setattr(faiss, "write_index", failing)
        with pytest.raises(StoreError, match="expected to write an index at '.*', but: no space is left"):
            build_index(store, path=path, kind="ivf")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in path.parent.iterdir()] == ["index"]
    assert build_index(store, "cls@2", path=path) == path
    assert open_index(store, path).tap == "cls@2"
    assert [file.name for file in path.parent.iterdir()] == ["index"]


def test_no_other_files_are_replaced(store, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_text("a cat")
    (tmp_path / "file").write_text("something")
    for name in ("pictures", "file"):
        with pytest.raises(StoreError, match=f"expected an index or nothing at '.*{name}', got something else"):
            build_index(store, path=tmp_path / name)
    assert (tmp_path / "pictures" / "cat.png").read_text() == "a cat"
    (tmp_path / "empty").mkdir()
    assert build_index(store, path=tmp_path / "empty") == tmp_path / "empty"


def test_other_kinds_are_refused(store):
    with pytest.raises(ConfigError, match="expected kind 'auto', 'flat', 'ivf' or a description .* got 'tree'"):
        build_index(store, kind="tree")
    with pytest.raises(
        ConfigError, match="expected a kind that 14 rows are enough to train, got 'IVF64,Flat'; try 'flat'"
    ):
        build_index(store, kind="IVF64,Flat")
    with as_users_run(), pytest.raises(ConfigError, match="expected of='images' or of='patches', got 'pixels'"):
        build_index(store, of="pixels")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a tap of the store"):
        build_index(store, "key@3", kind="flat")
    store.path = "s3://bucket/store"
    store.missing = list  # type: ignore[method-assign] - nothing is asked of the network
    with pytest.raises(
        ConfigError, match="expected path=, a folder for the index, as the store is at an address: s3://"
    ):
        build_index(store)


def test_without_faiss_the_line_that_installs_it_is_given(store, monkeypatch):
    path = build_index(store)
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = r"expected faiss for an index, but it is not installed; try: pip install \"vitfeats\[index\]\"$"
    with pytest.raises(MissingDependencyError, match=message):
        build_index(store)
    with pytest.raises(MissingDependencyError, match=message):
        search_images(store, random(0, 1, DIM), index=path)
    assert len(search_images(store, random(0, 1, DIM))) == 1
