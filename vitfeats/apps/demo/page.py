"""The page: what stands where, and which function answers what. Nothing is computed here."""

from collections.abc import Iterator
from typing import Any, get_args

import gradio as gr

from vitfeats import patterns
from vitfeats.apps.demo.looking import Found, Point, explore, mutual, similar
from vitfeats.apps.demo.making import CHAINS, UP, hyperfeatures, mixing, spliced, styled
from vitfeats.apps.demo.parts import (
    AT_ONCE,
    LATEST,
    Look,
    Shelf,
    clicked_at,
    in_words,
    in_words_along,
    offer,
    point_of,
    rounded,
    sentence_of,
    shown,
    shown_news,
    stopped,
    through,
    upload,
)
from vitfeats.apps.demo.studio import Studio, View
from vitfeats.configs import Preset, SpliceConfig
from vitfeats.errors import ConfigError

PHOTOGRAPHS = ("cat", "coffee", "astronaut", "grace_hopper", "china", "flower")
PAIRS = (("stereo_left", "stereo_right"), ("astronaut", "grace_hopper"), ("cat", "coffee"))
SPLICES = (("astronaut", "grace_hopper"), ("cat", "coffee"), ("flower", "china"))
STYLES = tuple(f"{kind}_{seed}" for seed, kind in enumerate(patterns.KINDS, 3))

PRESETS = [
    (f"{name}: {SpliceConfig.preset(name).steps} steps{words}", name)
    for name, words in zip(get_args(Preset), (", as published, for a GPU", "", ", a first look"), strict=True)
]
COLOURS = [("as painted", "network"), ("the content's", "content"), ("the style's", "style")]
JPEG = ".jpg"  # for photographs and what is drawn over them; cells and lines stay sharp as PNG
CSS = """
.vf-told p { font-size: 0.95em; }
.vf-titled { gap: 4px; }
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


def _explore(page: gr.Blocks, studio: Studio, shelf: Shelf) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            image = upload("Your picture: click a point", "explore-image", value=shelf["cat"])
            samples_of = offer(shelf, [(name,) for name in PHOTOGRAPHS[:5]], [image])
        with gr.Column(scale=3, min_width=320):
            similarity = shown("What looks like this point", "explore-similarity")
            told = sentence_of("explore-told")
    look = Look(studio, "explore")
    with gr.Row():
        components = shown("Components", "explore-components", height=300)
        saliency = shown("What CLS attends to", "explore-saliency", height=300)
    with gr.Accordion("The point by its numbers", open=False), gr.Row():
        x = gr.Number(label="x, pixels", precision=1, min_width=80, elem_id="explore-x")
        y = gr.Number(label="y, pixels", precision=1, min_width=80, elem_id="explore-y")
    everything = [components, saliency, similarity, x, y, told]
    answer = [similarity, x, y, told]
    nothing = [*[None] * 5, "Upload a picture, or click a sample."]

    @in_words
    def opened(picture: str | None, model: str, facet: str, layer: float, size: float, stride: float) -> list[Any]:
        """All that is shown of a picture, for the point in its middle."""
        return nothing if picture is None else explored(picture, None, View.of(model, facet, layer, size, stride))

    @in_words
    def again(picture: str | None, x: float | None, y: float | None, *look: Any) -> list[Any]:
        return [gr.skip()] * 6 if picture is None else explored(picture, point_of(x, y), View.of(*look))

    def explored(picture: str, point: Point | None, view: View) -> list[Any]:
        found = explore(studio, picture, view, point)
        cells, seen = studio.file(found.components), found.saliency
        heats = [None if heat is None else studio.file(heat, JPEG) for heat in (seen, found.similarity)]
        return [cells, *heats, *rounded(found.asked), found.told]

    @in_words
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
        found = similar(studio, picture, View.of(model, facet, layer, size, stride), point=point_of(x, y))
        return [studio.file(found.heat, JPEG), *rounded(found.at), found.told]

    @in_words
    def clicked(event: gr.SelectData, picture: str | None, *look: Any) -> list[Any]:
        return alike(picture, *clicked_at(event), *look)

    @in_words
    def clicked_below(event: gr.SelectData, picture: str | None, *look: Any) -> list[Any]:
        return alike(picture, *rounded(through(studio.picture(picture), event)), *look)

    running = [
        image.upload(opened, [image, *look.inputs], everything, api_name="explore", trigger_mode="always_last"),
        samples_of.then(opened, [image, *look.inputs], everything, **LATEST),
        *look.changed(again, [image, x, y, *look.inputs], everything),
    ]
    # It is given the picture that was there before; what is on its way would come back with it.
    image.clear(lambda: nothing, None, everything, api_visibility="private", cancels=running)
    x.submit(alike, [image, x, y, *look.inputs], answer, api_name="similarity", **AT_ONCE)
    y.submit(alike, [image, x, y, *look.inputs], answer, api_visibility="private", **AT_ONCE)
    image.select(clicked, [image, *look.inputs], answer, api_visibility="private", **AT_ONCE)
    for picture in (components, saliency, similarity):
        picture.select(clicked_below, [image, *look.inputs], answer, api_visibility="private", **AT_ONCE)
    page.load(opened, [image, *look.inputs], everything, api_visibility="private")


def _match(studio: Studio, shelf: Shelf, tab: gr.Tab) -> None:
    first_name, second_name = PAIRS[0]
    with gr.Row():
        first = upload("First picture: click a point", "match-first", value=shelf[first_name])
        second = upload("Second picture: or click one here", "match-second", value=shelf[second_name])
    samples_of = offer(shelf, PAIRS, [first, second])
    look = Look(studio, "match", usual=("token", 2))  # of `mini`, better at places than deeper ones
    told = sentence_of("match-told")
    with gr.Row():
        asked = shown("The point", "match-asked")
        heat = shown("Where it looks alike", "match-heat")
    with gr.Row():
        most = gr.Slider(1, 200, 40, step=1, label="Matches drawn", scale=3, elem_id="match-most")
        go = gr.Button("Mutual matches", variant="primary", scale=1, elem_id="match-go")
    matches = shown("Tokens that are each other's most similar one", "match-matches", height=360)
    said = sentence_of("match-said")

    nothing = [None, None, "Upload two pictures, or click a pair of samples."]

    @in_words
    def found_in_second(event: gr.SelectData, first: str | None, second: str | None, *look: Any) -> list[Any]:
        return found(first, second, "second", clicked_at(event), View.of(*look))

    @in_words
    def found_in_first(event: gr.SelectData, first: str | None, second: str | None, *look: Any) -> list[Any]:
        return found(second, first, "first", clicked_at(event), View.of(*look))

    def drawn(result: Found) -> list[str]:
        return [studio.file(result.asked, JPEG), studio.file(result.heat, JPEG)]

    def found(picture: str | None, other: str | None, where: str, point: Point | None, view: View) -> list[Any]:
        if picture is None or other is None:
            raise ConfigError("expected two pictures, got one; upload the other, or click a pair of samples")
        result = similar(studio, picture, view, other, point)
        return [*drawn(result), f"In the {where} picture. {result.told}"]

    @in_words
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
        return found(first, second, "second", point_of(x, y), View.of(model, facet, layer, size, stride))

    @in_words
    def begin(told: str | None, first: str | None, second: str | None, *look: Any) -> list[Any]:
        return [gr.skip()] * 3 if told else middle(first, second, *look)

    @in_words
    def middle(first: str | None, second: str | None, *look: Any) -> list[Any]:
        if first is None or second is None:
            return nothing
        result = similar(studio, first, View.of(*look), second)
        return [*drawn(result), f"The middle of the first picture. {result.told} Click another point."]

    @in_words
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

    def matched_if_both(first: str | None, second: str | None, *given: Any) -> list[Any]:
        return [None, ""] if first is None or second is None else matched(first, second, *given)

    def begin_matching(said: str | None, *given: Any) -> list[Any]:
        return [gr.skip()] * 2 if said else matched_if_both(*given)

    both, answer = [first, second, *look.inputs], [asked, heat, told]
    first.select(found_in_second, both, answer, api_visibility="private", **AT_ONCE)
    second.select(found_in_first, both, answer, api_visibility="private", **AT_ONCE)
    matching = [first, second, most, *look.inputs]
    tab.select(begin, [told, *both], answer, api_visibility="private", show_progress="hidden")
    tab.select(begin_matching, [said, *matching], [matches, said], api_visibility="private", show_progress="hidden")
    events, pairs = (first.upload, second.upload, samples_of.then), [matches, said]
    running: list[Any] = [event(middle, both, answer, show_progress="hidden", **LATEST) for event in events]
    running += [event(matched_if_both, matching, pairs, show_progress="hidden", **LATEST) for event in events]
    running += look.changed(middle, both, answer)
    running += look.changed(matched_if_both, matching, pairs, show_progress="hidden")
    running.append(go.click(matched, matching, pairs, api_name="mutual"))
    for event in (first.clear, second.clear):
        event(lambda: [*nothing, None, ""], None, [*answer, *pairs], api_visibility="private", cancels=running)
    with gr.Accordion("A point by its numbers, in the first picture", open=False), gr.Row():
        x, y = (gr.Number(label=f"{name}, pixels", precision=1, min_width=80) for name in "xy")
        ask = gr.Button("Find it")
    ask.click(point, [first, second, x, y, *look.inputs], answer, api_name="find", **AT_ONCE)


def _splice(studio: Studio, shelf: Shelf) -> None:
    first_name, second_name = SPLICES[0]
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                structure = upload("Structure", "splice-structure", value=shelf[first_name], height=200)
                appearance = upload("Appearance", "splice-appearance", value=shelf[second_name], height=200)
            offer(shelf, SPLICES, [structure, appearance])
            preset = gr.Radio(PRESETS, value="fast", label="Preset", elem_id="splice-preset")
            with gr.Accordion("More", open=False):
                model = gr.Dropdown(list(studio.models), value="mini", label="Model that judges")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            with gr.Row():
                go = gr.Button("Splice", variant="primary", elem_id="splice-go")
                stop = gr.Button("Stop", variant="stop", elem_id="splice-stop")
        with gr.Column(scale=3, min_width=320):
            result = shown("The structure in the other's appearance", "splice-result", height=400)
            told = sentence_of("splice-told", "A minute or two on a CPU.")
            file = gr.DownloadButton("Download the picture", interactive=False, elem_id="splice-file")
            curves = shown("Losses", "splice-curves", height=300)

    @in_words_along
    def splice(structure: str | None, appearance: str | None, preset: Any, model: str, seed: float) -> Iterator[Any]:
        """Paint the structure of one picture with the appearance of another."""
        for news in spliced(studio, structure, appearance, model=model, preset=preset, seed=int(seed or 0)):
            curves = gr.skip() if news.curves is None else studio.file(news.curves)
            yield [*shown_news(studio, news), curves]

    run = go.click(
        splice,
        [structure, appearance, preset, model, seed],
        [result, told, file, curves],
        api_name="splice",
        concurrency_limit=1,
        concurrency_id="long",
        show_progress="minimal",
    )
    stop.click(stopped, told, told, cancels=[run], api_visibility="private")


def _style(studio: Studio, shelf: Shelf) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                content = upload("Content", "style-content", value=shelf["china"], height=200)
                style = upload("Style", "style-style", value=shelf[STYLES[0]], height=200)
            offer(shelf, [(name,) for name in PHOTOGRAPHS[:5]], [content], "Contents")
            offer(shelf, [(name,) for name in (*STYLES, *PHOTOGRAPHS[:2])], [style], "Styles")
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
            result = shown("The content in that style", "style-result", height=480)
            told = sentence_of("style-told", "A few seconds on a CPU.")
            file = gr.DownloadButton("Download the picture", interactive=False, elem_id="style-file")

    @in_words
    def paint(content: str | None, style: str | None, method: Any, strength: float, colours: Any) -> list[Any]:
        """Paint a picture in the style of another."""
        news = styled(studio, content, style, method=method, strength=strength, colours=colours)
        return shown_news(studio, news)

    go.click(paint, [content, style, method, strength, colours], [result, told, file], api_name="style")


def _hyperfeatures(studio: Studio, shelf: Shelf, tab: gr.Tab) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image = upload("Your picture", "hyper-image", value=shelf["cat"], height=220)
            offer(shelf, [(name,) for name in PHOTOGRAPHS], [image])
            layers = gr.CheckboxGroup(
                list(UP), value=list(UP[2::3]), label="Layers of ddpm_mini", elem_id="hyper-layers"
            )
            steps = gr.Radio(list(CHAINS), value=10, label="Steps of inversion", elem_id="hyper-steps")
            with gr.Row():
                go = gr.Button("Look", variant="primary", elem_id="hyper-go")
                stop = gr.Button("Stop", variant="stop", elem_id="hyper-stop")
        with gr.Column(scale=3, min_width=320):
            told = sentence_of("hyper-told", "Components of each layer, from the clean picture (left) to noise.")
            result = shown("Layers × steps", "hyper-result", height=480)
            file = gr.DownloadButton("Download the picture", interactive=False, elem_id="hyper-file")
            weights = shown("Mixing weights of the bundled aggregation network", "hyper-mixing", height=360)

    @in_words_along
    def look(picture: str | None, layers: list[str], steps: int) -> Iterator[Any]:
        """Components of layers of a diffusion model along the inversion of a picture."""
        for news in hyperfeatures(studio, picture, layers=layers, steps=int(steps)):
            yield shown_news(studio, news)

    run = go.click(
        look,
        [image, layers, steps],
        [result, told, file],
        api_name="hyperfeatures",
        concurrency_limit=1,
        concurrency_id="long",
        show_progress="minimal",
    )
    stop.click(stopped, told, told, cancels=[run], api_visibility="private")
    tab.select(in_words(lambda: studio.file(mixing(studio))), None, weights, api_visibility="private")
