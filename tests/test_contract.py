"""The contract: every line of the README's promise, written as a user writes it, and run."""

import numpy as np
import pytest
import torch
from PIL import Image

import vitfeats as vf


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a picture in it."""
    monkeypatch.chdir(tmp_path)
    vf.samples.cat().resize((160, 112)).save("cat.jpg")
    vf.samples.coffee().resize((150, 100)).save("cup.png")
    return tmp_path


@pytest.fixture
def random_weights(monkeypatch):
    """Published names without their weights: the same networks, untrained."""
    import timm

    real = timm.create_model

    def create(name, **options):
        torch.manual_seed(0)
        return real(name, **{**options, "pretrained": False})

    monkeypatch.setattr("vitfeats.models.libraries.timm.create_model", create)
    monkeypatch.setattr("vitfeats.models.libraries.require_weights", lambda *_: None)


def test_one_line_with_the_bundled_model(here):
    d = vf.extract("cat.jpg", layer=11, facet="key", device="cpu")
    assert (str(d.tap), d.model) == ("key@11", "mini")
    assert d.features.shape == (1, 14 * 20, 192)


def test_one_line_with_another_model(here, random_weights):
    images = ["cat.jpg", Image.open("cat.jpg")]
    d = vf.extract(images, model="dino_vits8", layer=9, facet="key", stride=4, size=32, device="cpu")
    assert (d.grid.rows, d.grid.cols, d.grid.stride) == (7, 11, 4)
    assert len(d) == 2


def test_extractor_one_tap_several_taps_and_mixed_sizes(here, random_weights):
    ex = vf.load_extractor("dinov2_vits14_reg", size=56, device="auto", dtype="auto")
    d = ex("cat.jpg", "key@11")
    assert isinstance(d, vf.Descriptor)
    assert d.registers.shape == (1, 4, 384)
    ds = ex("cat.jpg", ["key@9", "token@11", "cls@11"])
    assert isinstance(ds, vf.Descriptors)
    assert list(map(str, ds)) == ["key@9", "token@11", "cls@11"]
    assert ds["key@9"] is ds[vf.Tap("key", 9)]
    assert "key@9" in ds
    assert "key@8" not in ds
    with pytest.raises(KeyError, match=r"expected one of key@9, token@11, cls@11, got 'key@8'"):
        ds["key@8"]
    asked = ex("cat.jpg", ["key@-1"])
    assert asked["key@-1"] is asked["key@11"]
    each = list(ex.each(["cat.jpg", "cup.png", np.zeros((40, 90, 3), np.uint8), "cat.jpg"], "key@11", batch_size=3))
    assert [(d.grid.rows, d.grid.cols) for d in each] == [(4, 6), (4, 6), (4, 9), (4, 6)]
    torch.testing.assert_close(each[0].features, ex("cat.jpg", "key@11").features)
    assert torch.equal(each[0].features, each[3].features) or torch.allclose(
        each[0].features, each[3].features, atol=1e-5
    )
    # One window with sizes that take turns: results come in the order of the images, not of the groups they ran in.
    turns = list(ex.each(["cat.jpg", np.zeros((40, 90, 3), np.uint8), "cat.jpg"], "key@11", batch_size=3))
    assert [d.frames[0].source_size for d in turns] == [(112, 160), (40, 90), (112, 160)]
    several = list(ex.each(["cat.jpg", "cup.png"], ["key@11", "cls@11"]))
    assert [type(found) for found in several] == [vf.Descriptors] * 2


def test_what_a_descriptor_holds(here, mini):
    d = mini("cat.jpg", "key@11")
    batch, tokens, dim = d.features.shape
    assert d.cls.shape == (batch, dim)
    assert d.registers is None
    assert d.map.shape == (batch, dim, d.grid.rows, d.grid.cols)
    assert d.map[0, :, 1, 2].equal(d.features[0, d.grid.cols + 2])
    assert d.at([(10.0, 20.5), (159.0, 111.0)]).shape == (1, 2, dim)
    assert d[0].features.shape == (1, tokens, dim)
    assert d.to("cpu", torch.float16).dtype == torch.float16
    assert d.numpy().shape == (batch, tokens, dim)
    path = d.save("d.safetensors")
    loaded = vf.Descriptor.load(path)
    assert torch.equal(loaded.features, d.features)
    assert (loaded.grid, loaded.frames, loaded.tap, loaded.model) == (d.grid, d.frames, d.tap, d.model)
    assert isinstance(mini.model, torch.nn.Module)
    assert mini.card.name == "mini"
    assert mini.preprocess.size == 112
    assert mini.attention("cat.jpg", 11).shape == (1, 3, tokens + 1, tokens + 1)


def test_helpers(here, mini):
    d1, d2 = mini.each(["cat.jpg", "cup.png"], "key@11")
    assert vf.self_similarity(d1).shape == (1, d1.grid.tokens, d1.grid.tokens)
    assert vf.cosine_similarity(d1, d2).shape == (1, d1.grid.tokens, d2.grid.tokens)
    assert vf.similarity_map(d1, [(80, 50)], d2).shape == (1, d2.grid.rows, d2.grid.cols)
    assert vf.PCA(3).fit([d1, d2]).to_rgb(d1).shape == (1, 3, d1.grid.rows, d1.grid.cols)
    assert vf.PCA(3).fit([d1, d2], foreground="border").to_rgb(d1, size="source").shape == (1, 3, 112, 160)
    m = vf.match_mutual(d1, d2)
    assert isinstance(m, vf.Matches)
    assert len(vf.match_nearest(d1, d2)) == d1.grid.tokens
    assert vf.transfer_points(d1, d2, [(80, 50)]).shape == (1, 2)
    attention = mini("cat.jpg", ["attention@11"])["attention@11"]
    assert vf.saliency(attention, heads=(0, 2)).shape == (1, attention.grid.rows, attention.grid.cols)
    assert isinstance(vf.plot.pca("cat.jpg", d1), Image.Image)
    assert isinstance(vf.plot.matches("cat.jpg", "cup.png", m), Image.Image)


def test_losses_reach_the_image(here, mini):
    image = torch.rand(1, 3, 112, 160, requires_grad=True)
    out, src, ref = (mini(i, ["key@11", "cls@11"]) for i in (image, "cat.jpg", "cat.jpg"))
    loss = vf.structure_loss(out["key@11"], src["key@11"]) + 10 * vf.appearance_loss(out["cls@11"], ref["cls@11"])
    loss.backward()
    assert float(image.grad.abs().sum()) > 0
