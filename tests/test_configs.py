"""Settings: presets, ranges, and YAML that comes back as it was and refuses what it does not know."""

import dataclasses
import re
import subprocess
import sys

import pytest

from vitfeats.configs import (
    COSEGMENT_PRESETS,
    INVERT_PRESETS,
    PCK_PROTOCOLS,
    SPLICE_PRESETS,
    STYLE_METHODS,
    CosegmentConfig,
    ExtractorConfig,
    InvertConfig,
    PckProtocol,
    SpliceConfig,
    TrainStylizerConfig,
    plain_config,
    read_config,
    write_config,
)
from vitfeats.errors import ConfigError

pytestmark = pytest.mark.usefixtures("as_a_user")

PRESETS = [(SpliceConfig, name) for name in SPLICE_PRESETS] + [(InvertConfig, name) for name in INVERT_PRESETS]
PRESETS += [(TrainStylizerConfig, name) for name in STYLE_METHODS]
PRESETS += [(CosegmentConfig, name) for name in COSEGMENT_PRESETS]


@pytest.fixture
def file(tmp_path):
    """A YAML file: call it with its text, get its path."""

    def write(text: str):
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_reference_has_the_published_numbers():
    config = SpliceConfig.preset("reference")
    published = {
        "appearance": 10,
        "structure": 1,
        "identity": 1,
        "whole_appearance": 10,
        "whole_structure": 1,
        "transport": 0,
        "relative": False,
        "whole_every": 75,
        "warmup": 1,
        "structure_tap": "key@-1",
        "appearance_tap": "cls@-1",
        "size": 224,
        "max_size": 480,
        "stride": None,
        "resize": "published",
        "views": 0,
        "smallest_crop": 0.95,
        "flip": 0.5,
        "jitter": 0.5,
        "blur": 0.2,
        "working_size": None,
        "residual": False,
        "channels": (16, 32, 64, 128, 128),
        "steps": 10_000,
        "lr": 0.002,
        "betas": (0.0, 0.99),
        "schedule": "constant",
        "dtype": "float32",
    }
    assert {name: getattr(config, name) for name in published} == published


@pytest.mark.parametrize(("kind", "name"), PRESETS)
def test_every_preset_comes_back_from_yaml(kind, name, file):
    config = kind.preset(name)
    assert read_config(file(write_config(config)), kind) == config
    assert len(write_config(config).splitlines()) >= len(dataclasses.fields(kind))
    assert read_config(file(f"preset: {name}"), kind) == config


def test_a_preset_is_the_defaults_with_changes():
    assert SpliceConfig.preset() == SpliceConfig.preset("fast") == SpliceConfig()
    assert SpliceConfig.preset("draft", lr=0.5).lr == 0.5
    assert SpliceConfig.preset("reference", steps=3) == dataclasses.replace(SpliceConfig.preset("reference"), steps=3)


def test_unknown_presets_and_settings_offer_the_nearest():
    with pytest.raises(ConfigError, match="expected a preset, got 'refrence'. Did you mean 'reference'"):
        SpliceConfig.preset("refrence")
    with pytest.raises(ConfigError, match="expected a preset, got 'slow'. Known: draft, fast, reference"):
        InvertConfig.preset("slow")
    with pytest.raises(
        ConfigError, match="expected a setting of SpliceConfig, got 'strutcure'. Did you mean 'structure"
    ):
        SpliceConfig.preset("fast", strutcure=1.0)


def test_yaml_changes_a_preset_or_a_base(file):
    path = file("preset: reference\nsteps: 12\nbetas: [0.1, 0.9]\ntransport_taps: [token@1]\n")
    wanted = SpliceConfig.preset("reference", steps=12, betas=(0.1, 0.9), transport_taps=("token@1",))
    assert read_config(path, SpliceConfig) == wanted
    base = SpliceConfig(lr=0.5, size=112)
    assert read_config(file("steps: 3"), SpliceConfig, base=base) == dataclasses.replace(base, steps=3)
    # YAML takes 2e-3 for a text.
    assert read_config(file("lr: 2e-3"), SpliceConfig).lr == 0.002
    assert read_config(file("lr: 1"), SpliceConfig).lr == 1.0
    assert read_config(file("working_size: null\nstride: 8"), SpliceConfig).working_size is None


def test_an_empty_file_is_the_defaults(file):
    assert read_config(file(""), SpliceConfig) == SpliceConfig()
    assert read_config(file("# nothing\n"), SpliceConfig, base=SpliceConfig(lr=0.5)).lr == 0.5
    assert read_config(file("size: [112, 64]\nstride: 8"), ExtractorConfig) == ExtractorConfig(size=(112, 64), stride=8)


def test_yaml_that_is_not_understood_names_its_file(file, tmp_path):
    def refused(text: str, message: str) -> None:
        path = file(text)
        with pytest.raises(ConfigError, match=message.replace("FILE", re.escape(str(path)))):
            read_config(path, SpliceConfig)

    refused("stepps: 3", "expected settings of SpliceConfig in 'FILE', got 'stepps'. Did you mean 'steps'")
    refused("1: 3", "expected settings of SpliceConfig in 'FILE', got 1. Known: ")
    refused("steps: many", "expected settings of SpliceConfig in 'FILE', but: steps: .*integer")
    refused("steps: 2.5", "but: steps: .*integer")
    refused("betas: [0.1]", "in 'FILE', but: betas")
    refused("schedule: linear", "in 'FILE', but: schedule: .*'constant' or 'cosine'")
    refused("steps: 0", "in 'FILE', but: settings: .*expected steps of at least 1, got 0")
    refused("lr: .nan", "expected lr of at least 0, got nan")
    refused("preset: slow", "expected a preset, got 'slow'. Known: draft, fast, reference")
    refused("preset: [fast]", r"expected a preset, got \['fast'\]")
    refused("- steps: 3", "expected settings, 'name: value', one a line, in 'FILE', got list")
    refused("just words", "in 'FILE', got str")
    refused("steps: [", "expected settings in YAML at 'FILE', but: ")
    with pytest.raises(ConfigError, match=f"expected settings in YAML at '{tmp_path}/none.yaml', but: .*No such file"):
        read_config(tmp_path / "none.yaml", SpliceConfig)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=f"expected settings in YAML at '{tmp_path}/bytes.yaml', but: "):
        read_config(tmp_path / "bytes.yaml", SpliceConfig)


def test_yaml_runs_no_code(file, tmp_path):
    with pytest.raises(ConfigError, match="expected settings in YAML"):
        read_config(file(f"steps: !!python/object/apply:os.mkdir ['{tmp_path}/harm']"), SpliceConfig)
    assert not (tmp_path / "harm").exists()


def test_plain_settings_are_numbers_texts_and_lists():
    plain = plain_config(SpliceConfig())
    assert plain["betas"] == list(SpliceConfig().betas)
    assert plain["working_size"] == SpliceConfig().working_size
    assert list(plain) == [field.name for field in dataclasses.fields(SpliceConfig)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "expected steps of at least 1, got 0"),
        ({"size": 0}, "expected size of at least 1, got 0"),
        ({"whole_every": 0}, "expected whole_every of at least 1, got 0"),
        ({"stride": 0}, "expected stride of at least 1, got 0"),
        ({"working_size": 0}, "expected working_size of at least 1, got 0"),
        ({"appearance": -1.0}, "expected appearance of at least 0, got -1.0"),
        ({"identity": float("nan")}, "expected identity of at least 0, got nan"),
        ({"transport": -0.5}, "expected transport of at least 0, got -0.5"),
        ({"place": -1}, "expected place of at least 0, got -1"),
        ({"views": -1}, "expected views of at least 0, got -1"),
        ({"warmup": -1}, "expected warmup of at least 0, got -1"),
        ({"lr": -1}, "expected lr of at least 0, got -1"),
        ({"patience": -1}, "expected patience of at least 0, got -1"),
        ({"checkpoint_every": -1}, "expected checkpoint_every of at least 0, got -1"),
        ({"snapshot_every": -1}, "expected snapshot_every of at least 0, got -1"),
        ({"flip": 1.5}, "expected flip of at least 0 and at most 1, got 1.5"),
        ({"jitter": float("nan")}, "expected jitter of at least 0 and at most 1, got nan"),
        ({"blur": -0.1}, "expected blur of at least 0 and at most 1, got -0.1"),
        ({"smallest_crop": 0}, "expected smallest_crop in 0..1 and not 0, got 0"),
        ({"smallest_crop": 1.01}, "expected smallest_crop in 0..1 and not 0, got 1.01"),
        ({"betas": (0.5, 1.0)}, r"expected betas of at least 0 and below 1, got \(0.5, 1.0\)"),
        ({"max_size": 200}, r"expected max_size of at least size \(224\), got 200"),
        ({"schedule": "linear"}, "expected schedule 'constant' or 'cosine', got 'linear'"),
        ({"resize": "bicubic"}, "expected resize 'antialiased' or 'published', got 'bicubic'"),
        (
            {"appearance": 0, "structure": 0, "transport": 0},
            "expected at least one weight above 0, got none; nothing would be optimised",
        ),
    ],
)
def test_numbers_that_no_run_could_use_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SpliceConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "expected steps of at least 0, got -1"),
        ({"overlap": 0}, "expected overlap of at least 1, got 0"),
        ({"schedule": "linear"}, "expected schedule 'constant' or 'cosine', got 'linear'"),
        ({"noise": ((0.5, 1.0), (0.0, 2.0))}, r"expected noise as pairs .* got \(\(0.5, 1.0\), \(0.0, 2.0\)\)"),
        ({"noise": ((0.0, -1.0),)}, "expected noise as pairs"),
    ],
)
def test_an_inversion_refuses_them_too(changes, message):
    with pytest.raises(ConfigError, match=message):
        InvertConfig(**changes)


def test_training_of_style_transfer_has_the_published_numbers():
    none = dict.fromkeys(("content", "style", "local", "identity"), 0)
    published = {
        "adaattn": none | {"style": 10, "local": 3, "style_levels": (2, 3, 4, 5), "lr": 1e-4 * 2, "batch": 8},
        "sanet": none | {"content": 1, "style": 3, "identity": 50, "style_levels": (1, 2, 3, 4, 5), "batch": 5},
        "adain": none | {"content": 1, "style": 10, "style_levels": (1, 2, 3, 4), "lr": 1e-4, "batch": 8},
    }
    assert tuple(published) == STYLE_METHODS
    for name, numbers in published.items():
        config = TrainStylizerConfig.preset(name)
        assert config.method == name
        assert {setting: getattr(config, setting) for setting in numbers} == numbers
        assert (config.size, config.load, config.most, config.warmup, config.clip) == (256, 512, 4096, 0, 0)
        assert (config.widths, config.inner, config.encoder, config.start) == (None, None, "vgg_mini", "")
    assert TrainStylizerConfig() == TrainStylizerConfig.preset() == TrainStylizerConfig.preset("adaattn")


def test_widths_and_levels_may_be_lists():
    config = TrainStylizerConfig(widths=[4, 5, 6], style_levels=[1, 2])
    assert (config.widths, config.style_levels) == ((4, 5, 6), (1, 2))
    assert hash(config) == hash(TrainStylizerConfig(widths=(4, 5, 6), style_levels=(1, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "wct"}, "expected method 'adaattn', 'sanet' or 'adain', got 'wct'"),
        ({"schedule": "linear"}, "expected schedule 'constant' or 'cosine', got 'linear'"),
        ({"size": 16}, "expected size of at least 32, got 16"),
        ({"size": 40}, "expected a size that is a multiple of 16, got 40"),
        ({"load": 0}, "expected load of at least 1, got 0"),
        ({"load": 255}, "expected load of at least the size 256, got 255"),
        ({"steps": 0}, "expected steps of at least 1, got 0"),
        ({"batch": 0}, "expected batch of at least 1, got 0"),
        ({"most": 0}, "expected most of at least 1, got 0"),
        ({"inner": 0}, "expected inner of at least 1, got 0"),
        ({"widths": (4, 4)}, r"expected three widths of at least 1, got \(4, 4\)"),
        ({"widths": [4, 4, 0]}, r"expected three widths of at least 1, got \(4, 4, 0\)"),
        ({"style_levels": ()}, r"expected style_levels from 1 to 5, got \(\)"),
        ({"style_levels": (0, 1)}, r"expected style_levels from 1 to 5, got \(0, 1\)"),
        ({"style_levels": [6]}, r"expected style_levels from 1 to 5, got \(6,\)"),
        ({"crop": 0.0}, "expected a crop above 0, got 0"),
        ({"crop": 1.5}, "expected crop of at least 0 and at most 1, got 1.5"),
        ({"lr": float("nan")}, "expected lr of at least 0, got nan"),
        ({"warmup": -1}, "expected warmup of at least 0, got -1"),
        ({"clip": -1.0}, "expected clip of at least 0, got -1.0"),
        ({"local": -0.5}, "expected local of at least 0, got -0.5"),
        ({"identity": -1.0}, "expected identity of at least 0, got -1.0"),
        ({"content": float("nan")}, "expected content of at least 0, got nan"),
        ({"checkpoint_every": -1}, "expected checkpoint_every of at least 0, got -1"),
        ({"snapshot_every": -1}, "expected snapshot_every of at least 0, got -1"),
        ({"style": 0.0, "local": 0.0}, "expected a loss with a weight above 0, got none"),
    ],
)
def test_a_training_of_style_transfer_refuses_them_too(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainStylizerConfig(**changes)


def test_methods_and_settings_of_style_transfer_offer_the_nearest(file):
    with pytest.raises(ConfigError, match="expected a preset, got 'sannet'. Did you mean 'sanet'"):
        TrainStylizerConfig.preset("sannet")
    with pytest.raises(
        ConfigError, match="expected a setting of TrainStylizerConfig, got 'stile'. Did you mean 'style'"
    ):
        TrainStylizerConfig.preset("adain", stile=1.0)
    with pytest.raises(ConfigError, match="but: settings: .*expected a size that is a multiple of 16, got 40"):
        read_config(file("size: 40"), TrainStylizerConfig)


def test_the_reference_of_cosegmentation_has_the_published_numbers():
    published = {
        "tap": "key@-1",
        "size": 224,
        "stride": 4,
        "saliency": "attention",
        "heads": (0, 2, 4, 5),
        "clusters": 0,
        "elbow": 0.975,
        "most_clusters": 14,
        "every": 100,
        "restarts": 10,
        "iterations": 300,
        "foreground": "votes",
        "threshold": 0.065,
        "votes": 0.75,
        "outliers": None,
        "crops": 0,
        "refine": "grabcut",
        "stages": 2,
        "part_elbow": 0.94,
        "part_share": 1.0,
    }
    config = CosegmentConfig.preset("reference")
    assert {name: getattr(config, name) for name in published} == published
    assert CosegmentConfig() == CosegmentConfig.preset() == CosegmentConfig.preset("default")
    assert CosegmentConfig.preset("reference", stages=3) == dataclasses.replace(config, stages=3)


def test_sizes_and_heads_of_cosegmentation_may_be_lists(file):
    config = CosegmentConfig(size=[112, 64], heads=[0, 2])
    assert (config.size, config.heads) == ((112, 64), (0, 2))
    assert hash(config) == hash(CosegmentConfig(size=(112, 64), heads=(0, 2)))
    assert read_config(file(write_config(config)), CosegmentConfig) == config
    path = file("preset: reference\nheads: []\noutliers: 0.7\n")
    assert read_config(path, CosegmentConfig) == CosegmentConfig.preset("reference", heads=(), outliers=0.7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"saliency": "cls"}, "expected saliency 'attention', 'border' or 'both', got 'cls'"),
        ({"foreground": "elected"}, "expected foreground 'weighted' or 'votes', got 'elected'"),
        ({"alone": "otsu"}, "expected alone 'saliency' or 'pca', got 'otsu'"),
        ({"refine": "crf"}, "expected refine 'auto', 'grabcut', 'guided' or 'none', got 'crf'"),
        ({"clusters": -1}, "expected clusters of at least 0, got -1"),
        ({"every": -1}, "expected every of at least 0, got -1"),
        ({"crops": -1}, "expected crops of at least 0, got -1"),
        ({"most_clusters": 0}, "expected most_clusters of at least 1, got 0"),
        ({"fit_tokens": 0}, "expected fit_tokens of at least 1, got 0"),
        ({"clusterings": 0}, "expected clusterings of at least 1, got 0"),
        ({"restarts": 0}, "expected restarts of at least 1, got 0"),
        ({"iterations": 0}, "expected iterations of at least 1, got 0"),
        ({"refine_size": 31}, "expected refine_size of at least 32, got 31"),
        ({"elbow": 1.1}, "expected elbow of at least 0 and at most 1, got 1.1"),
        ({"part_elbow": -0.1}, "expected part_elbow of at least 0 and at most 1, got -0.1"),
        ({"threshold": float("nan")}, "expected threshold of at least 0 and at most 1, got nan"),
        ({"votes": 75}, "expected votes of at least 0 and at most 1, got 75"),
        ({"part_share": 2}, "expected part_share of at least 0 and at most 1, got 2"),
        ({"outliers": 1.5}, "expected outliers of at least -1 and at most 1, got 1.5"),
        ({"stages": 4}, "expected 2 or 3 stages, got 4"),
    ],
)
def test_cosegmentation_refuses_them_too(changes, message):
    with pytest.raises(ConfigError, match=message):
        CosegmentConfig(**changes)


def test_the_protocols_of_pck_are_the_published_ones():
    boxed = {"reference": "box", "thresholds": (0.1, 0.05, 0.01)}
    published = {
        "spair": boxed | {"size": None, "pad": False, "predict": "cell", "strict": False, "mean": "category"},
        "hyperfeatures": {"size": (224, 224), "pad": False, "predict": "map", "enlarged": "network"}
        | {"reference": "image", "strict": False, "mean": "keypoint", "visible_only": False},
        "dift": boxed
        | {"size": (768, 768), "predict": "map", "enlarged": "source", "strict": False, "mean": "image", "pad": False},
        "sd_dino": boxed
        | {"size": 840, "pad": True, "predict": "cell", "strict": True, "mean": "category_keypoint"}
        | {"visible_only": True},
    }
    assert list(published) == list(PCK_PROTOCOLS)
    for name, choices in published.items():
        protocol = PckProtocol.preset(name)
        assert {choice: getattr(protocol, choice) for choice in choices} == choices
    assert PckProtocol() == PckProtocol.preset() == PckProtocol.preset("spair")
    assert PckProtocol.preset("dift", size=None) == dataclasses.replace(PckProtocol.preset("dift"), size=None)


@pytest.mark.parametrize("name", PCK_PROTOCOLS)
def test_every_protocol_comes_back_from_yaml(name, file):
    protocol = PckProtocol.preset(name, thresholds=(0.15, 0.1))
    assert read_config(file(write_config(protocol)), PckProtocol) == protocol
    assert PckProtocol(thresholds=[0.15, 0.1]).thresholds == (0.15, 0.1)
    assert hash(PckProtocol(thresholds=[0.15])) == hash(PckProtocol(thresholds=(0.15,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predict": "soft"}, "expected predict 'cell', 'map' or 'window', got 'soft'"),
        ({"enlarged": "box"}, "expected enlarged 'source' or 'network', got 'box'"),
        ({"reference": "bbox"}, "expected reference 'box' or 'image', got 'bbox'"),
        ({"mean": "pair"}, "expected mean 'keypoint', 'image', 'category' or 'category_keypoint', got 'pair'"),
        ({"thresholds": ()}, r"expected thresholds above 0, at least one, got \(\); for example \(0.1,\)"),
        ({"thresholds": (0.1, 0.0)}, r"expected thresholds above 0, at least one, got \(0.1, 0.0\)"),
        ({"thresholds": (-0.1,)}, "expected thresholds above 0, at least one, got"),
        ({"thresholds": (0.1, float("nan"))}, "expected thresholds above 0, at least one, got"),
    ],
)
def test_a_protocol_that_measures_nothing_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        PckProtocol(**changes)


def test_unknown_protocols_and_choices_offer_the_nearest():
    with pytest.raises(ConfigError, match="expected a preset, got 'diff'. Did you mean 'dift'"):
        PckProtocol.preset("diff")
    with pytest.raises(
        ConfigError, match="expected a setting of PckProtocol, got 'treshold'. Did you mean 'thresholds'"
    ):
        PckProtocol.preset("spair", treshold=0.1)


def test_settings_need_no_torch():
    code = (
        "import sys, vitfeats.configs as c\n"
        "c.write_config(c.SpliceConfig())\n"
        "c.write_config(c.PckProtocol())\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
