"""Make the pictures of the documentation with the bundled model: ``python docs/pictures.py [NAME …]``.

Writes docs/assets/NAME.jpg for every name of :data:`PICTURES`, each below 150 kB. Nothing is downloaded.
"""

import json
import runpy
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

import vitfeats as vf
from vitfeats.apps.evaluation.datasets import apply_homography, warp
from vitfeats.apps.inversion import invert, self_similarity_pca
from vitfeats.apps.pretrain.run import PANELS
from vitfeats.configs import DiffusionConfig, InvertConfig, SpliceConfig
from vitfeats.extractors.diffusion import DiffusionExtractor
from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor
from vitfeats.models import bundled
from vitfeats.preprocess import load_image, to_pil
from vitfeats.resize import resize_images, spread_map

ASSETS = Path(__file__).parent / "assets"
MOST_BYTES = 150_000
WARP = torch.tensor([[0.9, -0.12, 50.0], [0.14, 0.9, -10.0], [0.0001, 0.0, 1.0]])  # turned, smaller, a little tilted
EYE = (180.0, 110.0)  # (x, y) in pixels of the cat
NOSE = (267.0, 244.0)
SPOON = (365.0, 285.0)  # (x, y) in pixels of the coffee
SHOWN = 60  # matches drawn of each matcher
WITHIN = 16.0  # pixels from the truth that count as right
INVERSION_STEPS = 300  # of each; about a minute on one core
METHODS = (("adain", "AdaIN"), ("sanet", "SANet"), ("adaattn", "AdaAttN"))
GREEN, RED = (40, 200, 80), (230, 40, 40)
CARD = (480, 240)  # width and height of a card of the home page


def pca(extractor: vf.Extractor) -> Image.Image:
    """Draw two portraits above one PCA of their keys."""
    portraits = vf.samples.portrait_pair()
    return vf.plot.pca(portraits, list(extractor.each(portraits, "key@11")))


def pca_fitted(extractor: vf.Extractor) -> Image.Image:
    """Draw a cup and its warp above one PCA, fitted on the cup alone."""
    cup = load_image(vf.samples.coffee())
    warped = warp(cup, WARP)
    both = [extractor(image, "token@11") for image in (cup, warped)]
    return vf.plot.pca([cup, warped], both, fitted=vf.PCA(3).fit(both[0]))


def pca_foreground(extractor: vf.Extractor) -> Image.Image:
    """Draw a cup, then its components: of all tokens, of what is not like the border, of what CLS attends to."""
    cup = vf.samples.coffee()
    found = extractor(cup, ["token@11", "attention@11"])
    d, looks = found["token@11"], found["attention@11"]
    panels = [("the photograph", cup)]
    for label, foreground in (
        ("every token", None),
        ('foreground="border"', "border"),
        ("foreground=attention", looks),
    ):
        rgb = vf.PCA(3).fit(d, foreground=foreground).to_rgb(d)
        panels.append((label, cells(rgb, d)))
    return sheet(panels, columns=2, width=420)


def similarity(extractor: vf.Extractor) -> Image.Image:
    """Draw where the cat's picture looks like its left eye, at three depths."""
    cat = vf.samples.cat()
    found = extractor(cat, ["token@2", "token@7", "key@11"])
    drawn = [vf.plot.similarity(cat, [EYE], cat, vf.similarity_map(d, [EYE], d), grid=d.grid) for d in found.values()]
    return beside(drawn)


def similarity_pair(extractor: vf.Extractor) -> Image.Image:
    """Draw where the warped cat looks like two points of the cat."""
    cat = load_image(vf.samples.cat())
    warped = warp(cat, WARP)
    a, b = extractor(cat, "token@2"), extractor(warped, "token@2")
    points = [EYE, NOSE]
    return vf.plot.similarity(cat, points, warped, vf.similarity_map(a, points, b), grid=b.grid)


def matches(extractor: vf.Extractor) -> Image.Image:
    """Draw 40 mutual matches of a cup of coffee and its warp, drawn at random."""
    cup = load_image(vf.samples.coffee())
    warped = warp(cup, WARP)
    found = vf.match_mutual(extractor(cup, "token@2"), extractor(warped, "token@2"))
    return vf.plot.matches(cup, warped, found)


def matchers(extractor: vf.Extractor) -> Image.Image:
    """Draw what four matchers find between the cat and its warp: right in green, wrong in red."""
    cat = load_image(vf.samples.cat())
    warped = warp(cat, WARP)
    small = extractor.resized(size=224, stride=8)
    a, b = small(cat, "token@2"), small(warped, "token@2")
    found = {
        "match_nearest": vf.match_nearest(a, b),
        "match_mutual": vf.match_mutual(a, b),
        "match_ratio": vf.match_ratio(a, b),
        "match_sinkhorn": vf.match_sinkhorn(a, b, epsilon=0.02, dustbin=0.8),
    }
    return sheet([judged(name, m, cat, warped) for name, m in found.items()], columns=2, width=520)


def correspond(extractor: vf.Extractor) -> Image.Image:
    """Draw ten correspondences of two portraits."""
    left, right = vf.samples.portrait_pair()
    a, b = (vf.log_bin(d) for d in extractor.each([left, right], "token@7"))
    return vf.plot.matches(left, right, vf.correspond(a, b))


def log_bin(extractor: vf.Extractor) -> Image.Image:
    """Draw where the warped cat looks like the cat's nose, without and with the tokens' surroundings."""
    cat = load_image(vf.samples.cat())
    warped = warp(cat, WARP)
    small = extractor.resized(size=224, stride=8)
    a, b = small(cat, "key@9"), small(warped, "key@9")
    pairs = [(a, b), (vf.log_bin(a), vf.log_bin(b))]
    drawn = [vf.plot.similarity(cat, [NOSE], warped, vf.similarity_map(x, [NOSE], y), grid=y.grid) for x, y in pairs]
    return beside(drawn)


def upsample(extractor: vf.Extractor) -> Image.Image:
    """Draw the components of tokens, of their bilinear upsampling, and of a guided one."""
    cat = vf.samples.cat()
    d = extractor.resized(size=224, stride=16)(cat, "token@11")
    fitted = vf.PCA(3).fit(d)
    size = (300, 451)
    dense = {
        "upsample(d)": vf.upsample(d, size),
        "upsample(d, upsampler=guided)": vf.upsample(d, size, upsampler=guided, image=cat),
    }
    panels = [("the photograph", cat), ("14 by 21 tokens", cells(fitted.to_rgb(d), d))]
    panels += [(name, to_pil(fitted.to_rgb(fine)[0])) for name, fine in dense.items()]
    return sheet(panels, columns=2, width=420)


def guided(features: Tensor, images: Tensor, reach: int = 2, colour: float = 0.1) -> Tensor:
    """Upsample features so that their edges follow those of the images (a joint bilateral filter)."""
    rows, cols = features.shape[2:]
    small = F.interpolate(images, (rows, cols), mode="area")
    total = weights = 0.0
    for down in range(-reach, reach + 1):
        for across in range(-reach, reach + 1):
            near, hue = (
                F.interpolate(moved(x, down, across), images.shape[2:], mode="nearest") for x in (features, small)
            )
            weight = (-(images - hue).square().sum(1, keepdim=True) / colour**2 - (down**2 + across**2) / 2).exp()
            total, weights = total + weight * near, weights + weight
    return total / (weights + 1e-12)  # type: ignore[operator] - tensors by now


def moved(maps: Tensor, down: int, across: int) -> Tensor:
    """Shift maps by whole cells, the border repeated."""
    padded = F.pad(maps, (abs(across),) * 2 + (abs(down),) * 2, mode="replicate")
    top, left = abs(down) + down, abs(across) + across
    return padded[..., top : top + maps.shape[2], left : left + maps.shape[3]]


def saliency(extractor: vf.Extractor) -> Image.Image:
    """Draw what CLS attends to, at the size that ``mini`` was trained at."""
    cat = vf.samples.cat()
    return vf.plot.saliency(cat, extractor.resized(size=112, stride=4)(cat, "attention@11"))


def attention(extractor: vf.Extractor) -> Image.Image:
    """Draw each head of CLS at block 11, and below what the token at the eye attends to, at three depths."""
    cat = vf.samples.cat()
    small = extractor.resized(size=112, stride=4)
    looks = small(cat, "attention@11")
    panels = [(f"attention@11, head {head}", bright(vf.saliency(looks, [head])[0], looks, cat)) for head in range(3)]
    eye = looks.grid.index_of(looks.frames[0].to_network(torch.tensor([EYE])))
    for layer in (2, 7, 11):
        row = small.attention(cat, layer)[0, :, 1 + int(eye), 1:].mean(0)  # one CLS in front
        panels.append((f"the eye's row, block {layer}", bright(row.view(looks.grid.rows, -1), looks, cat)))
    return sheet(panels, columns=3, width=330)


def inversion(extractor: vf.Extractor) -> Image.Image:
    """Draw the cat as its features remember it: facets of ``mini``, untrained weights, and CLS at four depths."""
    cat = vf.samples.cat()
    small = extractor.resized(size=112, stride=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=112, dynamic_img_size=True)
    random = vf.load_extractor(network.eval().requires_grad_(False), size=112, stride=8, card=small.card)
    panels = []
    for label, reader, taps in (
        ("", small, ("key@11", "token@11", "key@5")),
        (", untrained", random, ("key@11",)),
        ("", small, ("cls@2", "cls@5", "cls@8", "cls@11")),
    ):
        for tap in taps:
            found = invert(cat, tap, model=reader, config=InvertConfig(steps=INVERSION_STEPS))
            print(f"{found!r}{label}", file=sys.stderr)
            panels.append((f"{tap}{label}: {found.psnr[0]:.1f} dB", found.image))
            if len(panels) == 1:
                panels.insert(0, ("as the model sees it", to_pil(found.target)))
    return sheet(panels, columns=3, width=400)


def structure(extractor: vf.Extractor) -> Image.Image:
    """Draw what is like what in two photographs, by the keys of the last block."""
    panels = []
    for name in ("cat", "coffee"):
        (picture,) = vf.samples.load(name)
        d = extractor.resized(size=224, stride=8)(picture, "key@11")
        panels += [(name, picture), ("its self-similarity", cells(self_similarity_pca(d), d))]
    return sheet(panels, columns=2, width=420)


def splice(extractor: vf.Extractor) -> Image.Image:
    """Draw the astronaut in the colours of Grace Hopper's portrait, with the default settings."""
    astronaut, hopper = vf.samples.portrait_pair()
    made = vf.splice(astronaut, hopper, model=extractor.resized(size=224, stride=16), progress=True)
    panels = [("structure", astronaut), ("appearance", hopper.crop((0, 40, 512, 552))), ("result", made.image)]
    return sheet(panels, columns=3, width=330)


def splice_terms(extractor: vf.Extractor) -> Image.Image:
    """Draw what each term of the default objective does: all of them, then each left out."""
    reader = extractor.resized(size=224, stride=16)
    panels = []
    for label, changes in (
        ("all terms", {}),
        ("without appearance", {"appearance": 0.0}),
        ("without transport", {"transport": 0.0}),
        ("without structure", {"structure": 0.0}),
    ):
        config = SpliceConfig.preset("fast", **changes)
        made = vf.splice(*vf.samples.portrait_pair(), model=reader, config=config, progress=True)
        panels.append((label, made.image))
    return sheet(panels, columns=2, width=400)


def diffusion_steps(_extractor: vf.Extractor) -> Image.Image:
    """Draw the components of four layers of the diffusion model along the inversion of a cat; a PCA for each map."""
    cat = vf.samples.cat()
    chain = DiffusionConfig.preset("hyperfeatures", steps=20, keep=5)
    extractor = vf.load_extractor("ddpm_mini", device="cpu", diffusion=chain)
    layers = [f"up{block}.res2" for block in range(4)]
    found = extractor(cat, [f"residual@{layer}#{step}" for layer in layers for step in chain.kept_steps])
    panels = [(tap.removeprefix("residual@").replace("#", ", step "), components(d)) for tap, d in named(found)]
    return sheet(panels, columns=len(chain.kept_steps), width=190)


def diffusion_ways(_extractor: vf.Extractor) -> Image.Image:
    """Draw one layer of the diffusion model in each way of reading a cat; a PCA for each map."""
    cat, layer = vf.samples.cat(), "residual@up1.res2"
    chain = DiffusionConfig.preset("hyperfeatures", steps=20, keep=5)
    ways = {
        "clean": (DiffusionConfig.preset("hyperfeatures-one-step"), ""),
        "noise, level 261, one draw": (DiffusionConfig(), ""),
        "noise, level 261, mean of 8": (DiffusionConfig.preset("dift"), ""),
        "inversion, step 15 of 20": (chain, "#15"),
        "inversion, step 5": (chain, "#5"),
    }
    extractor = vf.load_extractor("ddpm_mini", device="cpu")
    assert isinstance(extractor, DiffusionExtractor)
    panels = [("the photograph", cat)]
    for name, (config, step) in ways.items():
        panels.append((name, components(extractor.reading(config)(cat, layer + step))))
    return sheet(panels, columns=3, width=300)


def diffusion_chain(_extractor: vf.Extractor) -> Image.Image:
    """Draw photographs, the noise that inversion makes of them, what generation makes of it, and of other noise."""
    extractor = vf.load_extractor("ddpm_mini", size=(64, 64), device="cpu", diffusion=DiffusionConfig(steps=50))
    assert isinstance(extractor, DiffusionExtractor)
    photographs = [vf.samples.load(name)[0] for name in ("cat", "coffee", "astronaut", "grace_hopper")]
    noise = extractor.invert(photographs)
    again = extractor.generate(latents=noise).images
    rows = {
        "the photograph": [resize_images(load_image(p)[None], (64, 64))[0] for p in photographs],
        "its noise": [(one / 6 + 0.5).clamp(0, 1) for one in noise],
        "and back": list(again),
        "from fresh noise": list(extractor.generate(number=len(photographs), seed=1).images),
    }
    panels = [
        (name, to_pil(one).resize((192, 192), Image.Resampling.NEAREST)) for name, row in rows.items() for one in row
    ]
    return sheet(panels, columns=len(photographs), width=192)


def hyperfeatures(_extractor: vf.Extractor) -> Image.Image:
    """Draw matches between a cat and its warp: by one layer of the diffusion model, and by hyperfeatures."""
    cat = load_image(vf.samples.cat())
    warped = warp(cat, WARP)
    one = vf.load_extractor("ddpm_mini", device="cpu")
    hyper = vf.load_extractor("hyperfeatures:ddpm_mini", device="cpu")
    panels = []
    for name, extractor in (("one layer, one pass", one), ("hyperfeatures", hyper)):
        a, b = extractor(cat), extractor(warped)
        fitted = vf.PCA(3).fit([a, b])
        panels.append((f"{name}: components", beside([cells(fitted.to_rgb(d), d) for d in (a, b)], gap=6)))
        panels.append(judged(name, vf.match_mutual(a, b), cat, warped))
    return sheet(panels, columns=2, width=520)


def mixing(_extractor: vf.Extractor) -> Image.Image:
    """Draw the mixing weights of the bundled aggregation network."""
    hyper = vf.load_extractor("hyperfeatures:ddpm_mini", device="cpu")
    assert isinstance(hyper, HyperfeatureExtractor)
    network = hyper.model.aggregation
    return vf.plot.mixing(network.mixing, network.layers, network.steps)


def pretraining(_extractor: vf.Extractor) -> Image.Image:
    """Draw what the training of the bundled weights was logged to do: every 25th step."""
    lines = (bundled.ASSETS / "mini.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    return vf.plot.curves([record for record in history if record["step"] % 25 == 24], PANELS)


def styles(_extractor: vf.Extractor) -> Image.Image:
    """Draw the same pairs by the three methods."""
    panels = []
    for content, style in (
        (vf.samples.cat(), vf.patterns.draw("strokes", 256, seed=105)),
        (vf.samples.coffee(), vf.patterns.draw("glass", 256, seed=107)),
        (vf.samples.astronaut(), vf.samples.flower()),
    ):
        panels += [("content", content), ("style", style)]
        panels += [(named, vf.stylize(content, style, method=method, size=256).image) for method, named in METHODS]
    return sheet([(label, squared(picture)) for label, picture in panels], columns=5, width=240)


def styles_regions(_extractor: vf.Extractor) -> Image.Image:
    """Draw the cat in two styles: side by side, and blended."""
    cat = vf.samples.cat()
    pair = [vf.patterns.draw("strokes", 256, seed=105), vf.patterns.draw("mosaic", 256, seed=102)]
    left = torch.arange(cat.width).expand(cat.height, -1) < cat.width // 2
    panels = [
        ("regions", vf.stylize(cat, pair, masks=(left, [1, 0])).image),
        ("blended", vf.stylize(cat, pair).image),
        ("the colours of the cat", vf.stylize(cat, pair[0]).recoloured(cat).image),
    ]
    return sheet(panels, columns=3, width=330)


def style_losses(_extractor: vf.Extractor) -> Image.Image:
    """Draw what the trainings of the bundled networks of style transfer were logged to do."""
    panels = []
    for method, named in METHODS:
        lines = (bundled.ASSETS / f"{method}_vgg_mini.jsonl").read_text(encoding="utf-8").splitlines()
        panels.append((named, vf.plot.losses([json.loads(line) for line in lines])))
    return sheet(panels, columns=3, width=420)


def cosegment(_extractor: vf.Extractor) -> Image.Image:
    """Draw four photographs with a flower in them, and what is found there: the flower, and its parts."""
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "cosegment.py"))
    images, _ = example["pasted"]()
    runs = (
        ("found", vf.cosegment(images, model="mini")),
        ("three parts", vf.part_cosegment(images, 3, model="mini")),
    )
    panels = [("image", squared(picture)) for picture in images]
    panels += [(named, squared(segment.overlay())) for named, run in runs for segment in run]
    return sheet(panels, columns=4, width=230)


def cutouts(_extractor: vf.Extractor) -> Image.Image:
    """Draw single photographs cut out, on a pale ground."""
    panels = []
    for name in ("flower", "coffee", "astronaut"):
        (segment,) = vf.cosegment(vf.samples.load(name)[0], model="mini")
        cut = segment.cutout()
        ground = Image.new("RGB", cut.size, (215, 235, 225))
        ground.paste(cut, (0, 0), cut)
        panels += [(name, squared(vf.samples.load(name)[0])), ("cut out", squared(ground))]
    return sheet(panels, columns=6, width=165)


def search(_extractor: vf.Extractor) -> Image.Image:
    """Draw a clicked patch of a photograph and the most similar ones of a collection: all samples, mirrored and cut."""
    with TemporaryDirectory() as folder:
        for name in ("cat", "coffee", "astronaut", "grace_hopper", "china", "flower"):
            picture = vf.samples.load(name)[0]
            across, down = picture.size
            cut = picture.crop((across // 6, down // 6, across, down)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            cut.save(Path(folder) / f"{name}.png")
        images = vf.bulk.open_source(folder)
        vf.bulk.extract(images, Path(folder) / "store", model="mini", taps=["key@11"], stride=8)
        store = vf.bulk.Store(Path(folder) / "store")
        shown, titles, points = [], [], []
        for picture, point in ((vf.samples.cat(), EYE), (vf.samples.coffee(), SPOON)):
            d = vf.bulk.store_extractor(store)(picture, "key@11")
            hits = vf.bulk.search_patches(store, d, [point], k=3)
            assert hits.points is not None
            shown += [picture, *(to_pil(images.image(images.ids.index(name))) for name in hits.ids[0])]
            titles += ["asked", *(f"{score:.2f}" for score in hits.scores[0].tolist())]
            points += [point, *hits.points[0].tolist()]
        drawn = vf.plot.side_by_side(shown, titles, columns=4, marked=points)
        return drawn.resize((drawn.width // 2, drawn.height // 2), Image.Resampling.LANCZOS)


def squared(picture: Image.Image) -> Image.Image:
    """Return the middle square of a picture."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def card(*parts: tuple[str, tuple[int, int, int, int]]) -> Callable[[vf.Extractor], Image.Image]:
    """Return what draws a card of the home page: parts of other pictures, (left, top, right, bottom), side by side."""

    def draw(_extractor: vf.Extractor) -> Image.Image:
        width = round((CARD[0] - 2 * (len(parts) - 1)) / len(parts))
        cut = [Image.open(ASSETS / f"{name}.jpg").crop(box) for name, box in parts]
        return beside([ImageOps.fit(part, (width, CARD[1]), Image.Resampling.LANCZOS) for part in cut], gap=2)

    return draw


PICTURES: dict[str, Callable[[vf.Extractor], Image.Image]] = {
    draw.__name__: draw
    for draw in (
        pca,
        pca_fitted,
        pca_foreground,
        similarity,
        similarity_pair,
        matches,
        matchers,
        correspond,
        log_bin,
        upsample,
        saliency,
        attention,
        inversion,
        structure,
        splice,
        splice_terms,
        diffusion_steps,
        diffusion_ways,
        diffusion_chain,
        hyperfeatures,
        mixing,
        pretraining,
        styles,
        styles_regions,
        style_losses,
        cosegment,
        cutouts,
        search,
    )
}
"""Every picture by its name."""

# After the pictures that they are cut from.
PICTURES |= {
    "card_pca": card(("pca", (4, 4, 404, 404)), ("pca", (4, 428, 404, 828))),
    "card_similarity": card(("similarity_pair", (31, 4, 298, 271)), ("similarity_pair", (31, 282, 298, 549))),
    "card_matching": card(("matches", (221, 4, 1027, 407))),
    "card_splicing": card(
        ("splice", (0, 25, 330, 355)), ("splice", (338, 25, 668, 355)), ("splice", (676, 25, 1006, 355))
    ),
    "card_style": card(
        ("styles", (0, 21, 240, 261)), ("styles", (248, 21, 488, 261)), ("styles", (992, 21, 1232, 261))
    ),
    "card_cosegmentation": card(
        ("cosegment", (238, 20, 468, 250)), ("cosegment", (238, 278, 468, 508)), ("cosegment", (238, 536, 468, 766))
    ),
    "card_inversion": card(
        ("inversion", (0, 28, 400, 283)), ("inversion", (408, 28, 808, 283)), ("inversion", (816, 610, 1216, 865))
    ),
    "card_hyperfeatures": card(("inversion", (0, 28, 400, 283)), ("hyperfeatures", (0, 248, 258, 420))),
    "card_search": card(("search", (28, 26, 234, 232)), ("search", (430, 26, 636, 232))),
}


def named(found: vf.Descriptors) -> list[tuple[str, vf.Descriptor]]:
    """Return descriptors with the text of their taps."""
    return [(str(tap), d) for tap, d in found.items()]


def components(d: vf.Descriptor) -> Image.Image:
    """Paint a descriptor's own first components."""
    return cells(vf.PCA(3).fit(d).to_rgb(d), d)


def cells(rgb: Tensor, d: vf.Descriptor) -> Image.Image:
    """Paint one colour a token over the image that was described."""
    return to_pil(spread_map(rgb.float(), d.grid, d.frames[0].source_size, "nearest")[0])


def bright(values: Tensor, d: vf.Descriptor, picture: Image.Image) -> Image.Image:
    """Lay one value a token over a picture: the larger, the brighter. Stretched to the 99th percentile."""
    top = values.flatten().quantile(0.99)
    shown = (values / top).clamp(0, 1)[None, None].expand(1, 3, -1, -1)
    light = spread_map(shown, d.grid, d.frames[0].source_size)[0]
    grey = load_image(picture.convert("L").convert("RGB"))
    glow = torch.tensor([1.0, 0.75, 0.2])[:, None, None]
    return to_pil(grey * 0.35 + light * glow * 0.65)


def judged(name: str, found: vf.Matches, image: Tensor, warped: Tensor) -> tuple[str, Image.Image]:
    """Return a label that counts the matches, and a picture of some: right in green, wrong in red."""
    right = (found.points_b - apply_homography(WARP, found.points_a)).norm(dim=1) <= WITHIN
    label = f"{name}: {len(found)} matches, {100 * right.float().mean():.0f} % right"
    whole = beside([to_pil(image), to_pil(warped)], gap=6)
    picture = whole.resize((2 * whole.width, 2 * whole.height))  # drawn large and made smaller: lines without steps
    pen = ImageDraw.Draw(picture)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:SHOWN].tolist()
    for row in sorted(order, key=lambda row: not right[row]):
        (x0, y0), (x1, y1) = found.points_a[row].tolist(), found.points_b[row].tolist()
        colour = GREEN if right[row] else RED
        ends = [(2 * x0, 2 * y0), (2 * (x1 + image.shape[2] + 6), 2 * y1)]
        pen.line(ends, fill=colour, width=5)
        for x, y in ends:
            pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill=colour, outline="white")
    return label, picture


def beside(pictures: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Put pictures of one height side by side."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    whole = Image.new("RGB", (width, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + gap
    return whole


def sheet(panels: Sequence[tuple[str, Image.Image]], *, columns: int, width: int) -> Image.Image:
    """Put labelled panels of one size on a sheet, each ``width`` pixels wide, its label above."""
    height = round(panels[0][1].height * width / panels[0][1].width)
    text, gap = round(width / 22), 8
    head = text + 10
    rows = -(-len(panels) // columns)
    whole = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + head + gap) - gap), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(text)
    for index, (label, picture) in enumerate(panels):
        left, top = index % columns * (width + gap), index // columns * (height + head + gap)
        pen.text((left + 2, top + 2), label, fill="black", font=font)
        whole.paste(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (left, top + head))
    return whole


def save(picture: Image.Image, path: Path) -> int:
    """Write a picture as the best JPEG below the limit; return its size in bytes."""
    for quality in range(90, 30, -5):
        buffer = BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True, progressive=True)
        if buffer.tell() < MOST_BYTES:
            path.write_bytes(buffer.getvalue())
            return buffer.tell()
    raise RuntimeError(f"'{path.name}' stays above {MOST_BYTES} bytes; make it smaller")


def main(names: Sequence[str] = ()) -> None:
    """Write the pictures of these names; none is all."""
    ASSETS.mkdir(exist_ok=True)
    extractor = vf.load_extractor("mini", size=448, stride=8, device="cpu")
    for name in names or PICTURES:
        path = ASSETS / f"{name}.jpg"
        print(f"{path}: {save(PICTURES[name](extractor), path)} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
