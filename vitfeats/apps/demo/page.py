"""The page: what stands where, and which function answers what. Nothing is computed here."""

import functools
import html
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from PIL import Image, ImageOps

from vitfeats import patterns, samples
from vitfeats.apps.demo.intake import Picture
from vitfeats.apps.demo.looking import Found, Point, explore, mutual, similar
from vitfeats.apps.demo.making import CHAINS, UP, Progress, hyperfeatures, mixing, spliced, styled
from vitfeats.apps.demo.studio import Choices, Studio, View
from vitfeats.errors import ConfigError, VitFeatsError

F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger("vitfeats.demo")

PHOTOGRAPHS = ("cat", "coffee", "astronaut", "grace_hopper", "china", "flower")
PAIRS = (("astronaut", "grace_hopper"), ("stereo_left", "stereo_right"), ("cat", "coffee"))
SPLICES = (("astronaut", "grace_hopper"), ("cat", "coffee"), ("flower", "china"))
STYLES = (*(f"{kind}_{seed}" for kind, seed in zip(patterns.KINDS, range(3, 3 + len(patterns.KINDS)), strict=True)),)

PRESETS = [
    ("draft: 50 steps, a first look", "draft"),
    ("fast: 150 steps, about a minute", "fast"),
    ("reference: the published recipe, for a GPU", "reference"),
]
COLOURS = [("as painted", "network"), ("the content's", "content"), ("the style's", "style")]
JPEG = ".jpg"  # for photographs and what is drawn over them; cells and lines stay sharp as PNG
CSS = """
.vf-told textarea, .vf-told p { font-size: 0.95em; }
.vf-picture img { object-fit: contain; }
"""


def build(studio: Studio) -> gr.Blocks:
    """Return the page; its pictures are read and made by the studio."""
    shelf = Shelf(studio.folder.kept)
    with gr.Blocks(title="vitfeats", analytics_enabled=False) as page:
        gr.Markdown(
            "# vitfeats\nWhat vision models see in your pictures: explore their features, match two pictures, and make "
            "new ones. Pictures stay on the machine that runs this page."
        )
        with gr.Tab("Explore", id="explore"):
            _explore(page, studio, shelf)
        with gr.Tab("Match", id="match") as tab:
            _match(studio, shelf, tab)
        with gr.Tab("Splice", id="splice"):
            _splice(studio, shelf)
        with gr.Tab("Style", id="style"):
            _style(studio, shelf)
        with gr.Tab("Hyperfeatures", id="hyperfeatures") as tab:
            _hyperfeatures(studio, shelf, tab)
    return page.queue(default_concurrency_limit=4, max_size=64)


class Shelf:
    """The samples, as files that the page can show.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> str:
        """Return the path of a sample, or of a pattern KIND_SEED, written the first time."""
        path = self._folder / f"{name}.png"
        if not path.exists():
            self._drawn(name).save(path)
        return str(path)

    def group(self, names: Sequence[str]) -> str:
        """Return the path of a picture of several samples beside each other, or of the only one."""
        if len(names) == 1:
            return self[names[0]]
        path = self._folder / f"{'+'.join(names)}.png"
        if not path.exists():
            squares = [ImageOps.fit(Image.open(self[name]), (96, 96)) for name in names]
            both = Image.new("RGB", (97 * len(squares) - 1, 96), "white")
            for number, square in enumerate(squares):
                both.paste(square, (97 * number, 0))
            both.save(path)
        return str(path)

    def _drawn(self, name: str) -> Image.Image:
        if name in ("stereo_left", "stereo_right"):
            return samples.load("stereo")[name == "stereo_right"]
        kind, _, seed = name.rpartition("_")
        return patterns.draw(kind, 320, int(seed)) if kind in patterns.KINDS else samples.load(name)[0]


def _explore(page: gr.Blocks, studio: Studio, shelf: Shelf) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            image = _upload("Your picture: click a point", "explore-image", value=shelf["cat"])
            _samples(shelf, [(name,) for name in PHOTOGRAPHS], [image])
            look = _Look(studio, "explore")
            with gr.Row():
                x = gr.Number(label="x, pixels", precision=1, min_width=80, elem_id="explore-x")
                y = gr.Number(label="y, pixels", precision=1, min_width=80, elem_id="explore-y")
        with gr.Column(scale=3, min_width=320):
            similarity = _shown("What looks like this point", "explore-similarity")
            told = gr.Markdown(elem_id="explore-told", elem_classes="vf-told")
            with gr.Row():
                components = _shown("Components", "explore-components", height=260)
                saliency = _shown("What CLS attends to", "explore-saliency", height=260)
    everything = [components, saliency, similarity, x, y, told]
    answer = [similarity, x, y, told]

    @_told
    def opened(picture: str | None, model: str, facet: str, layer: float, size: float, stride: float) -> list[Any]:
        """All that is shown of a picture, for the point in its middle."""
        if picture is None:
            return [None, None, None, None, None, "Upload a picture, or click a sample."]
        return explored(picture, None, View.of(model, facet, layer, size, stride))

    @_told
    def again(picture: str | None, x: float | None, y: float | None, *look: Any) -> list[Any]:
        return [gr.skip()] * 6 if picture is None else explored(picture, _point(x, y), View.of(*look))

    def explored(picture: str, point: Point | None, view: View) -> list[Any]:
        found = explore(studio, picture, view, point)
        cells, seen = studio.file(found.components), found.saliency
        heats = [None if heat is None else studio.file(heat, JPEG) for heat in (seen, found.similarity)]
        return [cells, *heats, *_rounded(found.asked), found.told]

    @_told
    def alike(
        picture: str | None,
        x: float | None,
        y: float | None,
        model: str,
        facet: str,
        layer: float,
        size: float,
        stride: float,
    ) -> list[Any]:
        """What looks like a point (x, y) of a picture, in its pixels."""
        point = _point(x, y)
        found = similar(studio, picture, View.of(model, facet, layer, size, stride), point=point)
        return [studio.file(found.heat, JPEG), *(point or (None, None)), found.told]

    @_told
    def clicked(event: gr.SelectData, picture: str | None, *look: Any) -> list[Any]:
        return alike(picture, *_clicked(event), *look)

    @_told
    def clicked_below(event: gr.SelectData, picture: str | None, *look: Any) -> list[Any]:
        return alike(picture, *_rounded(_through(studio.picture(picture), event)), *look)

    image.change(opened, [image, *look.inputs], everything, api_name="explore", trigger_mode="always_last")
    look.changed(again, [image, x, y, *look.inputs], everything)
    x.submit(alike, [image, x, y, *look.inputs], answer, api_name="similarity", **_AT_ONCE)
    y.submit(alike, [image, x, y, *look.inputs], answer, api_visibility="private", **_AT_ONCE)
    image.select(clicked, [image, *look.inputs], answer, api_visibility="private", **_AT_ONCE)
    for picture in (components, saliency, similarity):
        picture.select(clicked_below, [image, *look.inputs], answer, api_visibility="private", **_AT_ONCE)
    page.load(opened, [image, *look.inputs], everything, api_visibility="private")


def _match(studio: Studio, shelf: Shelf, tab: gr.Tab) -> None:
    first_name, second_name = PAIRS[0]
    with gr.Row():
        first = _upload("First picture: click a point", "match-first", value=shelf[first_name])
        second = _upload("Second picture: or click one here", "match-second", value=shelf[second_name])
    _samples(shelf, PAIRS, [first, second])
    look = _Look(studio, "match", wide=True)
    told = gr.Markdown(elem_id="match-told", elem_classes="vf-told")
    with gr.Row():
        asked = _shown("The point", "match-asked")
        heat = _shown("Where it looks alike", "match-heat")
    with gr.Row():
        most = gr.Slider(1, 200, 40, step=1, label="Matches drawn", scale=3, elem_id="match-most")
        go = gr.Button("Mutual matches", variant="primary", scale=1, elem_id="match-go")
    matches = _shown("Tokens that are each other's most similar one", "match-matches", height=360)
    said = gr.Markdown(elem_id="match-said", elem_classes="vf-told")

    @_told
    def found_in_second(event: gr.SelectData, first: str | None, second: str | None, *look: Any) -> list[Any]:
        return found(first, second, "second", _clicked(event), View.of(*look))

    @_told
    def found_in_first(event: gr.SelectData, first: str | None, second: str | None, *look: Any) -> list[Any]:
        return found(second, first, "first", _clicked(event), View.of(*look))

    def drawn(result: Found) -> list[str]:
        return [studio.file(result.asked, JPEG), studio.file(result.heat, JPEG)]

    def found(picture: str | None, other: str | None, where: str, point: Point | None, view: View) -> list[Any]:
        if picture is None or other is None:
            raise ConfigError("expected two pictures, got one; upload the other, or click a pair of samples")
        result = similar(studio, picture, view, other, point)
        return [*drawn(result), f"In the {where} picture. {result.told}"]

    @_told
    def point(
        first: str | None,
        second: str | None,
        x: float | None,
        y: float | None,
        model: str,
        facet: str,
        layer: float,
        size: float,
        stride: float,
    ) -> list[Any]:
        """Where a point (x, y) of the first picture looks alike in the second."""
        return found(first, second, "second", _point(x, y), View.of(model, facet, layer, size, stride))

    @_told
    def middle(first: str | None, second: str | None, *look: Any) -> list[Any]:
        if first is None or second is None:
            return [None, None, "Upload two pictures, or click a pair of samples."]
        result = similar(studio, first, View.of(*look), second)
        return [*drawn(result), f"The middle of the first picture. {result.told} Click another point."]

    @_told
    def matched(
        first: str | None,
        second: str | None,
        most: float,
        model: str,
        facet: str,
        layer: float,
        size: float,
        stride: float,
    ) -> list[Any]:
        """Tokens of two pictures that are each other's most similar one."""
        picture, told = mutual(studio, first, second, View.of(model, facet, layer, size, stride), int(most))
        return [studio.file(picture), told]

    both, answer = [first, second, *look.inputs], [asked, heat, told]
    first.select(found_in_second, both, answer, api_visibility="private", **_AT_ONCE)
    second.select(found_in_first, both, answer, api_visibility="private", **_AT_ONCE)
    for event in (tab.select, first.change, second.change):
        event(middle, both, answer, api_visibility="private", show_progress="hidden", trigger_mode="always_last")
    look.changed(middle, both, answer)
    go.click(matched, [first, second, most, *look.inputs], [matches, said], api_name="mutual")
    with gr.Accordion("A point by its numbers, in the first picture", open=False), gr.Row():
        x, y = (gr.Number(label=f"{name}, pixels", precision=1, min_width=80) for name in "xy")
        ask = gr.Button("Find it")
    ask.click(point, [first, second, x, y, *look.inputs], answer, api_name="find", **_AT_ONCE)


def _splice(studio: Studio, shelf: Shelf) -> None:
    first_name, second_name = SPLICES[0]
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                structure = _upload("Structure", "splice-structure", value=shelf[first_name], height=200)
                appearance = _upload("Appearance", "splice-appearance", value=shelf[second_name], height=200)
            _samples(shelf, SPLICES, [structure, appearance])
            preset = gr.Radio(PRESETS, value="fast", label="Preset", elem_id="splice-preset")
            with gr.Accordion("More", open=False):
                model = gr.Dropdown(list(studio.models), value="mini", label="Model that judges")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            with gr.Row():
                go = gr.Button("Splice", variant="primary", elem_id="splice-go")
                stop = gr.Button("Stop", variant="stop", elem_id="splice-stop")
        with gr.Column(scale=3, min_width=320):
            result = _shown("The structure in the other's appearance", "splice-result", height=400)
            told = gr.Markdown("About a minute on a CPU.", elem_id="splice-told", elem_classes="vf-told")
            file = gr.DownloadButton("Download the picture", interactive=False, elem_id="splice-file")
            curves = _shown("Losses", "splice-curves", height=300)

    @_told_along
    def splice(structure: str | None, appearance: str | None, preset: Any, model: str, seed: float) -> Iterator[Any]:
        """Paint the structure of one picture with the appearance of another."""
        for news in spliced(studio, structure, appearance, model=model, preset=preset, seed=int(seed or 0)):
            curves = gr.skip() if news.curves is None else studio.file(news.curves)
            yield [*_news(studio, news), curves]

    run = go.click(
        splice,
        [structure, appearance, preset, model, seed],
        [result, told, file, curves],
        api_name="splice",
        concurrency_limit=1,
        concurrency_id="long",
        show_progress="minimal",
    )
    stop.click(lambda: "Stopped. The picture so far is kept.", None, told, cancels=[run], api_visibility="private")


def _style(studio: Studio, shelf: Shelf) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                content = _upload("Content", "style-content", value=shelf["china"], height=200)
                style = _upload("Style", "style-style", value=shelf[STYLES[0]], height=200)
            _samples(shelf, [(name,) for name in PHOTOGRAPHS], [content], "Contents")
            _samples(shelf, [(name,) for name in (*STYLES, *PHOTOGRAPHS[:2])], [style], "Styles")
            method = gr.Radio(
                [("AdaAttN", "adaattn"), ("SANet", "sanet"), ("AdaIN", "adain")],
                value="adaattn",
                label="Method",
                elem_id="style-method",
            )
            strength = gr.Slider(0, 1, 1, step=0.05, label="Strength", elem_id="style-strength")
            colours = gr.Radio(COLOURS, value="network", label="Colours", elem_id="style-colours")
            go = gr.Button("Paint", variant="primary", elem_id="style-go")
        with gr.Column(scale=3, min_width=320):
            result = _shown("The content in that style", "style-result", height=480)
            told = gr.Markdown("A few seconds on a CPU.", elem_id="style-told", elem_classes="vf-told")
            file = gr.DownloadButton("Download the picture", interactive=False, elem_id="style-file")

    @_told
    def paint(content: str | None, style: str | None, method: Any, strength: float, colours: Any) -> list[Any]:
        """Paint a picture in the style of another."""
        news = styled(studio, content, style, method=method, strength=strength, colours=colours)
        return _news(studio, news)

    go.click(paint, [content, style, method, strength, colours], [result, told, file], api_name="style")


def _hyperfeatures(studio: Studio, shelf: Shelf, tab: gr.Tab) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image = _upload("Your picture", "hyper-image", value=shelf["cat"], height=220)
            _samples(shelf, [(name,) for name in PHOTOGRAPHS], [image])
            layers = gr.CheckboxGroup(
                list(UP), value=list(UP[2::3]), label="Layers of ddpm_mini", elem_id="hyper-layers"
            )
            steps = gr.Radio(list(CHAINS), value=10, label="Steps of inversion", elem_id="hyper-steps")
            with gr.Row():
                go = gr.Button("Look", variant="primary", elem_id="hyper-go")
                stop = gr.Button("Stop", variant="stop", elem_id="hyper-stop")
        with gr.Column(scale=3, min_width=320):
            told = gr.Markdown(
                "Components of each layer, from the clean picture (left) to noise.",
                elem_id="hyper-told",
                elem_classes="vf-told",
            )
            result = _shown("Layers × steps", "hyper-result", height=480)
            file = gr.DownloadButton("Download the picture", interactive=False, elem_id="hyper-file")
            weights = _shown("Mixing weights of the bundled aggregation network", "hyper-mixing", height=360)

    @_told_along
    def look(picture: str | None, layers: list[str], steps: int) -> Iterator[Any]:
        """Components of layers of a diffusion model along the inversion of a picture."""
        for news in hyperfeatures(studio, picture, layers=layers, steps=int(steps)):
            yield _news(studio, news)

    run = go.click(
        look,
        [image, layers, steps],
        [result, told, file],
        api_name="hyperfeatures",
        concurrency_limit=1,
        concurrency_id="long",
        show_progress="minimal",
    )
    stop.click(lambda: "Stopped. What was read so far is kept.", None, told, cancels=[run], api_visibility="private")
    tab.select(_told(lambda: studio.file(mixing(studio))), None, weights, api_visibility="private")


class _Look:
    """The controls that say how a picture is looked at: model, facet, layer, size, stride."""

    def __init__(self, studio: Studio, name: str, *, wide: bool = False) -> None:
        self._studio = studio
        first = studio.models[0]
        choices = studio.choices(first)
        facet, layer = choices.usual
        with gr.Row() if wide else gr.Group():
            self.model = gr.Dropdown(list(studio.models), value=first, label="Model", elem_id=f"{name}-model")
            self.facet = gr.Radio(list(choices.taps), value=facet, label="Facet", elem_id=f"{name}-facet")
            self.layer = gr.Slider(
                0, len(choices.taps[facet]) - 1, layer, step=1, label="Layer", elem_id=f"{name}-layer"
            )
            with gr.Row():
                self.size = gr.Dropdown(
                    list(choices.sizes), value=choices.sizes[0], label="Size", min_width=80, elem_id=f"{name}-size"
                )
                self.stride = gr.Dropdown(
                    list(choices.strides),
                    value=_finer(choices),
                    label="Stride",
                    min_width=80,
                    elem_id=f"{name}-stride",
                )
        self.inputs = [self.model, self.facet, self.layer, self.size, self.stride]
        self._chosen = self.model.input(
            _told(self._choose), self.model, self.inputs[1:], api_name=f"choose_{name}", api_visibility="undocumented"
        )
        self._faceted = self.facet.input(
            _told(self._bound), [self.model, self.facet, self.layer], self.layer, api_visibility="private"
        )

    def changed(self, answer: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        """Answer whenever a visitor has changed one of the controls."""
        for event in (self._chosen.success, self._faceted.success):
            event(answer, inputs, outputs, api_visibility="private")
        self.layer.release(answer, inputs, outputs, api_visibility="private", trigger_mode="always_last")
        for control in (self.size, self.stride):
            control.input(answer, inputs, outputs, api_visibility="private", trigger_mode="always_last")

    def _choose(self, model: str) -> list[Any]:
        """Return what can be chosen of a model."""
        choices = self._studio.choices(model)
        facet, layer = choices.usual
        return [
            gr.Radio(choices=list(choices.taps), value=facet),
            gr.Slider(maximum=max(1, len(choices.taps[facet]) - 1), value=layer),
            gr.Dropdown(choices=list(choices.sizes), value=choices.sizes[0]),
            gr.Dropdown(choices=list(choices.strides), value=_finer(choices)),
        ]

    def _bound(self, model: str, facet: str, layer: float) -> Any:
        """Return the layers that have a facet."""
        last = len(self._studio.choices(model).taps[facet]) - 1
        return gr.Slider(maximum=max(1, last), value=min(int(layer), last))


_AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last"}
"""For what is answered in a few hundredths of a second."""


def _upload(label: str, name: str, *, value: str | None = None, height: int = 320) -> gr.Image:
    """Return a place for a picture, whose file is neither opened nor fetched by the page itself."""
    image = gr.Image(
        value=value,
        label=label,
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        height=height,
        elem_id=name,
        elem_classes="vf-picture",
        interactive=True,
    )
    local = image.async_move_resource_to_block_cache

    async def refuse_addresses(path: str | Path | None) -> str | None:
        if path is not None and "://" in str(path):
            raise gr.Error(
                "expected a picture that was uploaded, got an address; download it, and upload the file",
                print_exception=False,
            )
        return await local(path)

    # On this component and not in a class of its own, for which gradio would write a file beside its source.
    image.async_move_resource_to_block_cache = refuse_addresses  # type: ignore[method-assign]
    image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return image


def _shown(label: str, name: str, *, height: int = 360) -> gr.Image:
    """Return a place where a picture is shown, which is handed over as a file."""
    return gr.Image(
        label=label,
        type="filepath",
        interactive=False,
        height=height,
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes="vf-picture",
    )


def _samples(shelf: Shelf, names: Sequence[Sequence[str]], targets: list[gr.Image], label: str = "Samples") -> None:
    """Offer samples, or groups of them, that are taken by a click."""
    paths = [[shelf[name] for name in row] for row in names]
    shown = gr.Dataset(
        components=[gr.Image(render=False, type="filepath")],
        samples=[[shelf.group(row)] for row in names],
        label=label,
        type="index",
        samples_per_page=len(paths),
        elem_id=f"{targets[0].elem_id}-samples",
    )
    shown.click(
        lambda index: paths[index] if len(targets) > 1 else paths[index][0],
        shown,
        targets,
        api_visibility="private",
        show_progress="hidden",
        queue=False,
    )


def _finer(choices: Choices) -> int:
    """Return the stride that pictures are looked at with at first: half a patch, where the model can."""
    return choices.strides[min(1, len(choices.strides) - 1)]


def _point(x: float | None, y: float | None) -> Point | None:
    return None if x is None or y is None else (float(x), float(y))


def _clicked(event: gr.SelectData) -> Point:
    """Return the middle of the pixel that was clicked."""
    x, y = event.index
    return x + 0.5, y + 0.5


def _through(picture: Picture, event: gr.SelectData) -> Point:
    """Return a point that was clicked on what is drawn over a picture in pixels of the picture as it was given."""
    x, y = _clicked(event)
    return picture.outside(
        x * picture.image.width / picture.shown.width, y * picture.image.height / picture.shown.height
    )


def _rounded(point: Point) -> Point:
    return round(point[0], 1), round(point[1], 1)


def _news(studio: Studio, news: Progress) -> list[Any]:
    """Return (picture, sentence, download) of a run for the page; what is not there yet stays as it is."""
    if news.picture is None:
        return [gr.skip(), news.told, gr.skip()]
    file = studio.file(news.picture)
    return [file, news.told, gr.DownloadButton(value=file, interactive=True)]


def _told(answer: F) -> F:
    """Let errors be shown as sentences."""

    @functools.wraps(answer)
    def answered(*given: Any, **others: Any) -> Any:
        try:
            return answer(*given, **others)
        except Exception as error:
            raise _sentence(error) from error

    return answered  # type: ignore[return-value]


def _told_along(answer: Callable[..., Iterator[Any]]) -> Any:
    """Let errors of an iterator be shown as sentences."""

    def told(given: tuple[Any, ...]) -> Iterator[Any]:
        try:
            yield from answer(*given)
        except Exception as error:
            raise _sentence(error) from error

    # gradio asks whether a function is a generator's; what wraps one, such as a type check, hides that.
    answered: Any = lambda *given: (yield from told(given))  # noqa: E731
    return functools.update_wrapper(answered, answer)


def _sentence(error: Exception) -> gr.Error:
    """Return an error as the page shows it: as text, whatever names of files are in it."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, VitFeatsError):
        return gr.Error(html.escape(str(error), quote=False), title="This did not work", print_exception=False)
    _log.exception("an answer of the demo failed", exc_info=error)
    return gr.Error(
        "Something failed here that is not of your doing; the terminal of the demo has the details.",
        title="This did not work",
        print_exception=False,
    )
