"""The parts that tabs are made of: places for pictures, samples, controls, and errors as sentences."""

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
from vitfeats.apps.demo.looking import Point
from vitfeats.apps.demo.making import GOING, Progress
from vitfeats.apps.demo.studio import Choices, Studio
from vitfeats.errors import VitFeatsError

F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger("vitfeats.demo")

AT_ONCE: dict[str, Any] = {"concurrency_limit": 16, "show_progress": "hidden", "trigger_mode": "always_last"}
"""For what is answered in a few hundredths of a second. Through the queue, for errors are not shown without it."""


LATEST: dict[str, Any] = {"api_visibility": "private", "trigger_mode": "always_last"}
"""For what takes longer: of what a visitor asks for meanwhile, gradio would drop the last."""


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


class Look:
    """The controls that say how a picture is looked at: model, facet, layer, size, stride."""

    def __init__(self, studio: Studio, name: str, *, usual: tuple[str, int] | None = None) -> None:
        self._studio = studio
        first = studio.models[0]
        choices = studio.choices(first)
        facet, layer = usual or choices.usual
        with gr.Row():
            self.model = gr.Dropdown(
                list(studio.models), value=first, label="Model", scale=2, min_width=160, elem_id=f"{name}-model"
            )
            self.facet = gr.Radio(list(choices.taps), value=facet, label="Facet", scale=4, elem_id=f"{name}-facet")
            self.layer = gr.Slider(
                0, len(choices.taps[facet]) - 1, layer, step=1, label="Layer", scale=3, elem_id=f"{name}-layer"
            )
            with gr.Row(scale=2):
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
        self._chosen = self.model.select(  # its input event comes twice
            in_words(self._choose),
            self.model,
            self.inputs[1:],
            api_name=f"choose_{name}",
            api_visibility="undocumented",
        )
        self._faceted = self.facet.input(
            in_words(self._bound), [self.model, self.facet, self.layer], self.layer, api_visibility="private"
        )

    def changed(self, answer: Callable[..., Any], inputs: list[Any], outputs: list[Any], **others: Any) -> list[Any]:
        """Answer whenever a visitor has changed one of the controls; return what can be cancelled."""
        events = (self._chosen.success, self._faceted.success, self.layer.input, self.size.select, self.stride.select)
        return [event(answer, inputs, outputs, **LATEST, **others) for event in events]

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


def upload(label: str, name: str, *, value: str | None = None, height: int = 320) -> gr.Image:
    """Return a place for a picture, whose file is neither opened nor fetched by the page itself."""
    with _titled(label):
        image = gr.Image(
            value=value,
            label=label,
            show_label=False,
            type="filepath",
            image_mode=None,
            format="png",
            sources=["upload", "clipboard"],
            buttons=["fullscreen"],
            height=height,
            elem_id=name,
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


def shown(label: str, name: str, *, height: int = 360) -> gr.Image:
    """Return a place where a picture is shown, which is handed over as a file."""
    with _titled(label):
        return gr.Image(
            label=label,
            show_label=False,
            type="filepath",
            interactive=False,
            height=height,
            buttons=["download", "fullscreen"],
            elem_id=name,
        )


def _titled(label: str) -> gr.Column:
    """Return a column that begins with a title: gradio's own labels lie over the picture."""
    with gr.Column(min_width=160, elem_classes="vf-titled") as column:
        gr.Markdown(f"**{label}**")
    return column


def sentence_of(name: str, words: str = "") -> gr.Markdown:
    """Return a place for what is told of a picture."""
    return gr.Markdown(words, label="told", elem_id=name, elem_classes="vf-told")


def stopped(told: str | None) -> str:
    """Return what is told after a run was stopped; the same as before where none was running."""
    going = (told or "").startswith(GOING)
    return "Stopped. What was made so far is kept." if going else told or ""


def offer(shelf: Shelf, names: Sequence[Sequence[str]], targets: list[gr.Image], label: str = "Samples") -> Any:
    """Offer samples, or groups of them, that are taken by a click; return what happens then."""
    paths = [[shelf[name] for name in row] for row in names]
    shown = gr.Dataset(
        components=[gr.Image(render=False, type="filepath")],
        samples=[[shelf.group(row)] for row in names],
        label=label,
        type="index",
        samples_per_page=len(paths),
        elem_id=f"{targets[0].elem_id}-samples",
    )
    return shown.click(
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


def point_of(x: float | None, y: float | None) -> Point | None:
    """Return the point of two number fields; None where one is empty."""
    return None if x is None or y is None else (float(x), float(y))


def clicked_at(event: gr.SelectData) -> Point:
    """Return the middle of the pixel that was clicked."""
    x, y = event.index
    return x + 0.5, y + 0.5


def through(picture: Picture, event: gr.SelectData) -> Point:
    """Return a point that was clicked on what is drawn over a picture in pixels of the picture as it was given."""
    x, y = clicked_at(event)
    across, down = picture.drawn_at(1.0, 1.0)
    return picture.outside(x / across, y / down)


def rounded(point: Point) -> Point:
    """Return a point as number fields show it."""
    return round(point[0], 1), round(point[1], 1)


def shown_news(studio: Studio, news: Progress) -> list[Any]:
    """Return (picture, sentence, download) of a run for the page; what is not there yet stays as it is."""
    if news.picture is None:
        return [gr.skip(), news.told, gr.skip()]
    file = studio.file(news.picture)
    return [file, news.told, gr.DownloadButton(value=file, interactive=True)]


def in_words(answer: F) -> F:
    """Let errors be shown as sentences."""

    @functools.wraps(answer)
    def answered(*given: Any, **others: Any) -> Any:
        try:
            return answer(*given, **others)
        except Exception as error:
            raise _sentence(error) from error

    return answered  # type: ignore[return-value]


def in_words_along(answer: Callable[..., Iterator[Any]]) -> Any:
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
