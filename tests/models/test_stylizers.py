"""Files of style transfer: the published layouts with random weights, our own, and what is refused."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitfeats.errors import ConfigError, WeightsUnavailableError
from vitfeats.models.stylizers import CHANNELS, TRAINED, Settings, load_network, pack, settings_of
from vitfeats.nets.stylizing import NETWORKS

SMALL = (4, 6, 8, 10, 10)
METHODS = sorted(NETWORKS)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _maps(height: int, width: int, seed: int = 0) -> list[Tensor]:
    return [
        torch.rand(1, channels, height >> level, width >> level, generator=_rng(10 * seed + level))
        for level, channels in enumerate(SMALL)
    ]


def _conv(state: dict[str, Tensor], name: str, outputs: int, inputs: int, side: int = 1) -> None:
    """Add a random convolution to a state dict."""
    rng = _rng(len(state))
    state[f"{name}.weight"] = torch.randn(outputs, inputs, side, side, generator=rng) / (inputs * side**2) ** 0.5
    state[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=rng)


def _decoder_layers(beside: int = 0) -> list[nn.Module]:
    """The published decoder layer by layer, with few channels."""
    one, two, three, four = SMALL[:4]

    def conv(before: int, after: int) -> list[nn.Module]:
        return [nn.ReflectionPad2d(1), nn.Conv2d(before, after, 3), nn.ReLU()]

    def up() -> nn.Module:
        return nn.Upsample(scale_factor=2, mode="nearest")

    layers = [*conv(four, three), up(), *conv(three + beside, three), *conv(three, three), *conv(three, three)]
    layers += [*conv(three, two), up(), *conv(two, two), *conv(two, one), up(), *conv(one, one), *conv(one, 3)[:2]]
    assert len(layers) == 29
    return layers


def _adaattn_files(folder) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {"adaattn_3": {}, "transformer": {}, "decoder": {}}
    for part, prefix, level in (
        ("adaattn_3", "", 3), ("transformer", "attn_adain_4_1.", 4), ("transformer", "attn_adain_5_1.", 5),
    ):  # fmt: skip
        keys, channels = sum(SMALL[:level]), SMALL[level - 1]
        for name, size in (("f", keys), ("g", keys), ("h", channels)):
            _conv(states[part], prefix + name, size, size)
    _conv(states["transformer"], "merge_conv", SMALL[3], SMALL[3], 3)
    layers = _decoder_layers(beside=SMALL[2])
    parts = {"decoder_layer_1": nn.Sequential(*layers[:4]), "decoder_layer_2": nn.Sequential(*layers[4:])}
    states["decoder"] = nn.ModuleDict(parts).state_dict()
    for part, state in states.items():
        torch.save(state, folder / f"latest_net_{part}.pth")
    return states


def _sanet_files(folder) -> tuple[dict[str, Tensor], nn.Sequential]:
    state: dict[str, Tensor] = {}
    for level in ("4_1", "5_1"):
        for name in ("f", "g", "h", "out_conv"):
            _conv(state, f"sanet{level}.{name}", SMALL[3], SMALL[3])
    _conv(state, "merge_conv", SMALL[3], SMALL[3], 3)
    decoder = nn.Sequential(*_decoder_layers())
    torch.save(state, folder / "transformer_iter_500000.pth")
    torch.save(decoder.state_dict(), folder / "decoder_iter_500000.pth")
    return state, decoder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# The published computation, from the published names ------------------------------------------------------------------


def _normalised(x: Tensor) -> Tensor:
    std = (x.flatten(2).var(2) + 1e-5).sqrt()[..., None, None]
    return (x - x.flatten(2).mean(2)[..., None, None]) / std


def _applied(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return torch.einsum("bdn,bdm->bnm", query.flatten(2), key.flatten(2)).softmax(2)


def _keys(maps: list[Tensor], level: int) -> Tensor:
    size = maps[level].shape[2:]
    return torch.cat([_normalised(F.interpolate(x, size)) for x in maps[: level + 1]], 1)


def _adaattn(state: dict[str, Tensor], prefix: str, content: list[Tensor], style: list[Tensor], level: int) -> Tensor:
    query, key = (
        _applied(state, prefix + "f", _keys(content, level)),
        _applied(state, prefix + "g", _keys(style, level)),
    )
    weights, values = _weights(query, key), _applied(state, prefix + "h", style[level]).flatten(2)
    mean = torch.einsum("bnm,bcm->bcn", weights, values)
    std = (torch.einsum("bnm,bcm->bcn", weights, values**2) - mean**2).relu().sqrt()
    shape = content[level].shape
    return std.reshape(shape) * _normalised(content[level]) + mean.reshape(shape)


def _sanet(state: dict[str, Tensor], prefix: str, content: Tensor, style: Tensor) -> Tensor:
    query, key = _applied(state, prefix + "f", _normalised(content)), _applied(state, prefix + "g", _normalised(style))
    values = _applied(state, prefix + "h", style).flatten(2)
    attended = torch.einsum("bnm,bcm->bcn", _weights(query, key), values).reshape(content.shape)
    return _applied(state, prefix + "out_conv", attended) + content


def _merged(state: dict[str, Tensor], four: Tensor, five: Tensor) -> Tensor:
    return _applied(state, "merge_conv", nn.ReflectionPad2d(1)(four + F.interpolate(five, scale_factor=2)))


@torch.no_grad()
def test_published_adaattn_is_read_and_computes_the_published_image(tmp_path):
    states = _adaattn_files(tmp_path)
    content, style = _maps(32, 48), _maps(48, 32, seed=1)
    decoder = nn.ModuleDict(
        {f"decoder_layer_{number + 1}": nn.Sequential(*part)
         for number, part in enumerate((_decoder_layers(8)[:4], _decoder_layers(8)[4:]))}
    )  # fmt: skip
    decoder.load_state_dict(states["decoder"])
    four, five = (
        _adaattn(states["transformer"], f"attn_adain_{level + 1}_1.", content, style, level) for level in (3, 4)
    )
    first = decoder["decoder_layer_1"](_merged(states["transformer"], four, five))
    beside = _adaattn(states["adaattn_3"], "", content, style, 2)
    wanted = decoder["decoder_layer_2"](torch.cat([first, beside], 1))
    network = load_network(tmp_path, SMALL)
    assert network.method == "adaattn"
    torch.testing.assert_close(network(content, style), wanted, rtol=1e-4, atol=1e-4)
    assert settings_of(tmp_path) == Settings("adaattn", CHANNELS, (64, 128, 256), None, "vgg_normalised")


@torch.no_grad()
def test_published_sanet_is_read_from_its_folder_or_its_first_file(tmp_path):
    state, decoder = _sanet_files(tmp_path)
    content, style = _maps(32, 48), _maps(48, 32, seed=1)
    four, five = (_sanet(state, f"sanet{level + 1}_1.", content[level], style[level]) for level in (3, 4))
    wanted = decoder(_merged(state, four, five))
    for file in (tmp_path, tmp_path / "transformer_iter_500000.pth"):
        network = load_network(str(file), SMALL)
        assert network.method == settings_of(file).method == "sanet"
        torch.testing.assert_close(network(content, style), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_published_adain_is_read(tmp_path):
    decoder = nn.Sequential(*_decoder_layers())
    torch.save(decoder.state_dict(), tmp_path / "decoder.pth")
    content, style = _maps(32, 48), _maps(48, 32, seed=1)
    std, mean = torch.std_mean(style[3], (2, 3), keepdim=True)
    network = load_network(tmp_path / "decoder.pth", SMALL)
    assert network.method == settings_of(tmp_path / "decoder.pth").method == "adain"
    for name, value in load_network(tmp_path, SMALL).state_dict().items():  # its folder does as well
        assert torch.equal(value, network.state_dict()[name])
    wanted = decoder(_normalised(content[3]) * (std**2 + 1e-5).sqrt() + mean)
    torch.testing.assert_close(network(content, style), wanted, rtol=1e-4, atol=1e-4)


def test_networks_are_ready_to_use_and_to_train_further(tmp_path):
    torch.save(nn.Sequential(*_decoder_layers()).state_dict(), tmp_path / "decoder.pth")
    network = load_network(tmp_path / "decoder.pth", SMALL)
    assert not network.training
    assert all(p.requires_grad and p.device.type == "cpu" and p.dtype == torch.float32 for p in network.parameters())


def test_names_may_carry_module(tmp_path):
    states = _adaattn_files(tmp_path)
    plain = load_network(tmp_path, SMALL).state_dict()
    for part, state in states.items():
        torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / f"latest_net_{part}.pth")
    found = load_network(tmp_path, SMALL).state_dict()
    assert all(torch.equal(plain[name], found[name]) for name in plain)


# What we write --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_what_is_packed_comes_back(method, tmp_path):
    file = tmp_path / "style.safetensors"
    network = NETWORKS[method](SMALL, (3, 5, 7), 2, generator=_rng(0))
    pack(network, file, encoder="vgg_mini")
    assert settings_of(file) == Settings(method, SMALL, (3, 5, 7), 2, "vgg_mini")
    found = load_network(file, SMALL)
    assert (found.method, found.channels, found.widths, found.inner) == (method, SMALL, (3, 5, 7), 2)
    for name, value in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], value.half().float()), name
    maps = _maps(32, 48), _maps(48, 32, seed=1)
    torch.testing.assert_close(found(*maps), network.half().float()(*maps))
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    assert load_network(file).channels == SMALL


def test_the_folder_of_a_training_is_read(tmp_path):
    network = NETWORKS["sanet"](SMALL, (4, 4, 4), 4, generator=_rng(1))
    pack(network, tmp_path / TRAINED, encoder="tiny")
    assert settings_of(tmp_path).encoder == "tiny"
    for name, value in load_network(tmp_path).state_dict().items():
        assert torch.allclose(value, network.state_dict()[name], atol=1e-3), name


def test_a_packed_network_for_other_channels_is_refused(tmp_path):
    pack(NETWORKS["adain"](SMALL), tmp_path / "style.safetensors", encoder="vgg_mini")
    with pytest.raises(
        ConfigError, match=r"expected a network for maps with \(64, .*style\.safetensors' is for \(4, 6"
    ):
        load_network(tmp_path / "style.safetensors", CHANNELS)


def test_weights_that_16_bits_cannot_hold_are_not_written(tmp_path):
    network = NETWORKS["adain"](SMALL)
    with torch.no_grad():
        network.decoder.convs[2].bias[0] = 1e6
    with pytest.raises(
        ConfigError, match=r"expected weights that 16-bit floats can hold, .* in decoder\.convs\.2\.bias"
    ):
        pack(network, tmp_path / "style.safetensors", encoder="vgg_mini")
    assert not list(tmp_path.iterdir())


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["adaattn_3", "transformer", "decoder"])
def test_a_missing_file_of_adaattn_is_named(part, tmp_path):
    _adaattn_files(tmp_path)
    os.remove(tmp_path / f"latest_net_{part}.pth")
    for function in (load_network, settings_of):
        with pytest.raises(WeightsUnavailableError, match=rf"at '.*latest_net_{part}\.pth', but there is no such file"):
            function(tmp_path)


def test_missing_extra_and_bent_names_are_refused_with_the_file(tmp_path):
    states = _adaattn_files(tmp_path)
    file = tmp_path / "latest_net_decoder.pth"
    state = dict(states["decoder"])
    state["decoder_layer_9.weight"] = state.pop("decoder_layer_2.21.weight")
    state["fc.weight"] = torch.zeros(3)
    state["decoder_layer_1.1.bias"] = torch.zeros(99)
    torch.save(state, file)
    with pytest.raises(
        ConfigError, match=r"'adaattn' for maps with .*latest_net_decoder\.pth' has names 1 missing"
    ) as found:
        load_network(tmp_path, SMALL)
    assert "1 missing (decoder_layer_2.21.weight)" in str(found.value)
    assert "2 unexpected (decoder_layer_9.weight, fc.weight)" in str(found.value)
    assert "1 of another shape (decoder_layer_1.1.bias: (99,) instead of (8,))" in str(found.value)


def test_weights_for_other_channels_are_refused(tmp_path):
    torch.save(nn.Sequential(*_decoder_layers()).state_dict(), tmp_path / "decoder.pth")
    with pytest.raises(
        ConfigError, match=r"17 of another shape \(1\.weight: \(8, 10, 3, 3\) instead of \(256, 512, 3, 3\)"
    ):
        load_network(tmp_path / "decoder.pth")


def test_a_file_of_another_method_is_refused(tmp_path):
    _sanet_files(tmp_path)
    os.rename(tmp_path / "transformer_iter_500000.pth", tmp_path / "decoder.pth")
    with pytest.raises(ConfigError, match=r"expected weights of 'adain' .*18 missing \(1\.weight.*18 unexpected"):
        load_network(tmp_path / "decoder.pth", SMALL)


def test_folders_that_leave_open_what_is_meant_are_refused(tmp_path):
    with pytest.raises(WeightsUnavailableError, match=r"expected latest_net_adaattn_3\.pth, .* got none of them"):
        load_network(tmp_path)
    with pytest.raises(WeightsUnavailableError, match=r"none\.pth', but there is no such file"):
        load_network(tmp_path / "none.pth")
    with pytest.raises(WeightsUnavailableError, match=r"none\.safetensors', but there is no such file"):
        load_network(tmp_path / "none.safetensors")
    _sanet_files(tmp_path)
    torch.save({}, tmp_path / "transformer_iter_78000.pth")
    with pytest.raises(
        ConfigError, match=r"one transformer_iter_….pth in '.*', got transformer_iter_500000\.pth, trans"
    ):
        load_network(tmp_path)


class _Harm:
    def __reduce__(self):
        return (os.mkdir, ("harmed",))


def test_no_code_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"1.weight": _Harm()}, tmp_path / "decoder.pth")
    with pytest.raises(WeightsUnavailableError, match="refused to read"):
        load_network(tmp_path / "decoder.pth")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [1, 2]}, "but the header of"),
        ({"channels": [1, 2, 3, 4, -5]}, "but the header of"),
        ({"channels": [10**9] * 5}, "but the header of"),
        ({"inner": "3"}, "but the header of"),
        ({"method": None}, "but the header of"),
        ({"more": 1}, "but the header of"),
    ],
)
def test_damaged_headers_are_refused(change, message, tmp_path):
    file = tmp_path / "style.safetensors"
    said = {"method": "adain", "channels": list(SMALL), "widths": [4, 6, 8], "inner": None, "encoder": "vgg_mini"}
    save_file({"a": torch.zeros(1)}, file, metadata={"stylizer": json.dumps({**said, **change})})
    with pytest.raises(WeightsUnavailableError, match=message):
        load_network(file)


def test_files_of_others_are_refused(tmp_path):
    file = tmp_path / "style.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(WeightsUnavailableError, match=r"stylizers\.pack wrote, but the header of '.*' says None"):
        settings_of(file)
    save_file({"a": torch.zeros(1)}, file, metadata={"stylizer": "{"})
    with pytest.raises(WeightsUnavailableError, match="but it is damaged"):
        settings_of(file)
    file.write_bytes(b"nothing")
    with pytest.raises(WeightsUnavailableError, match="but it is damaged"):
        settings_of(file)


def test_an_unknown_method_and_cut_weights_are_refused(tmp_path):
    file = tmp_path / "style.safetensors"
    pack(NETWORKS["adain"](SMALL), file, encoder="vgg_mini")
    with safe_open(file, framework="pt") as opened:
        said, weights = json.loads(opened.metadata()["stylizer"]), load_file(file)
    save_file(weights, file, metadata={"stylizer": json.dumps({**said, "method": "adaattm"})})
    with pytest.raises(ConfigError, match=r"is of 'adaattm'\. Did you mean 'adaattn'"):
        load_network(file)
    del weights["decoder.convs.3.bias"]
    save_file(weights, file, metadata={"stylizer": json.dumps(said)})
    with pytest.raises(ConfigError, match=r"1 missing \(decoder\.convs\.3\.bias\)"):
        load_network(file)
