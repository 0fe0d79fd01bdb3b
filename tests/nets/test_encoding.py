"""Tokens and a summary of any network, and what it sees where patches are hidden from it."""

import pytest
import timm
import torch
from torch import Tensor, nn

from vitfeats.errors import ConfigError
from vitfeats.nets.encoding import encode


def vit(**settings) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, img_size=48, **settings).eval()


class Conv(nn.Module):
    """A network that gives a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 8, 8)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.conv(images)


IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.4
MASK = torch.randn(64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_a_vision_transformer_says_its_cls_token_and_its_patches():
    net = vit()
    tokens = net.forward_features(IMAGES)
    found = encode(net, IMAGES)
    assert torch.equal(found.summary, tokens[:, 0])
    assert torch.equal(found.patches, tokens[:, 1:])


@pytest.mark.parametrize(("settings", "prefix"), [({}, 0), ({"reg_tokens": 2}, 2)])
@torch.no_grad()
def test_without_a_cls_token_the_summary_is_the_mean_of_patches(settings, prefix):
    net = vit(class_token=False, global_pool="avg", **settings)
    tokens = net.forward_features(IMAGES)
    found = encode(net, IMAGES)
    assert torch.equal(found.patches, tokens[:, prefix:])
    assert found.patches.shape == (2, 9, 64)
    torch.testing.assert_close(found.summary, tokens[:, prefix:].mean(1))


@torch.no_grad()
def test_registers_are_no_patches():
    found = encode(vit(reg_tokens=3), IMAGES)
    assert found.patches.shape == (2, 9, 64)


@torch.no_grad()
def test_a_map_is_read_row_by_row():
    net = Conv()
    found, wanted = encode(net, IMAGES), net.conv(IMAGES)
    assert found.patches.shape == (2, 36, 5)
    for row, col in ((0, 0), (2, 3), (5, 1)):
        assert torch.equal(found.patches[:, 6 * row + col], wanted[:, :, row, col])
    torch.testing.assert_close(found.summary, wanted.mean((2, 3)))


@pytest.mark.parametrize("settings", [{}, {"dynamic_img_size": False}, {"class_token": False, "global_pool": "avg"}])
@torch.no_grad()
def test_hidden_patches_are_the_mask_put_in_by_hand(settings):
    net = vit(**settings)
    seen = net.patch_embed(IMAGES)
    flat = seen.reshape(2, 9, 64).clone()
    for image in range(2):
        for patch in range(9):
            if HIDDEN[image, patch]:
                flat[image, patch] = MASK
    tokens = net.norm(net.blocks(net.norm_pre(net._pos_embed(flat.reshape(seen.shape)))))
    found = encode(net, IMAGES, hidden=HIDDEN, mask=MASK)
    torch.testing.assert_close(found.patches, tokens[:, net.num_prefix_tokens :])
    assert not torch.allclose(found.summary, encode(net, IMAGES).summary)


@torch.no_grad()
def test_what_is_hidden_is_not_seen():
    net = vit()
    pixels = HIDDEN.reshape(2, 1, 3, 3).repeat_interleave(16, 2).repeat_interleave(16, 3)
    other = torch.where(pixels, 5.0, IMAGES)
    one, two = (encode(net, images, hidden=HIDDEN, mask=MASK) for images in (IMAGES, other))
    assert torch.equal(one.patches, two.patches)
    assert not torch.allclose(encode(net, IMAGES).patches, encode(net, other).patches)
    none = encode(net, IMAGES, hidden=torch.zeros_like(HIDDEN), mask=MASK)
    assert torch.equal(none.patches, encode(net, IMAGES).patches)


def test_the_mask_is_learned_where_something_is_hidden():
    net, mask = vit(), MASK.clone().requires_grad_()
    encode(net, IMAGES, hidden=HIDDEN, mask=mask).patches.square().sum().backward()
    assert float(mask.grad.abs().sum()) > 0


@torch.no_grad()
def test_no_hook_is_left_behind():
    net = vit()
    encode(net, IMAGES, hidden=HIDDEN, mask=MASK)
    assert not net.patch_embed._forward_hooks
    with pytest.raises(AssertionError):
        encode(net, IMAGES[:, :, :47], hidden=HIDDEN, mask=MASK)
    with pytest.raises(RuntimeError):
        encode(net, IMAGES, hidden=HIDDEN[:, :4], mask=MASK)
    assert not net.patch_embed._forward_hooks
    assert torch.equal(encode(net, IMAGES).patches, net.forward_features(IMAGES)[:, 1:])


def test_patches_of_a_network_without_any_cannot_be_hidden():
    with pytest.raises(ConfigError, match="expected a vision transformer to hide patches from, got Conv; set masked=0"):
        encode(Conv(), IMAGES, hidden=HIDDEN, mask=MASK)
