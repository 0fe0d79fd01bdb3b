"""Principal components of a store, and its tables of one vector an image: the numbers, the bytes, and going on."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from many import (
    NAMES,
    TAPS,
    assert_same,
    everything,
    failing,
    paint,
    paint_all,
    run,
    stored_at,
)
from sklearn.decomposition import PCA
from synthetic import describe, random_descriptor

from vitfeats.apps.bulk import extraction
from vitfeats.apps.bulk import store as store_module
from vitfeats.apps.bulk.files import read_bytes, write_bytes
from vitfeats.apps.bulk.reduction import PCA_FILE, Reduction
from vitfeats.apps.bulk.store import Store
from vitfeats.descriptor import Descriptors
from vitfeats.errors import ConfigError, MissingDependencyError, ShapeError, StoreError

DIMS = 5


@pytest.fixture
def folder(tmp_path) -> Path:
    return paint_all(tmp_path / "pictures")


def sample(count: int = 6) -> list[Descriptors]:
    """Return images of several grids and two taps, of numbers far from 0, a few directions large."""
    generator = torch.Generator().manual_seed(7)
    scale = torch.tensor([9.0, 5.0, 2.0, 1.0, 0.5, 0.1])
    found = []
    for number in range(count):
        rows, cols = 3 + number % 2, 4 + number % 3
        key = torch.randn(1, rows * cols, 6, generator=generator) * scale + 100 + number
        token = torch.randn(1, rows * cols, 4, generator=generator) * scale[:4] - 3
        one = describe(key, rows, cols, tap="key@1", heads=2)
        found.append(Descriptors([("key@1", one), ("token@2", describe(token, rows, cols, tap="token@2"))]))
    return found


def tokens_of(images: list[Descriptors], tap: str) -> np.ndarray:
    return torch.cat([ds[tap].features[0] for ds in images]).double().numpy()


def assert_same_up_to_sign(found: np.ndarray, expected: np.ndarray, atol: float) -> None:
    """Compare columns."""
    signs = np.sign((found * expected).sum(0))
    assert np.allclose(found * signs, expected, atol=atol)


@pytest.mark.parametrize(("tap", "dims"), [("key@1", 1), ("key@1", 3), ("key@1", 5), ("token@2", 3)])
def test_components_are_those_of_scikit_learn(tap, dims):
    images = [Descriptors([(tap, ds[tap])]) for ds in sample()]
    reduction = Reduction.fit(images, dims)
    expected = PCA(dims, svd_solver="full").fit(tokens_of(images, tap))
    assert np.allclose(reduction.means[tap], expected.mean_, rtol=1e-6)
    assert_same_up_to_sign(reduction.components[tap].T.numpy(), np.array(expected.components_, np.float64).T, 1e-5)
    assert reduction.kept[tap] == pytest.approx(expected.explained_variance_ratio_.sum(), rel=1e-6)
    for ds in images:
        found = reduction(ds[tap])
        assert found.features.shape == (1, len(ds[tap].features[0]), dims)
        expected_numbers = expected.transform(ds[tap].features[0].double().numpy())
        assert_same_up_to_sign(found.features[0].double().numpy(), expected_numbers, 1e-3)


def test_components_of_a_store_are_those_of_its_images(narrow, folder, tmp_path):
    run(narrow, folder, tmp_path / "whole", dtype="float32")
    run(narrow, folder, tmp_path / "out", dtype="float32", pca=DIMS)
    whole, reduced = Store(tmp_path / "whole"), Store(tmp_path / "out")
    for tap in TAPS:
        vectors = torch.cat([whole.rows(number, tap).vectors for number in range(whole.shards)]).double().numpy()
        found = torch.cat([reduced.rows(number, tap).vectors for number in range(whole.shards)]).double().numpy()
        expected = PCA(DIMS, svd_solver="full").fit(vectors)
        scale = np.abs(found).max()
        assert_same_up_to_sign(found, expected.transform(vectors), 1e-4 * scale)
        share = expected.explained_variance_ratio_.sum()
        assert reduced.reduction is not None
        assert reduced.reduction.kept[tap] == pytest.approx(share, rel=1e-4)


def test_images_in_pieces_are_fitted_as_all_at_once():
    images = sample(8)
    same = [ds for ds in images if ds["key@1"].grid == images[0]["key@1"].grid]
    assert len(same) > 1
    batch = describe(
        torch.cat([ds["key@1"].features for ds in same]), same[0]["key@1"].grid.rows, same[0]["key@1"].grid.cols
    )
    pieces = Reduction.fit([Descriptors([("key@1", ds["key@1"])]) for ds in same], 3)
    whole = Reduction.fit([Descriptors([("key@1", batch)])], 3)
    for name in ("means", "components"):
        assert torch.allclose(getattr(pieces, name)["key@1"], getattr(whole, name)["key@1"], atol=1e-5)
    assert pieces.kept["key@1"] == pytest.approx(whole.kept["key@1"], rel=1e-9)


def test_images_are_not_kept_while_they_are_fitted():
    left = []

    def given():
        for ds in sample(4):
            left.append(ds)
            yield left.pop()

    assert Reduction.fit(given(), 2).facts() == Reduction.fit(sample(4), 2).facts()


def test_all_parts_of_a_descriptor_are_reduced_and_the_rest_stays():
    d = random_descriptor(3, 3, 4, 6, cls=torch.randn(1, 6), registers=torch.randn(1, 2, 6), heads=2, source=(70, 51))
    reduction = Reduction.fit([Descriptors([("key@1", d)])], 4)
    found = reduction(d)
    mean, rows = reduction.means["key@1"], reduction.components["key@1"]
    for part in ("features", "cls", "registers"):
        assert torch.allclose(getattr(found, part), (getattr(d, part) - mean) @ rows.T, atol=1e-6), part
    assert (found.grid, found.frames, found.tap, found.model) == (d.grid, d.frames, d.tap, d.model)
    assert found.heads is None
    assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-6)
    half = reduction(d.to(torch.float16))
    assert half.features.dtype == torch.float32
    assert torch.allclose(half.features, found.features, atol=1e-2)


def test_descriptors_of_other_taps_and_channels_are_refused():
    reduction = Reduction.fit(sample(), 2)
    with pytest.raises(ConfigError, match=r"expected a tap of the store \(key@1, token@2\), got 'key@7'"):
        reduction(random_descriptor(0, 2, 2, 6, tap="key@7"))
    told = "expected 6 channels at 'key@1', got 8; was it read by the same model?"
    with pytest.raises(ShapeError, match=told.replace("?", r"\?")):
        reduction(random_descriptor(0, 2, 2, 8))


def test_dims_that_cannot_be_fitted_are_refused():
    with pytest.raises(ConfigError, match="expected images to fit principal components on, got none that can be read"):
        Reduction.fit([], 2)
    for dims in (0, 6):
        with pytest.raises(ConfigError, match=f"fewer than the 6 channels of 'key@1' and the .*, got {dims}$"):
            Reduction.fit([Descriptors([("key@1", ds["key@1"])]) for ds in sample()], dims)
    with pytest.raises(ConfigError, match="fewer than the 4 channels of 'token@2' and the [0-9]+ tokens .*, got 4"):
        Reduction.fit(sample(), 4)
    few = [Descriptors([("key@1", random_descriptor(0, 2, 2, 8))])]
    with pytest.raises(ConfigError, match="and the 4 tokens of the sample, got 4"):
        Reduction.fit(few, 4)
    assert len(Reduction.fit(few, 3).components["key@1"]) == 3


def test_a_fresh_descriptor_is_reduced_as_the_store_has_it(narrow, folder, tmp_path):
    run(narrow, folder, tmp_path / "out", pca=DIMS, taps=["key@1", "token@2", "cls@2"])
    store = Store(tmp_path / "out")
    for name in NAMES:
        fresh = narrow(folder / name, store.taps)
        for tap, d in store[name].items():
            reduced = store.reduce(fresh[str(tap)])
            assert (d.dim, d.heads, d.grid, d.frames) == (DIMS, None, reduced.grid, reduced.frames)
            scale = reduced.features.abs().max()
            assert torch.allclose(d.features, reduced.features, atol=float(2e-3 * scale))
            assert (d.cls is None) == (reduced.cls is None)
            if d.cls is not None and reduced.cls is not None:
                assert torch.allclose(d.cls, reduced.cls, rtol=2e-3, atol=float(2e-3 * scale))
    assert any(d.cls is not None for d in store[NAMES[0]].values())
    with pytest.raises(ConfigError, match="expected a tap of the store"):
        store.reduce(narrow(folder / NAMES[0], "key@0"))


def test_a_store_without_components_leaves_descriptors_as_they_are(narrow, folder, tmp_path):
    run(narrow, folder, tmp_path / "out")
    store = Store(tmp_path / "out")
    assert store.reduction is None
    d = narrow(folder / NAMES[0], "key@1")
    assert store.reduce(d) is d


@pytest.mark.usefixtures("as_a_user")
def test_int8_of_components_is_near_them(narrow, folder, tmp_path):
    run(narrow, folder, tmp_path / "whole", pca=DIMS, dtype="float32")
    run(narrow, folder, tmp_path / "out", pca=DIMS, dtype="int8")
    for name, found in Store(tmp_path / "out").each():
        for tap, d in Store(tmp_path / "whole")[name].items():
            step = d.features.abs().amax(-1, keepdim=True) / 127
            assert ((found[tap].features - d.features).abs() <= step * 0.51).all()


@pytest.mark.usefixtures("as_a_user")
def test_a_store_of_components_has_the_same_bytes_wherever_it_lies(narrow, folder, tmp_path, bucket):
    for number in (0, 1):
        run(narrow, folder, tmp_path / f"{number}", pca=DIMS)
    assert everything(tmp_path / "0") == everything(tmp_path / "1")
    address = f"memory://{bucket}/store"
    run(narrow, folder, address, pca=DIMS)
    assert {**stored_at(address), ".lock": b""} == everything(tmp_path / "0")
    for (name, found), (other, expected) in zip(Store(address).each(), Store(tmp_path / "0").each(), strict=True):
        assert name == other
        assert_same(found, expected)
    d = narrow(folder / NAMES[0], "key@1")
    assert torch.equal(Store(address).reduce(d).features, Store(tmp_path / "0").reduce(d).features)


@pytest.mark.usefixtures("as_a_user")
def test_going_on_uses_the_components_that_are_there(narrow, folder, tmp_path, monkeypatch):
    run(narrow, folder, tmp_path / "out", pca=DIMS)
    before = everything(tmp_path / "out")
    Store(tmp_path / "out").shard_path(1).unlink()
    monkeypatch.setattr(Reduction, "fit", lambda *given: pytest.fail("it is fitted again"))
    run(narrow, folder, tmp_path / "out", pca=DIMS)
    assert everything(tmp_path / "out") == before


@pytest.mark.usefixtures("as_a_user")
def test_other_components_are_refused(narrow, folder, tmp_path):
    run(narrow, folder, tmp_path / "plain")
    run(narrow, folder, tmp_path / "out", pca=DIMS)
    before = everything(tmp_path / "out")
    with pytest.raises(ConfigError, match=rf"expected pca as the store in '.*out' has it, with pca={DIMS}, got 3"):
        run(narrow, folder, tmp_path / "out", pca=3)
    with pytest.raises(ConfigError, match=r"these differ: pca: {'dims': .*} there, None here"):
        run(narrow, folder, tmp_path / "out")
    with pytest.raises(ConfigError, match=rf"expected pca as the store in '.*plain' has it, without, got {DIMS}"):
        run(narrow, folder, tmp_path / "plain", pca=DIMS)
    with pytest.raises(ConfigError, match="these differ: taps: "):
        run(narrow, folder, tmp_path / "out", pca=DIMS, taps=["key@1"])
    assert everything(tmp_path / "out") == before


@pytest.mark.parametrize(("pca", "told"), [(0, "at least 1 component, got 0"), (192, "fewer than the 192 channels")])
def test_components_that_cannot_be_leave_no_store(narrow, folder, tmp_path, pca, told):
    with pytest.raises(ConfigError, match=told):
        run(narrow, folder, tmp_path / "out", pca=pca)
    assert not (tmp_path / "out" / "store.json").exists()


def test_components_need_an_image_that_can_be_read(narrow, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="expected images to fit principal components on, got none that can be read"):
        run(narrow, tmp_path / "pictures", tmp_path / "out", pca=2)


def test_images_to_fit_on_are_spread_over_the_source_and_may_be_broken(narrow, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "_SAMPLE", 4)
    for number in range(10):
        paint(tmp_path / f"pictures/{number}.png", (30, 30), number)
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture")
    run(narrow, tmp_path / "pictures", tmp_path / "out", taps=["key@1"], pca=3)
    chosen = [narrow(tmp_path / f"pictures/{number}.png", ["key@1"]) for number in (0, 6, 9)]
    expected = Reduction.fit(chosen, 3).components["key@1"]
    found = Store(tmp_path / "out").reduction
    assert found is not None
    assert torch.allclose(found.components["key@1"], expected, atol=1e-4)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("where", ["here", "memory"])
def test_components_that_were_changed_lost_or_cut_off_are_refused(narrow, folder, tmp_path, bucket, where):
    place = tmp_path / "out" if where == "here" else f"memory://{bucket}/out"
    run(narrow, folder, place, pca=DIMS)
    file = place / PCA_FILE if isinstance(place, Path) else f"{place}/{PCA_FILE}"
    whole = read_bytes(file)
    other = Reduction.fit(sample(), 3).to_bytes()
    changed = [whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], whole[:20], b"", whole + b" ", other, b"no tensors"]
    changed += [whole.replace(b"mean", b"maen"), Reduction({}, {}, {}).to_bytes()]
    for content in changed:
        write_bytes(file, content)
        for opened in (lambda: Store(place), lambda: run(narrow, folder, place, pca=DIMS)):
            with pytest.raises(StoreError, match=f"expected '{file}' as it was written, but it was changed"):
                opened()
    if isinstance(file, Path):
        file.unlink()
        with pytest.raises(StoreError, match=f"expected the principal components of a store at '{file}', but"):
            Store(place)
    write_bytes(file, whole)
    assert run(narrow, folder, place, pca=DIMS).made == 0


@pytest.mark.usefixtures("as_a_user")
def test_a_run_that_ended_between_its_components_and_its_description_goes_on(narrow, folder, tmp_path, monkeypatch):
    run(narrow, folder, tmp_path / "whole", pca=DIMS)
    for name in ("ids.jsonl", "store.json"):
        with monkeypatch.context() as patch:

            def stopped(place, data, name=name):
                if place.name == name:
                    raise KeyboardInterrupt
                write_bytes(place, data)

            patch.setattr(store_module, "write_bytes", stopped)
            with pytest.raises(KeyboardInterrupt):
                run(narrow, folder, tmp_path / name, pca=DIMS)
        assert (tmp_path / name / PCA_FILE).exists()
        assert not (tmp_path / name / "store.json").exists()
        (tmp_path / name / PCA_FILE).write_bytes(b"of another run")  # nothing refers to it
        run(narrow, folder, tmp_path / name, pca=DIMS)
        assert everything(tmp_path / name) == everything(tmp_path / "whole")


# Tables of one vector an image.


def table_of(store: Store, number: int) -> dict[str, list]:
    return pq.read_table(store.path / "pooled" / f"part-{number:07}.parquet").to_pydict()


@pytest.mark.parametrize("pca", [None, DIMS])
def test_a_table_beside_each_shard_has_the_mean_of_each_image(narrow, folder, tmp_path, pca):
    (folder / "broken.png").write_bytes(b"no picture")
    run(narrow, folder, tmp_path / "out", taps=["key@1", "cls@2"], pooled=True, pca=pca)
    store = Store(tmp_path / "out")
    assert store.settings["pooled"] is True
    assert sorted(path.name for path in (tmp_path / "out" / "pooled").iterdir()) == [
        f"part-{number:07}.parquet" for number in range(3)
    ]
    found = []
    for number in range(store.shards):
        columns = table_of(store, number)
        assert list(columns) == ["id", "height", "width", "key@1", "cls@2"]
        found += columns["id"]
        assert columns["id"] == [name for name in store.ids_of(number) if name != "broken.png"]
        for row, name in enumerate(columns["id"]):
            key, cls = store[name]["key@1"], store[name]["cls@2"]
            assert (columns["height"][row], columns["width"][row]) == key.frames[0].source_size
            scale = float(key.features.abs().max())
            assert np.allclose(columns["key@1"][row], key.features[0].mean(0), atol=1e-3 * scale)
            assert cls.features.shape[1] == 1
            assert np.allclose(columns["cls@2"][row], cls.features[0, 0], rtol=1e-3, atol=1e-4 * scale)
    assert found == NAMES


@pytest.mark.usefixtures("as_a_user")
def test_tables_change_no_shard_and_are_the_same_in_every_run(narrow, folder, tmp_path, bucket):
    run(narrow, folder, tmp_path / "plain")
    for number in (0, 1):
        run(narrow, folder, tmp_path / f"{number}", pooled=True)
    assert everything(tmp_path / "0") == everything(tmp_path / "1")
    one, other = (dict(Store(tmp_path / out).each()) for out in ("plain", "0"))
    assert list(one) == list(other)
    for name in one:
        assert_same(one[name], other[name])
    address = f"memory://{bucket}/store"
    run(narrow, folder, address, pooled=True)
    assert {**stored_at(address), ".lock": b""} == everything(tmp_path / "0")
    assert "pooled/part-0000000.parquet" in stored_at(address)


@pytest.mark.usefixtures("as_a_user")
def test_a_shard_that_is_made_again_has_its_table_again(narrow, folder, tmp_path):
    out = tmp_path / "out"
    run(narrow, folder, out, pooled=True)
    before = everything(out)
    path = Store(out).shard_path(1)
    path.write_bytes(path.read_bytes()[:-1])
    (out / "pooled" / "part-0000001.parquet").unlink()
    assert [damage.shard for damage in Store(out).remove_damaged()] == [1]
    run(narrow, folder, out, pooled=True)
    assert everything(out) == before


@pytest.mark.usefixtures("as_a_user")
def test_a_shard_is_not_there_before_its_table(narrow, folder, tmp_path, bucket):
    """Else a run that ends between them would leave a table out for ever."""
    run(narrow, folder, tmp_path / "whole", pooled=True)
    for writes in (2, 3, 4, 6):  # the list of images, the description, then each table and its shard
        address = f"watched://{bucket}/{writes}"
        with failing(ConnectionError("gone"), writes=writes), pytest.raises(StoreError, match="but: gone"):
            run(narrow, folder, address, pooled=True)
        left = stored_at(address)
        tables = {Path(name).stem for name in left if name.startswith("pooled/")}
        assert {Path(name).stem for name in left if name.startswith("part-")} <= tables
        run(narrow, folder, address, pooled=True)
        assert {**stored_at(address), ".lock": b""} == everything(tmp_path / "whole")


def test_a_shard_of_broken_images_alone_has_no_table(narrow, folder, tmp_path):
    for number in range(4):
        (folder / f"0{number}.png").write_bytes(b"no picture")
    summary = run(narrow, folder, tmp_path / "out", pooled=True)
    assert len(summary.broken) == 4
    store = Store(tmp_path / "out")
    assert set(store.ids_of(0)) < set(summary.broken)
    names = {path.name for path in (tmp_path / "out" / "pooled").iterdir()}
    assert names == {f"part-{number:07}.parquet" for number in range(1, store.shards)}
    assert pq.read_table(tmp_path / "out" / "pooled")["id"].to_pylist() == NAMES
    assert run(narrow, folder, tmp_path / "out", pooled=True).made == 0


@pytest.mark.usefixtures("as_a_user")
def test_a_store_without_tables_is_another(narrow, folder, tmp_path):
    run(narrow, folder, tmp_path / "out", pooled=True)
    run(narrow, folder, tmp_path / "plain")
    with pytest.raises(ConfigError, match="these differ: pooled: True there, None here"):
        run(narrow, folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="these differ: pooled: None there, True here"):
        run(narrow, folder, tmp_path / "plain", pooled=True)


def test_tables_need_pyarrow_before_anything_is_made(narrow, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
    told = r'expected pyarrow for pooled=True, but it is not installed; try: pip install "vitfeats\[bulk\]"$'
    with pytest.raises(MissingDependencyError, match=told):
        run(narrow, folder, tmp_path / "out", pooled=True)
    assert not (tmp_path / "out").exists()


def test_a_lost_table_of_pooled_vectors_is_found_and_made_again(narrow, folder, tmp_path):
    run(narrow, folder, tmp_path / "out", pooled=True)
    before = everything(tmp_path / "out")
    (tmp_path / "out" / "pooled" / "part-0000001.parquet").unlink()
    found = Store(tmp_path / "out").remove_damaged()
    assert [(damage.shard, damage.why) for damage in found] == [(1, "its table of pooled vectors is missing")]
    run(narrow, folder, tmp_path / "out", pooled=True)
    assert everything(tmp_path / "out") == before
    assert list(Store(tmp_path / "out").check()) == []
