"""PCA: scikit-learn's numbers, fixed signs, one basis for many images, and the foreground."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA  # noqa: N811 - its own name, beside ours
from synthetic import as_users_run, describe, random_descriptor

from vitfeats.attention_maps import saliency
from vitfeats.errors import ConfigError, ShapeError, UnknownFacetError
from vitfeats.pca import PCA

ONE, OTHER = random_descriptor(0, batch=2), random_descriptor(1, rows=6, cols=7)


def stretched(seed: int = 0, rows: int = 6, cols: int = 7, batch: int = 1):
    """Return features with clearly different variances, so that no two components can swap by rounding."""
    d = random_descriptor(seed, rows, cols, dim=8, batch=batch)
    mix = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(99)))[0]
    return describe(d.features * torch.tensor([9.0, 6, 4, 2.5, 1.5, 1, 0.5, 0.2]) @ mix + 5, rows, cols)


# Against scikit-learn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8])
def test_it_is_scikit_learns_up_to_sign(count):
    one, other = stretched(0, batch=2), stretched(1, rows=3, cols=4)
    tokens = torch.cat([one.features.flatten(0, 1), other.features[0]]).double().numpy()
    expected = SklearnPCA(count, svd_solver="full").fit(tokens)
    found = PCA(count).fit([one, other])
    assert np.allclose(found.mean_, expected.mean_)
    assert np.allclose(found.explained_variance_, expected.explained_variance_)
    assert np.allclose(found.explained_variance_ratio_, expected.explained_variance_ratio_)
    signs = np.sign((found.components_.numpy() * expected.components_).sum(1, keepdims=True))
    assert np.allclose(found.components_, expected.components_ * signs, atol=1e-8)
    coordinates = found.transform(other)
    assert coordinates.shape == (1, 12, count)
    assert np.allclose(coordinates[0], expected.transform(other.features[0].numpy()) * signs.T, atol=1e-4)


def test_the_largest_loading_of_every_component_is_positive():
    for seed in range(5):
        components = PCA(8).fit(random_descriptor(seed, rows=6)).components_
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()


def test_components_are_orthonormal():
    components = PCA(8).fit(OTHER).components_
    assert torch.allclose(components @ components.T, torch.eye(8, dtype=components.dtype), atol=1e-10)


def test_the_order_of_images_and_tokens_does_not_matter():
    a, b = stretched(0), stretched(1)
    order = torch.randperm(42, generator=torch.Generator().manual_seed(0))
    forth, back = PCA(3).fit([a, b]), PCA(3).fit([describe(b.features[:, order], 6, 7), a])
    assert torch.allclose(forth.components_, back.components_, atol=1e-8)
    assert torch.allclose(forth.to_rgb(a), back.to_rgb(a), atol=1e-5)


def test_one_basis_is_fitted_on_all_images_and_not_one_for_each():
    a, b = stretched(0), describe(stretched(1).features.roll(3, 2) * 2, 6, 7)
    together, batch = PCA(3).fit([a, b]), describe(torch.cat([a.features, b.features]), 6, 7)
    assert torch.allclose(together.components_, PCA(3).fit(batch).components_, atol=1e-8)
    assert not torch.allclose(together.components_, PCA(3).fit(a).components_, atol=1e-2)
    # So a token has one colour, in whichever image it stands.
    mixed = describe(torch.cat([a.features[:, :20], b.features[:, 20:]], 1), 6, 7)
    rgb = torch.stack([together.to_rgb(d)[0].flatten(1) for d in (a, b, mixed)])
    assert torch.equal(rgb[2], torch.cat([rgb[0, :, :20], rgb[1, :, 20:]], 1))


def test_all_variance_is_explained_by_all_components():
    assert PCA(8).fit(OTHER).explained_variance_ratio_.sum().item() == pytest.approx(1)


def test_a_plain_image_has_components_and_colours_without_nan():
    d = describe(torch.ones(1, 12, 4), 3, 4)
    fitted = PCA(3).fit(d)
    assert fitted.explained_variance_.abs().max() < 1e-20
    assert fitted.explained_variance_ratio_.isfinite().all()
    assert fitted.to_rgb(d).isfinite().all()


def test_fit_returns_itself_and_carries_no_graph():
    fitted = PCA(3)
    features = OTHER.features.clone().requires_grad_()
    assert fitted.fit(describe(features, 6, 7)) is fitted
    assert not fitted.components_.requires_grad


# Colours --------------------------------------------------------------------------------------------------------------


def test_colours_are_the_stretched_coordinates():
    fitted = PCA(4).fit([ONE, OTHER])
    rgb = fitted.to_rgb(ONE)
    assert rgb.shape == (2, 3, 4, 5)
    coordinates = fitted.transform(ONE)[..., :3].double()
    expected = ((coordinates - fitted.low_[:3]) / (fitted.high_[:3] - fitted.low_[:3])).clamp(0, 1)
    assert torch.allclose(rgb.double(), expected.transpose(1, 2).unflatten(2, (4, 5)), atol=1e-5)


def test_one_odd_token_does_not_grey_the_rest():
    features = random_descriptor(0, rows=20, cols=20).features.clone()
    plain = PCA(3).fit(describe(features, 20, 20)).to_rgb(describe(features, 20, 20))
    features[0, 7, 0] = 60.0
    odd = PCA(3).fit(describe(features, 20, 20)).to_rgb(describe(features, 20, 20))
    assert odd.flatten(2).std(2).min() > 0.8 * plain.flatten(2).std(2).min()
    assert 0 <= odd.min() <= odd.max() <= 1


@pytest.mark.parametrize("size", [None, (13, 9), (40, 50), "source"])
def test_colours_have_the_size_asked_for(size):
    d = random_descriptor(0, rows=4, cols=5, source=(33, 47), batch=2)
    rgb = PCA(3).fit(d).to_rgb(d, size=size)
    assert rgb.shape == (2, 3, *{None: (4, 5), "source": (33, 47)}.get(size, size))
    assert rgb.min() >= 0
    assert rgb.max() <= 1


def test_images_of_several_sizes_have_no_one_source_size():
    from vitfeats.descriptor import Descriptor
    from vitfeats.grid import Frame

    frames = tuple(Frame((40, width), ONE.grid.network_size) for width in (50, 60))
    d = Descriptor(ONE.features, ONE.grid, frames, ONE.tap, ONE.model)
    with pytest.raises(
        ShapeError, match=r"one source size for size='source', got \[\(40, 50\), \(40, 60\)\]; pass d\[0\], d\[1\], …"
    ):
        PCA(3).fit(d).to_rgb(d, size="source")
    assert PCA(3).fit(d).to_rgb(d[1], size="source").shape == (1, 3, 40, 60)


# Foreground -----------------------------------------------------------------------------------------------------------


def scene(seed: int, rows: int = 8, cols: int = 9):
    """Return a descriptor of an object in the middle of another thing, and where the object is."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    mask[2:6, 3:7] = True
    kinds = 4 * torch.randn(2, 8, generator=torch.Generator().manual_seed(7))
    features = torch.where(mask.flatten()[:, None], kinds[0], kinds[1])
    return describe((features + 0.3 * torch.randn(rows * cols, 8, generator=generator))[None], rows, cols), mask


def test_the_border_tells_the_background():
    (a, mask_a), (b, mask_b) = scene(0), scene(1, rows=7, cols=11)
    fitted = PCA(3).fit([a, b], foreground="border")
    assert torch.equal(fitted.foreground(a)[0], mask_a)
    assert torch.equal(fitted.foreground(b)[0], mask_b)
    # Also on an image that it was not fitted on.
    c, mask_c = scene(2)
    assert torch.equal(fitted.foreground(c)[0], mask_c)


def test_which_end_of_the_component_the_object_is_at_does_not_matter():
    d, mask = scene(0)
    negative = describe(-d.features, 8, 9)
    assert torch.equal(PCA(3).fit(negative, foreground="border").foreground(negative)[0], mask)


def test_the_background_is_black_and_not_fitted_on():
    d, mask = scene(0)
    fitted = PCA(3).fit(d, foreground="border")
    rgb = fitted.to_rgb(d)[0]
    assert torch.equal(rgb[:, ~mask], torch.zeros_like(rgb[:, ~mask]))
    assert (rgb[:, mask] > 0).any()
    expected = SklearnPCA(3).fit(d.features[0][mask.flatten()].double().numpy())
    assert np.allclose(fitted.explained_variance_, expected.explained_variance_)


def test_fitting_again_without_a_foreground_forgets_it():
    d, _ = scene(0)
    fitted = PCA(3).fit(d, foreground="border").fit(d)
    assert fitted.foreground(d).all()


def test_saliency_tells_the_foreground():
    d, mask = scene(0)
    attention = describe((mask.flatten()[:, None] + 0.1).float().expand(-1, 2)[None], 8, 9, tap="attention@1")
    for asked in (attention, [attention]):
        fitted = PCA(3).fit(d, foreground=asked)
        assert torch.equal(fitted.foreground(d)[0], mask)
        expected = SklearnPCA(3).fit(d.features[0][mask.flatten()].double().numpy())
        assert np.allclose(fitted.explained_variance_, expected.explained_variance_)
        rgb = fitted.to_rgb(d)[0]
        assert torch.equal(rgb[:, ~mask], torch.zeros_like(rgb[:, ~mask]))
    other, _ = scene(1)
    with pytest.raises(ConfigError, match="one of the fitted descriptors: the foreground came from their saliency"):
        fitted.foreground(other)


def test_a_foreground_that_is_none_of_these_is_refused():
    d, _ = scene(0)
    with (
        as_users_run(),
        pytest.raises(ConfigError, match="expected foreground None, 'border' or an attention descriptor, got 'centre'"),
    ):
        PCA(3).fit(d, foreground="centre")
    with pytest.raises(UnknownFacetError, match="expected a descriptor of the facet 'attention', got 'key@1'"):
        PCA(3).fit(d, foreground=d)
    attention = describe(torch.rand(1, 72, 2), 8, 9, tap="attention@1")
    with pytest.raises(ConfigError, match=r"one attention descriptor for each fitted one \(2\), got 1"):
        PCA(3).fit([d, d], foreground=attention)
    smaller = describe(torch.rand(1, 6, 2), 2, 3, tap="attention@1")
    with pytest.raises(ShapeError, match=r"expected attention on the same images and grid, got 1 of PatchGrid\(rows=2"):
        PCA(3).fit(d, foreground=smaller)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1])
def test_no_components_are_refused(count):
    with pytest.raises(ConfigError, match=f"expected n_components of at least 1, got {count}"):
        PCA(count)


def test_too_few_tokens_or_channels_are_refused():
    message = r"expected at least 3 tokens and 3 channels for 3 components, got {} tokens of {}"
    with pytest.raises(ShapeError, match=message.format(2, 8)):
        PCA(3).fit(random_descriptor(0, rows=1, cols=2))
    with pytest.raises(ShapeError, match=message.format(20, 2)):
        PCA(3).fit(random_descriptor(0, dim=2))
    with pytest.raises(ShapeError, match="expected at least 2 tokens and 1 channels"):
        PCA(1).fit(random_descriptor(0, rows=1, cols=1))


def test_channels_must_agree():
    with pytest.raises(ShapeError, match=r"expected descriptors with as many channels, got \[7, 8\]"):
        PCA(3).fit([ONE, random_descriptor(0, dim=7)])
    with pytest.raises(ShapeError, match="expected descriptors of 8 channels, as fitted, got 7"):
        PCA(3).fit(ONE).transform(random_descriptor(0, dim=7))


def test_nothing_to_fit_on_is_refused():
    with pytest.raises(ShapeError, match="expected at least one descriptor, got none"):
        PCA(3).fit([])


def test_asking_before_fitting_is_refused():
    for ask in (PCA(3).transform, PCA(3).foreground, PCA(3).to_rgb):
        with pytest.raises(ConfigError, match="expected a fitted PCA; call fit first"):
            ask(ONE)


def test_colours_need_three_components():
    with pytest.raises(ConfigError, match=r"n_components of at least 3 for colours, got 2; fit PCA\(3\)"):
        PCA(2).fit(ONE).to_rgb(ONE)


def test_constant_features_in_half_precision_are_no_nan():
    constant = describe(torch.ones(1, 20, 8, dtype=torch.float16), 4, 5)
    assert bool(PCA(3).fit(constant).to_rgb(constant).isfinite().all())
    looks = describe(torch.ones(1, 20, 2, dtype=torch.float16), 4, 5, tap="attention@1")
    assert bool(saliency(looks).isfinite().all())


def test_what_no_pca_can_be_fitted_on():
    d = random_descriptor(0)
    with as_users_run():
        with pytest.raises(ConfigError, match="a Descriptor or a list of them, got Tensor"):
            PCA(3).fit(d.features)
        with pytest.raises(ConfigError, match="a Descriptor or a list of them, got int"):
            PCA(3).fit(d, foreground=5)
        with pytest.raises(ConfigError, match="n_components of at least 1, got 2.5; pass a whole number"):
            PCA(2.5)
        fitted = PCA(3).fit(d)
        with pytest.raises(ShapeError, match=r"size None, 'source' or \(height, width\), got 100"):
            fitted.to_rgb(d, size=100)
        with pytest.raises(ShapeError, match="a size in whole pixels"):
            fitted.to_rgb(d, size="sorce")
        with pytest.raises(ShapeError, match=r"a sequence of heads, got 0; one head: heads=\(0,\)"):
            saliency(describe(torch.ones(1, 20, 2), 4, 5, tap="attention@1"), heads=0)
