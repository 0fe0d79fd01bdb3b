"""Pictures to learn from: folders and tar files."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from vitfeats.errors import ConfigError, ImageError, StoreError
from vitfeats.pictures import PictureFiles, open_pictures, read_names, read_pictures


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for number, (name, size) in enumerate(
        {"b/two.png": (40, 30), "a/one.jpg": (20, 60), "three.webp": (33, 33)}.items()
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (60 * number, 120, 200)).save(root / name)
    (root / "notes.txt").write_text("not a picture")
    return root


@pytest.fixture
def archive(folder, tmp_path):
    path = tmp_path / "pictures.tar"
    with tarfile.open(path, "w") as file:
        file.add(folder, arcname=".")
    return path


def test_a_folder_and_its_tar_file_hold_the_same_in_the_order_of_names(folder, archive):
    found, packed = read_pictures(folder, side=16), read_pictures(archive, side=16)
    assert list(found) == list(packed) == ["a/one", "b/two", "three"]
    for name, picture in found.items():
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, packed[name])


def test_the_shorter_side_is_what_was_asked_for(folder):
    found = read_pictures(folder, side=16)
    assert [picture.shape for picture in found.values()] == [(48, 16, 3), (16, 21, 3), (16, 16, 3)]
    assert read_pictures(folder, side=100, only=["three"])["three"].shape == (100, 100, 3)


def test_names_choose(folder, tmp_path):
    (tmp_path / "names.txt").write_text("a/one\n\n  three  \n")
    names = read_names(tmp_path / "names.txt")
    assert names == ["a/one", "three"]
    assert list(read_pictures(folder, side=16, only=names)) == names
    assert list(read_pictures(folder, side=16, without=names)) == ["b/two"]


def test_what_cannot_be_read_is_left_out_if_asked(folder, tmp_path):
    (folder / "b" / "broken.png").write_bytes(b"not a picture")
    archive = tmp_path / "with_broken.tar"
    with tarfile.open(archive, "w") as file:
        file.add(folder, arcname=".")
    for source in (folder, archive):
        broken = {}
        assert list(read_pictures(source, side=16, broken=broken)) == ["a/one", "b/two", "three"]
        assert list(broken) == ["b/broken.png"]
        assert "broken.png" in broken["b/broken.png"]


def test_pictures_that_do_not_fit_are_read_when_they_are_asked_for(folder, archive, tmp_path):
    packed = tmp_path / "pictures.tar.gz"
    with tarfile.open(packed, "w:gz") as file:
        file.add(folder, arcname=".")
    whole = read_pictures(folder, side=16)
    assert isinstance(open_pictures(folder, side=16), dict)
    for source in (folder, archive, packed):
        files = open_pictures(source, side=16, most=1000)
        assert isinstance(files, PictureFiles)
        assert list(files) == list(whole)
        assert all(np.array_equal(files[name], whole[name]) for name in files)
        assert files.size() == pytest.approx(sum(picture.nbytes for picture in whole.values()), rel=0.02)
    assert len(open_pictures(folder, side=16, most=0, without=["three"])) == 2
    with pytest.raises(ConfigError, match="got none of the names"):
        open_pictures(folder, side=16, most=0, only=["four"])


def test_what_is_no_picture_is_left_out_before_it_is_asked_for(folder):
    (folder / "b" / "broken.png").write_bytes(b"not a picture")
    broken = {}
    assert len(open_pictures(folder, side=16, most=0, broken=broken)) == 3
    assert list(broken) == ["b/broken.png"]
    with pytest.raises(ImageError, match=r"'b/broken.png' of '.*': expected a picture, but its format is none"):
        open_pictures(folder, side=16, most=0)
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a" / "one.png")
    (folder / "a" / "one.jpg").unlink()
    whole = (folder / "a" / "one.png").read_bytes()
    (folder / "a" / "one.png").write_bytes(whole[: len(whole) // 2])  # its beginning is that of a picture
    files = PictureFiles(folder, side=16)
    with pytest.raises(ImageError, match=r"'a/one.png' of '"):
        files["a/one"]


def test_what_cannot_be_read_is_named(folder, archive, tmp_path):
    with pytest.raises(StoreError, match=r"expected a folder or a tar file of pictures at '.*nothing', but: "):
        read_pictures(tmp_path / "nothing", side=16)
    with pytest.raises(StoreError, match=r"expected a folder or a tar file of pictures at '.*one.jpg', but: "):
        read_pictures(folder / "a" / "one.jpg", side=16)
    with pytest.raises(StoreError, match=r"expected a list of names, one a line, at '.*nothing.txt', but: "):
        read_names(tmp_path / "nothing.txt")
    with pytest.raises(ConfigError, match=r"expected pictures \(\.jpg, .*\) in '.*', got none of the names that were"):
        read_pictures(folder, side=16, only=["four"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"expected pictures \(\.jpg, .*\) in '.*empty', got none$"):
        read_pictures(tmp_path / "empty", side=16)


def test_a_broken_picture_is_named(folder, tmp_path):
    (folder / "b" / "two.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"'b/two.png' of '.*pictures': "):
        read_pictures(folder, side=16)
    with tarfile.open(tmp_path / "broken.tar", "w") as file:
        file.add(folder, arcname=".")
    with pytest.raises(ImageError, match=r"'b/two.png' of '.*broken.tar': expected a picture, but its format"):
        read_pictures(tmp_path / "broken.tar", side=16)
