"""Tables of semantic correspondence: rows that name what exists, and numbers that are those of their parts."""

import re
from collections.abc import Sequence

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import vitfeats as vf
from vitfeats.apps.evaluation import (
    TABLES,
    EvalRow,
    Measured,
    Pair,
    Part,
    PckResult,
    carry_points,
    evaluate_method,
    evaluate_pck,
    evaluate_table,
    joined,
    joint_pca,
    same_place,
    table_markdown,
)
from vitfeats.apps.evaluation import rows as module
from vitfeats.configs import PCK_PROTOCOLS, DiffusionConfig, PckProtocol
from vitfeats.errors import ConfigError, TapError, UnknownModelError, WeightsUnavailableError
from vitfeats.taps import Tap

ROWS = [(table, row) for table, rows in TABLES.items() for row in rows]
PARTS = [(row.name, part) for _, row in ROWS for part in row.parts]
IMAGE = PckProtocol(reference="image", mean="keypoint")
SMALL = (64, 64)


class Named(list):
    """Pairs with a name, as data sets have."""

    def __init__(self, pairs: Sequence[Pair], name: str) -> None:
        super().__init__(pairs)
        self.name = name


def picture(height: int, width: int, seed: int) -> Tensor:
    coarse = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bilinear")[0]


def two_pairs(name: str = "two pairs") -> Named:
    """Return pairs of small images with points anywhere, and boxes."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for number in range(2):
        points = [torch.rand(8, 2, generator=generator) * torch.tensor([60.0, 50.0]) for _ in range(2)]
        images = [picture(50, 60, 2 * number + side) for side in range(2)]
        pairs.append(Pair(*images, *points, str(number), category="ab"[number], box_b=(0.0, 0.0, 40.0, 30.0)))
    return Named(pairs, name)


@pytest.fixture
def weightless(monkeypatch):
    """Let nothing but the bundled models be loaded; what was asked for is noted."""
    asked = []

    def load(model, **settings):
        asked.append((model, settings))
        if isinstance(model, str) and model not in ("mini", "vgg_mini"):
            raise WeightsUnavailableError(f"expected the weights of {model}, but there is no network")
        return vf.load_extractor(model, **settings)

    monkeypatch.setattr(module, "load_extractor", load)
    return asked


# The tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_rows_have_names_and_folders_of_their_own(table):
    rows = TABLES[table]
    folders = [module.slug(row.name) for row in rows]
    assert len({row.name for row in rows}) == len(set(folders)) == len(rows)
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", folder) for folder in folders)
    assert rows[0] == EvalRow("the same place")
    assert all(row.parts for row in rows[1:])
    assert not any("|" in row.name for row in rows)


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_every_model_and_tap_of_a_table_exists(name, part):
    assert part.taps
    for tap in part.taps:
        Tap.parse(tap)
    if part.model.startswith("random:"):
        assert timm.is_model(part.model.removeprefix("random:"))
    else:
        assert part.model in {card.name for card in vf.list_models()}
    assert part.weight > 0


BUNDLED = sorted({(part.model, tap) for row in TABLES["bundled"] for part in row.parts for tap in part.taps})


@pytest.mark.parametrize(("model", "tap"), BUNDLED)
def test_taps_of_models_that_come_with_the_package_can_be_read(model, tap):
    if model.startswith("random:"):
        pytest.skip("no weights to load")
    extractor = vf.load_extractor(model, device="cpu")
    assert str(extractor.resolve(Tap.parse(tap))) == tap


def test_the_layer_of_stable_diffusion_that_the_paper_counts_as_its_fourth():
    (row,) = (row for row in TABLES["hyperfeatures"] if row.name == "Stable Diffusion, layer 4")
    (part,) = row.parts
    # Three residual units in each block of the decoder: the fourth is the first of the second block.
    units = [f"up{block}.res{unit}" for block in range(4) for unit in range(3)]
    assert part.taps == (f"residual@{units[4 - 1]}",) == ("residual@up1.res0",)
    assert (part.model, part.size) == ("sd15", (512, 512))
    assert part.diffusion == DiffusionConfig.preset("hyperfeatures-one-step")


def test_published_numbers_are_shares_of_protocols_that_exist():
    published = {(row.name, *key): number for _, row in ROWS for key, number in row.published.items()}
    assert all(0 < number < 1 for number in published.values())
    assert {dataset for _, dataset, _ in published} == {"SPair-71k", "CUB-200-2011"}
    assert {protocol for _, _, protocol in published} <= set(PCK_PROTOCOLS)
    assert published["Hyperfeatures", "SPair-71k", "hyperfeatures"] == 0.7256
    assert published["Hyperfeatures", "CUB-200-2011", "hyperfeatures"] == 0.8229
    assert published["DIFT", "SPair-71k", "dift"] == 0.529


def test_the_fusion_weighs_both_models_alike():
    (row,) = (row for row in TABLES["hyperfeatures"] if row.name == "Stable Diffusion + DINOv2")
    squares: dict[str, float] = {}
    for part in row.parts:
        squares[part.model] = squares.get(part.model, 0.0) + part.weight**2
    assert squares == pytest.approx({"sd15": 1.0, "dinov2_vitb14": 1.0})


# Measuring ------------------------------------------------------------------------------------------------------------


def test_rows_are_measured_in_their_order_and_as_one_by_one(mini):
    pairs = two_pairs()
    rows = [
        EvalRow("nobody"),
        EvalRow("keys", (Part("mini", ("key@9",), size=64),)),
        EvalRow("two taps", (Part(mini, ("key@9", "token@11"), size=SMALL),)),
        EvalRow("overlapping", (Part("mini", ("key@9",), size=64, stride=8),)),
        EvalRow("binned", (Part("mini", ("key@9",), size=64, log_bin=True),)),
    ]
    measured = evaluate_table(rows, pairs, protocol=IMAGE, device="cpu")
    assert [one.row for one in measured] == rows
    assert all(one.missing == "" and one.published is None for one in measured)
    assert all(one.seconds >= 0 for one in measured)
    small = mini.resized(size=64)
    expected = [
        evaluate_method(same_place, pairs, protocol=IMAGE),
        evaluate_pck(small, "key@9", pairs, protocol=IMAGE),
        evaluate_pck(mini.resized(size=SMALL), ["key@9", "token@11"], pairs, protocol=IMAGE),
        evaluate_pck(small.resized(stride=8), "key@9", pairs, protocol=IMAGE),
        evaluate_pck(lambda image: vf.log_bin(small(image, "key@9")), None, pairs, protocol=IMAGE),
    ]
    for one, other in zip(measured, expected, strict=True):
        assert one.result.pairs == other.pairs
        assert (one.result.name, one.result.dataset) == (one.row.name, "two pairs")
    assert len({one.result.pairs for one in measured}) == len(rows)


def test_a_part_is_read_at_its_own_size_or_the_protocols_or_the_models(mini, monkeypatch):
    seen = []
    read = type(mini).read

    def noting(extractor, batch, taps):
        seen.append(batch.frames[0].network_size)
        return read(extractor, batch, taps)

    monkeypatch.setattr(type(mini), "read", noting)
    own, given = EvalRow("own", (Part(mini, ("key@1",)),)), EvalRow("given", (Part(mini, ("key@1",), size=SMALL),))
    for protocol in (IMAGE, PckProtocol.preset("hyperfeatures", size=(96, 80))):
        evaluate_table([own, given], two_pairs()[:1], protocol=protocol)
    assert seen[::2] == seen[1::2] == [(112, 128), SMALL, (96, 80), SMALL]


def test_a_protocol_also_says_how_rows_are_carried(mini):
    pairs = two_pairs()
    protocol = PckProtocol.preset("hyperfeatures", size=SMALL)
    (measured,) = evaluate_table([EvalRow("keys", (Part(mini, ("key@9",)),))], pairs, protocol=protocol)
    assert measured.result.pairs == evaluate_pck(mini, "key@9", pairs, protocol=protocol).pairs
    assert measured.result.pairs != evaluate_pck(mini.resized(size=SMALL), "key@9", pairs).pairs


def test_a_fusion_of_two_models_is_their_descriptors_joined_by_hand(mini):
    pairs = two_pairs()
    parts = (Part("mini", ("key@9",), size=64, weight=2.0), Part("vgg_mini", ("out@relu4_1",), size=48, pca=7))
    (measured,) = evaluate_table([EvalRow("both", parts)], pairs, protocol=IMAGE, device="cpu")
    keys, layers = mini.resized(size=64), vf.load_extractor("vgg_mini", size=48, device="cpu")
    for errors, pair in zip(measured.result.pairs, pairs, strict=True):
        images = (pair.image_a, pair.image_b)
        first = [keys(image, "key@9") for image in images]
        second = joint_pca(7)(*(layers(image, "out@relu4_1") for image in images))
        a, b = (joined(both, weights=(2.0, 1.0)) for both in zip(first, second, strict=True))
        assert torch.allclose(torch.tensor(errors.predicted).float(), carry_points(a, b, pair.points_a))
    (alone,) = evaluate_table([EvalRow("both", parts[:1])], pairs, protocol=IMAGE, device="cpu")
    assert alone.result.pairs != measured.result.pairs


def test_random_weights_are_the_same_every_time_and_leave_the_random_numbers_alone():
    pairs, row = two_pairs(), EvalRow("random", (Part("random:test_vit", ("key@-1",), size=64),))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (evaluate_table([row], pairs, protocol=IMAGE)[0].result for _ in range(2))
    assert first.pairs == second.pairs
    assert torch.get_rng_state().equal(before)


def test_random_weights_are_put_on_the_device():
    row = EvalRow("random", (Part("random:test_vit", ("key@-1",), size=64),))
    with pytest.raises(ConfigError, match="expected a device of this machine, got 'nonsense'"):
        evaluate_table([row], two_pairs(), protocol=IMAGE, device="nonsense")


def test_rows_without_weights_stop_nothing(weightless):
    pairs = two_pairs("SPair-71k test")
    rows = [
        EvalRow("keys", (Part("mini", ("key@9",), size=64),)),
        EvalRow("absent", (Part("dino_vits8", ("key@9",)),), {("SPair-71k", "spair"): 0.25}),
        EvalRow("half absent", (Part("mini", ("key@9",), size=64), Part("dinov2_vitb14", ("token@11",)))),
        EvalRow("nobody"),
    ]
    measured = evaluate_table(rows, pairs, device="cpu", dtype="float32")
    assert [one.result is None for one in measured] == [False, True, True, False]
    assert measured[1].missing == "expected the weights of dino_vits8, but there is no network"
    assert "dinov2_vitb14" in measured[2].missing
    keys, nobody = measured[0].result, measured[3].result
    numbers = {
        one.name: [f"{100 * one.pck(threshold):.1f}" for threshold in (0.1, 0.05, 0.01)] for one in (keys, nobody)
    }
    assert table_markdown(measured) == (
        "| row | PCK@0.1 | PCK@0.05 | PCK@0.01 | published | seconds |\n| --- | --- | --- | --- | --- | --- |\n"
        f"| keys | {' | '.join(numbers['keys'])} | – | {measured[0].seconds:.0f} |\n"
        "| absent | no weights | – | – | 25.0 | – |\n"
        "| half absent | no weights | – | – | – | – |\n"
        f"| nobody | {' | '.join(numbers['nobody'])} | – | {measured[3].seconds:.0f} |"
    )
    assert weightless == [
        (model, {"device": "cpu", "dtype": "float32"}) for model in ("mini", "dino_vits8", "mini", "dinov2_vitb14")
    ]


def test_the_table_of_the_paper_is_measured_as_far_as_there_are_weights(weightless):
    measured = evaluate_table("hyperfeatures", two_pairs("SPair-71k test"), subset=1)
    named = {one.row.name: one for one in measured}
    assert list(named) == [row.name for row in TABLES["hyperfeatures"]]
    assert named["the same place"].result is not None
    assert named["DIFT"].missing
    settings = dict(weightless)
    assert settings["sd21"]["diffusion"] == DiffusionConfig.preset("dift")
    assert "diffusion" not in settings["dinov2_vitb14"]
    assert {model for model, _ in weightless if isinstance(model, str)} == {
        part.model for row in TABLES["hyperfeatures"] for part in row.parts[:1] if not part.model.startswith("random:")
    }


def test_a_table_of_nothing_says_so_too():
    rows = [EvalRow("absent", (Part("dino_vits8", ("key@9",)),)), EvalRow("gone", (Part("sd15", ("out@up1",)),))]
    told = table_markdown([Measured(row, None, "no network", 0.0, 0.5) for row in rows])
    assert told.count("no weights") == 2


def test_a_table_of_nothing_is_still_a_table():
    row = EvalRow("absent", (Part("dino_vits8", ("key@9",)),))
    lines = table_markdown([Measured(row, None, "no network", 0.0, 0.5)]).splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    assert "| 50.0 |" in lines[2]


@pytest.mark.parametrize(
    ("dataset", "given", "expected"),
    [
        ("SPair-71k test", {"protocol": "dift"}, 0.5),
        ("SPair-71k", {"protocol": "dift"}, 0.5),
        ("SPair-71k test", {"protocol": "hyperfeatures"}, 0.7),
        ("SPair-71k test", {"protocol": "spair"}, None),
        ("SPair-71k test", {"protocol": "sd_dino"}, None),
        ("CUB-200-2011 test", {"protocol": "hyperfeatures"}, 0.8),
        ("CUB-200-2011 test", {"protocol": "dift"}, None),
        ("PF-PASCAL test", {"protocol": "dift"}, None),
        ("two pairs", {"protocol": "dift"}, None),
        # A protocol without a name is nobody's, unless one says whose.
        ("SPair-71k test", {"protocol": PckProtocol.preset("dift")}, None),
        ("SPair-71k test", {"protocol": PckProtocol.preset("dift"), "published_for": "dift"}, 0.5),
    ],
)
def test_published_numbers_stand_beside_their_own_dataset_and_protocol(dataset, given, expected):
    published = {
        ("SPair-71k", "dift"): 0.5,
        ("SPair-71k", "hyperfeatures"): 0.7,
        ("CUB-200-2011", "hyperfeatures"): 0.8,
    }
    (measured,) = evaluate_table([EvalRow("nobody", published=published)], two_pairs(dataset), **given)
    assert measured.published == expected
    cells = table_markdown([measured]).splitlines()[-1].split(" | ")
    assert cells[-2] == ("–" if expected is None else f"{100 * expected:.1f}")
    (unnamed,) = evaluate_table([EvalRow("nobody", published=published)], list(two_pairs(dataset)), **given)
    assert unnamed.published is None


# Runs -----------------------------------------------------------------------------------------------------------------


def test_each_row_has_a_folder_and_all_are_resumed(mini, tmp_path, monkeypatch):
    pairs = two_pairs()
    rows = [EvalRow("the same place"), EvalRow("Keys, layer 9", (Part(mini, ("key@9",), size=64),))]
    expected = evaluate_table(rows, pairs, protocol=IMAGE, out=tmp_path / "out", cache=tmp_path / "cache")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"the-same-place", "keys-layer-9"}
    for one in expected:
        kept = PckResult.load(tmp_path / "out" / module.slug(one.row.name) / "pck.json")
        assert (kept.pairs, kept.name) == (one.result.pairs, one.row.name)
    with pytest.raises(ConfigError, match="expected a folder without a run, but '.*the-same-place' has one"):
        evaluate_table(rows, pairs, protocol=IMAGE, out=tmp_path / "out")

    def read(*_given):
        raise AssertionError("the network was asked again")

    monkeypatch.setattr(type(mini), "read", read)
    resumed = evaluate_table(rows, pairs, protocol=IMAGE, out=tmp_path / "out", resume=True)
    anew = evaluate_table(rows, pairs, protocol=IMAGE, cache=tmp_path / "cache")
    for one, again, cached in zip(expected, resumed, anew, strict=True):
        assert one.result.pairs == again.result.pairs == cached.result.pairs


@pytest.mark.parametrize(
    "changed",
    [{"taps": ("key@10",)}, {"size": 80}, {"stride": 8}, {"log_bin": True}, {"pca": 5}, {"model": "vgg_mini"}],
)
def test_a_row_of_other_parts_is_another_run(tmp_path, changed):
    pairs = two_pairs()
    usual = {"model": "mini", "taps": ("key@9",), "size": 64}
    other = usual | changed | ({"taps": ("out@relu4_1",)} if changed.get("model") else {})
    evaluate_table([EvalRow("one", (Part(**usual),))], pairs, protocol=IMAGE, out=tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="these differ: fingerprint: "):
        evaluate_table(
            [EvalRow("one", (Part(**other),))], pairs, protocol=IMAGE, out=tmp_path, resume=True, device="cpu"
        )


def test_a_subset_is_the_same_for_every_row():
    rows = [EvalRow("nobody"), EvalRow("keys", (Part("mini", ("key@9",), size=64),))]
    measured = evaluate_table(rows, two_pairs(), protocol=IMAGE, subset=1, seed=2, device="cpu")
    (first,), (second,) = ([errors.index for errors in one.result.pairs] for one in measured)
    assert first == second


def test_what_no_table_can_be_made_of():
    pairs = two_pairs()
    with pytest.raises(ConfigError, match="expected a table, got 'bundle'. Did you mean 'bundled'"):
        evaluate_table("bundle", pairs)
    for rows in ([], [EvalRow("Keys, 9"), EvalRow("keys 9")]):
        with pytest.raises(ConfigError, match="expected rows, at least one, of different names with a letter or"):
            evaluate_table(rows, pairs)
    with pytest.raises(UnknownModelError, match="minni"):
        evaluate_table([EvalRow("typo", (Part("minni", ("key@9",)),))], pairs)
    with pytest.raises(TapError, match="expected a layer from 0 to 11"):
        evaluate_table([EvalRow("typo", (Part("mini", ("key@99",)),))], pairs)


def test_a_name_without_letters_is_refused():
    with pytest.raises(ConfigError, match="expected rows"):
        evaluate_table([EvalRow("–"), EvalRow("nobody")], two_pairs())
