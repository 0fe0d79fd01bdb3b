"""The extractor for diffusion models: features of real pictures by noise or inversion, of new ones as they form."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitfeats.card import ModelCard
from vitfeats.configs import DiffusionConfig
from vitfeats.descriptor import Descriptors
from vitfeats.errors import ConfigError, ShapeError, TapError, UnknownFacetError, nearest_names
from vitfeats.extractors.base import Extractor
from vitfeats.extractors.conv import joined
from vitfeats.grid import Frame, PatchGrid, Size
from vitfeats.hooks import Probe, capture, find_module
from vitfeats.nets.chains import chain_of
from vitfeats.nets.denoiser import Denoiser
from vitfeats.preprocess import Images, Prepared, Preprocess
from vitfeats.taps import Reading, Tap
from vitfeats.views import numbered

_PROJECTIONS = {"query": "to_q", "key": "to_k", "value": "to_v"}
_DRAWN, _NOISED, _BEGUN = 0, 1, 2  # what noise is for: latents, levels of noise, pictures that are generated

OnMap = Callable[[Tap, Tensor], None]
"""``on_map(tap, seen)``: what a layer gave, as it fires: a map (batch, dim, rows, cols), or tokens (batch, n, dim)."""


@dataclass(frozen=True, eq=False)
class Generated:
    """Pictures that a diffusion model made, and how they looked inside while they formed.

    Attributes:
        images: (batch, 3, height, width) in 0..1.
        latents: (batch, channels, rows, cols), what they are decoded from.
        features: What was tapped, as of any extractor.
    """

    images: Float[Tensor, "batch 3 height width"]
    latents: Float[Tensor, "batch channels rows cols"]
    features: Descriptors


class DiffusionExtractor(Extractor):
    """Reads the layers of a diffusion model's U-Net, at a level of noise or at the steps of a chain.

    Layers are named as in ``residual@up1.res1``: ``down0`` … ``mid`` … ``up3`` are blocks, ``res`` and ``attn`` the
    residual and attention modules in them. ``residual`` is a residual block after its second convolution, before the
    skip is added (what Diffusion Hyperfeatures reads); ``out`` the output of a block (what DIFT reads, ``out@up1``) or
    of a module in it; ``key``, ``query``, ``value`` those of self-attention (``key@up1.attn0``; of its further
    transformer blocks, ``key@up1.attn0.block1``). In mode "inversion" a tap names its step: ``residual@up1.res1#25``,
    0 the noisiest, as in :meth:`generate`.

    Nothing of the model is changed. The chain ends at the deepest step that is asked for.
    """

    model: Denoiser

    def __init__(
        self,
        model: Denoiser,
        card: ModelCard,
        preprocess: Preprocess,
        *,
        dtype: str | torch.dtype = "auto",
        diffusion: DiffusionConfig | None = None,
    ) -> None:
        """Prepare to read a model.

        Args:
            model: The U-Net and what stands around it.
            card: What is known about it.
            preprocess: Size and normalisation of its images; its stride must be its patch.
            dtype: See :func:`~vitfeats.extractors.base.autocast_type`.
            diffusion: How it reads; None is the default settings.

        Raises:
            ConfigError: If the settings do not fit the model, or a stride is asked for.
        """
        super().__init__(model, card, preprocess, dtype)
        self.layers = find_layers(model.unet)
        self._usual = card.default_tap
        self._read_by(diffusion or DiffusionConfig())
        self._check_stride()

    def _read_by(self, diffusion: DiffusionConfig) -> None:
        """Take settings, and make the default tap one that they have."""
        model, name = self.model, self.card.name
        self.diffusion = diffusion
        inverting = diffusion.mode == "inversion"
        levels = len(model.kept)
        if (diffusion.steps if inverting else diffusion.time + 1) > levels:
            asked = f"{diffusion.steps} steps" if inverting else f"time={diffusion.time}"
            raise ConfigError(f"expected at most the {levels} levels of noise of {name}, got {asked}")
        if diffusion.guidance is not None and not (model.takes_text and model.text):
            raise ConfigError(
                f"expected a model with a text encoder for guidance, but {name} has none; leave guidance=None"
            )
        usual = Tap.parse(self._usual)
        if inverting and usual.layer in self.layers:
            kept = diffusion.kept_steps
            usual = replace(usual, step=kept[len(kept) // 2])
        self.card = replace(self.card, default_tap=str(usual))

    def _check_stride(self) -> None:
        if self.preprocess.stride != self.card.patch:
            raise ConfigError(
                f"expected no stride for {self.card.name}, got {self.preprocess.stride}: its layers have strides of "
                "their own; choose a finer layer, or a larger size"
            )

    @property
    def overlaps(self) -> bool:
        """Layers have strides of their own."""
        return False

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach an image: in the modes of one pass."""
        return self.diffusion.mode != "inversion"

    @property
    def draws(self) -> int:
        """How many times each tap fires: once, or as often as noise is drawn."""
        return self.diffusion.ensemble if self.diffusion.mode == "noise" else 1

    def resolve(self, tap: Tap) -> Tap:
        """Return the tap, with a step only where there are steps."""
        known = ("residual", "out", *_PROJECTIONS)
        if tap.facet not in known:
            raise UnknownFacetError(
                f"expected a facet that {self.card.name} has, got {tap.facet!r}: it is a diffusion model; try one of "
                f"{', '.join(known)}, for example '{self.card.default_tap}'"
            )
        if isinstance(tap.layer, int):
            tap = self._numbered(tap)
        for name in str(tap.layer).split("+"):
            self._path(Tap(tap.facet, name))
        return self._with_step(tap)

    def _numbered(self, tap: Tap) -> Tap:
        """Return the tap with its layer's name: layers are counted among those that have the facet."""
        fitting = [name for name in self.layers if self._has(tap.facet, name)]
        if not fitting:
            raise UnknownFacetError(
                f"expected a facet that {self.card.name} has, got {tap.facet!r}: no layer of it has one; try '"
                f"{self.card.default_tap}'"
            )
        return replace(tap, layer=fitting[int(tap.resolved(len(fitting)).layer)])

    def _with_step(self, tap: Tap) -> Tap:
        steps, inverting = self.diffusion.steps, self.diffusion.mode == "inversion"
        if not inverting:
            if tap.step is not None:
                raise TapError(
                    f"expected a tap without a step in mode {self.diffusion.mode!r}, got '{tap}'; load with "
                    "diffusion=DiffusionConfig.preset('hyperfeatures') for steps"
                )
            return tap
        if tap.step is None and steps == 1:
            return replace(tap, step=0)
        return self._checked_step(tap)

    def _checked_step(self, tap: Tap) -> Tap:
        steps = self.diffusion.steps
        if tap.step is None or tap.step >= steps:
            raise TapError(
                f"expected a tap with a step from 0 (noise) to {steps - 1} (clean), got '{tap}'; for example "
                f"'{replace(tap, step=steps // 2)}'"
            )
        return tap

    def read(self, batch: Prepared, taps: Sequence[Tap]) -> dict[Tap, Reading]:
        """Read the taps: in one pass, the mean of several, or along the chain down to the noisiest step asked for."""
        singles = _singles(taps)
        sums: dict[Tap, Tensor] = {}

        def keep(tap: Tap, seen: Tensor) -> None:
            sums[tap] = sums[tap] + _own(seen) if tap in sums else _own(seen)

        self.stream(batch, list(dict.fromkeys(one for several in singles.values() for one in several)), keep)
        size = batch.grid.network_size
        return {
            tap: joined([gridded(sums[one] / self.draws, size) for one in several]) for tap, several in singles.items()
        }

    def stream(self, batch: Prepared, taps: Sequence[Tap], on_map: OnMap) -> None:
        """Pass pictures through the model, and hand over each tapped map as it fires; nothing is kept.

        In mode "noise" with an ensemble, each map fires once a draw.

        Args:
            batch: Prepared pictures.
            taps: Resolved taps of single layers.
            on_map: Called with each.

        Raises:
            ConfigError: If the pictures want gradients in mode "inversion", or the model cannot run in this precision.
        """
        self._check_stride()
        config, model = self.diffusion, self.model
        if config.mode == "inversion" and batch.pixels.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                "expected images without gradients in mode 'inversion', got some that require them; use mode='noise' "
                "or 'clean', or detach them"
            )
        size = batch.grid.network_size
        latents = self._encoded(batch)
        told = self._told(len(latents), size)
        if config.mode == "inversion":
            for _ in self._chain(latents, told, taps, on_map, inverting=True):
                pass
            return
        kept = model.kept[config.time] if config.time >= 0 else torch.ones_like(model.kept[0])
        for draw in range(self.draws):
            given = latents
            if config.mode == "noise":
                noise = self._noise(latents.shape[1:], _NOISED, draw)
                given = kept.sqrt() * latents + (1 - kept).sqrt() * noise
            self._passed(given, config.time, told, taps, on_map, last=True)

    def invert(self, images: Images) -> Float[Tensor, "batch channels rows cols"]:
        """Return the noise that the chain carries pictures to (Song et al., DDIM, ICLR 2021, section 4.3).

        Raises:
            ImageError, ShapeError: If the images do not do.
        """

        def work(batch: Prepared) -> Tensor:
            latents = self._encoded(batch)
            told = self._told(len(latents), batch.grid.network_size)
            return list(self._chain(latents, told, (), None, inverting=True))[-1]

        with torch.no_grad():
            return self.run(images, work)[0]

    @torch.no_grad()
    def generate(
        self,
        prompt: str | None = None,
        *,
        latents: Float[Tensor, "batch channels rows cols"] | None = None,
        taps: Sequence[str | Tap] = (),
        size: Size | None = None,
        number: int = 1,
        seed: int | None = None,
    ) -> Generated:
        """Make pictures from noise, and read the model while it does.

        Args:
            prompt: What they show; None is that of the settings.
            latents: The noise to begin with; None draws it.
            taps: What to read, with steps: ``residual@up1.res1#25``. The same step of an inverted picture and of a
                generated one has the same level of noise, but for one step of the published chain.
            size: (height, width) in pixels where noise is drawn; None is the extractor's own.
            number: Pictures to make where noise is drawn.
            seed: Of the noise; None is that of the settings.

        Raises:
            ShapeError: If the size or the latents do not fit the U-Net; the message names the multiple.
            TapError, UnknownFacetError: If a tap does not exist.
        """
        asked = [(str(tap), self.stepped(Tap.parse(tap))) for tap in taps]
        singles = _singles([tap for _, tap in asked])
        kept: dict[Tap, Tensor] = {}
        wanted = list(dict.fromkeys(one for several in singles.values() for one in several))
        made, batch = self.form(
            prompt,
            latents,
            wanted,
            lambda tap, seen: kept.update({tap: _own(seen)}),
            size=size,
            number=number,
            seed=seed,
        )
        network = batch.grid.network_size
        readings = {tap: joined([gridded(kept[one], network) for one in several]) for tap, several in singles.items()}
        features = Descriptors([(text, self._descriptor(tap, readings[tap], batch)) for text, tap in asked])
        return Generated(batch.pixels, made, features)

    @torch.no_grad()
    def form(
        self,
        prompt: str | None,
        latents: Float[Tensor, "batch channels rows cols"] | None,
        taps: Sequence[Tap],
        on_map: OnMap,
        *,
        size: Size | None = None,
        number: int = 1,
        seed: int | None = None,
    ) -> tuple[Float[Tensor, "batch channels rows cols"], Prepared]:
        """Make pictures, and hand over each tapped map as it fires; return their latents, and them, in 0..1.

        As :meth:`generate`; ``taps`` are of single layers, from :meth:`stepped`.
        """
        if latents is None:
            latents = self._begun(size, number, self.diffusion.seed if seed is None else seed)
        network = self._check_latents(latents)
        with self._precision():
            began = latents.to(self.device, torch.float32)
            told = self._told(len(began), network, prompt)
            made = list(self._chain(began, told, taps, on_map, inverting=False))[-1]
            images = (self.model.decode(made) / 2 + 0.5).clamp(0, 1)
        grid = PatchGrid.covering(network, self.card.patch, self.card.patch)
        return made, Prepared(images, grid, tuple(Frame(network, network) for _ in range(len(made))))

    # The model's passes ------------------------------------------------------------------------------------------

    def _told(self, batch: int, size: Size, prompt: str | None = None) -> list[dict[str, Any]]:
        """Return what the U-Net is told: with the prompt, and before it without, where there is guidance."""
        config = self.diffusion
        prompts = [config.prompt if prompt is None else prompt]
        if config.guidance is not None:
            prompts.insert(0, config.negative_prompt)
        return [self.model.condition(text, batch, size) for text in prompts]

    def _passed(
        self,
        latents: Tensor,
        time: int,
        told: Sequence[Mapping[str, Any]],
        taps: Sequence[Tap],
        on_map: OnMap | None,
        *,
        last: bool = False,
    ) -> Tensor | None:
        """Run the U-Net once (with guidance twice), tapping the pass with the prompt; return what it predicts.

        ``last`` ends the pass at the deepest tap, and returns None.
        """
        try:
            without = [self.model.predict(latents, time, other) for other in told[:-1] if not last]
            said: list[Tensor] = []
            if not taps:
                said.append(self.model.predict(latents, time, told[-1]))
            else:
                assert on_map is not None
                capture(
                    self.model,
                    {tap: Probe(self._path(tap), _seen) for tap in taps},
                    lambda _: said.append(self.model.predict(latents, time, told[-1])),
                    stop=last,
                    on_value=on_map,  # type: ignore[arg-type] - probes are named by their taps
                )
        except RuntimeError as error:
            if "Half" in str(error):
                raise ConfigError(
                    f"expected weights that can run on {self.device}, got float16, which it cannot ({error}); call "
                    ".float() on the model, or load it in float32"
                ) from error
            raise
        if last:
            return None
        if without:
            assert self.diffusion.guidance is not None
            return without[0] + self.diffusion.guidance * (said[0] - without[0])
        return said[0]

    def _chain(
        self,
        latents: Tensor,
        told: Sequence[Mapping[str, Any]],
        taps: Sequence[Tap],
        on_map: OnMap | None,
        *,
        inverting: bool,
    ) -> Iterator[Tensor]:
        """Yield the latents after each step. Inverting ends at the last step that is tapped, if any is."""
        chain = chain_of(self.diffusion, self.model, inverting)
        tags = [tag for tag, _ in chain.visits]
        deepest = max((tags.index(int(tap.step or 0)) for tap in taps), default=len(tags) - 1)
        stops = inverting and bool(taps)
        for number, (tag, time) in enumerate(chain.visits):
            here = [tap for tap in taps if tap.step == tag]
            ends = stops and number == deepest
            said = self._passed(latents, time, told, here, on_map, last=ends)
            if said is None:
                return
            latents = chain.advance(number, said, latents)
            yield latents

    def _encoded(self, batch: Prepared) -> Tensor:
        model = self.model
        self._check_size(batch.grid.network_size)
        drawn = model.vae is not None and self.diffusion.latent == "sample"
        noise = self._noise(model.latent_shape(*batch.grid.network_size), _DRAWN) if drawn else None
        return model.encode(batch.pixels, noise).float()

    def _noise(self, shape: Sequence[int], *purpose: int) -> Tensor:
        """Return noise (1, …), the same for every picture: one alone gets the same as one in a batch."""
        return torch.randn((1, *shape), generator=numbered(self.diffusion.seed, *purpose)).to(self.device)

    def _begun(self, size: Size | None, number: int, seed: int) -> Tensor:
        if number < 1 or seed < 0:
            raise ConfigError(f"expected number of at least 1 and seed of at least 0, got {number} and {seed}")
        height, width = self.formed_size(None, size)
        shape = self.model.latent_shape(height, width)
        return torch.cat([torch.randn((1, *shape), generator=numbered(seed, _BEGUN, i)) for i in range(number)])

    def _check_size(self, size: Size) -> None:
        multiple = self.model.multiple
        if any(side % multiple or side < multiple for side in size):
            raise ShapeError(
                f"expected sides that are multiples of {multiple} pixels for {self.card.name}, got {size} "
                "(height, width)"
            )

    def _check_latents(self, latents: Tensor) -> Size:
        """Return the (height, width) of the pictures that latents are of."""
        model = self.model
        multiple = model.multiple // model.factor
        fits = latents.ndim == 4 and latents.shape[1] == model.channels
        if not fits or any(side % multiple or side < multiple for side in latents.shape[-2:]):
            raise ShapeError(
                f"expected latents (batch, {model.channels}, rows, cols), rows and cols multiples of {multiple}, got "
                f"{tuple(latents.shape)}"
            )
        return int(latents.shape[-2]) * model.factor, int(latents.shape[-1]) * model.factor

    def formed_size(self, latents: Tensor | None, size: Size | None) -> Size:
        """Return the (height, width) in pixels of the pictures that :meth:`generate` would make.

        Raises:
            ShapeError: If the size or the latents do not fit the U-Net.
        """
        if latents is not None:
            return self._check_latents(latents)
        own = self.preprocess.size
        found = size or (own if isinstance(own, tuple) else (own, own))
        self._check_size(found)
        return found

    def stepped(self, tap: Tap) -> Tap:
        """Return a tap for :meth:`generate` and :meth:`form`, which take steps in every mode.

        Raises:
            TapError, UnknownFacetError: If it does not exist, or has no step.
        """
        return self.reading(replace(self.diffusion, mode="inversion")).resolve(tap)

    def reading(self, diffusion: DiffusionConfig) -> "DiffusionExtractor":
        """Return an extractor of the same network (shared, not copied) that reads in another way."""
        other = self.resized()
        assert isinstance(other, DiffusionExtractor)
        other._read_by(diffusion)
        return other

    # Where a facet is read ---------------------------------------------------------------------------------------

    def _path(self, tap: Tap) -> str:
        """Return the module that a single layer's facet is the output of."""
        name = str(tap.layer)
        base, _, block = name.partition(".block")
        if base not in self.layers or (block and tap.facet not in _PROJECTIONS):
            raise TapError(f"expected a layer of {self.card.name}, got {name!r}. {nearest_names(name, self.layers)}")
        path = self.layers[base]
        if tap.facet == "out":
            return path
        kind = base.rpartition(".")[2].rstrip("0123456789")
        if tap.facet == "residual" and kind == "res":
            return f"{path}.conv2"
        if tap.facet in _PROJECTIONS and kind == "attn":
            module = find_module(self.model, path)
            if hasattr(module, "transformer_blocks"):
                path = f"{path}.transformer_blocks.{block or 0}.attn1"
            elif block:
                raise TapError(f"expected a layer without further blocks, got {name!r}; try '{base}'")
            path = f"{path}.{_PROJECTIONS[tap.facet]}"
            find_module(self.model, path)
            return path
        needs = "a residual block, such as 'up1.res0'" if tap.facet == "residual" else "attention, such as 'up1.attn0'"
        raise TapError(f"expected {needs}, for the facet '{tap.facet}', got '{tap}'")

    def _has(self, facet: str, name: str) -> bool:
        kind = name.rpartition(".")[2].rstrip("0123456789")
        return facet == "out" or kind == ("res" if facet == "residual" else "attn")


def find_layers(unet: nn.Module) -> dict[str, str]:
    """Return the module path, inside a :class:`Denoiser`, of each layer of its U-Net, in the order they run."""
    found: dict[str, str] = {}

    def add(name: str, path: str, block: Any) -> None:
        residuals, attentions = (list(getattr(block, kind, None) or ()) for kind in ("resnets", "attentions"))
        for number in range(max(len(residuals), len(attentions))):
            if number < len(residuals):
                found[f"{name}.res{number}"] = f"{path}.resnets.{number}"
            if number < len(attentions) and attentions[number] is not None:
                found[f"{name}.attn{number}"] = f"{path}.attentions.{number}"
        found[name] = path

    parts: Any = unet
    for number, block in enumerate(parts.down_blocks):
        add(f"down{number}", f"unet.down_blocks.{number}", block)
    if parts.mid_block is not None:
        add("mid", "unet.mid_block", parts.mid_block)
    for number, block in enumerate(parts.up_blocks):
        add(f"up{number}", f"unet.up_blocks.{number}", block)
    return found


def hyperfeature_layers(layers: Mapping[str, str]) -> tuple[str, ...]:
    """Return the residual blocks on the way up: the layers that Diffusion Hyperfeatures aggregates."""
    return tuple(name for name in layers if name.startswith("up") and ".res" in name)


# What the hooks see ---------------------------------------------------------------------------------------------------


def _seen(seen: Any) -> Tensor:
    return seen if isinstance(seen, Tensor) else seen.sample


def _own(seen: Tensor) -> Tensor:
    return seen.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _singles(taps: Sequence[Tap]) -> dict[Tap, list[Tap]]:
    """Return the taps of single layers that each tap is made of."""
    return {tap: [replace(tap, layer=name) for name in str(tap.layer).split("+")] for tap in taps}


def gridded(seen: Tensor, network: Size) -> tuple[Float[Tensor, "batch dim rows cols"], PatchGrid]:
    """Return a map, also of what came as tokens, and the grid that its cells make over the picture."""
    if seen.ndim == 3:
        cells = (network[0] * network[1] / seen.shape[1]) ** 0.5
        seen = seen.transpose(1, 2).unflatten(2, (round(network[0] / cells), round(network[1] / cells)))
    rows, cols = int(seen.shape[-2]), int(seen.shape[-1])
    cell = network[0] // rows
    return seen, PatchGrid(rows, cols, cell, cell)
