"""A whole training run: its folder, checkpoints, and what it leaves."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitfeats import plot
from vitfeats.api import load_extractor
from vitfeats.apps.evaluation.datasets import Pair
from vitfeats.apps.train_hyperfeatures.trainer import HyperfeatureTrainer
from vitfeats.configs import DiffusionConfig, TrainHyperfeaturesConfig
from vitfeats.descriptor import write_whole
from vitfeats.errors import StoreError
from vitfeats.extractors.base import Extractor
from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor
from vitfeats.nets.aggregation import AggregationNetwork
from vitfeats.runs import RunFolder, begin, interruption, take_steps

AGGREGATION, CACHE = "aggregation.pt", "maps"
"""What a run calls its result, and the folder of its cache."""


@dataclass(frozen=True, eq=False)
class TrainHyperfeaturesResult:
    """What a training run made.

    Attributes:
        aggregation: The network, frozen, in evaluation mode.
        extractor: Reads ``out@hyperfeatures`` with it.
        history: One record a step: ``step``, ``loss``, and ``pck`` where that was measured.
        config: The settings.
        stopped: Why the run ended: "done", "interrupted" or "not finite".
    """

    aggregation: AggregationNetwork
    extractor: HyperfeatureExtractor
    history: list[dict[str, Any]]
    config: TrainHyperfeaturesConfig
    stopped: str = "done"

    def save(self, folder: Path | str) -> Path:
        """Write aggregation.pt in the published layout, mixing.png, history.jsonl and config.yaml.

        Returns:
            The path of aggregation.pt, which :meth:`AggregationNetwork.from_checkpoint` takes, read by ``torch.load``.

        Raises:
            StoreError: If the folder cannot be made or aggregation.pt not written. Other files are a warning.
        """
        run = RunFolder(folder)
        buffer = io.BytesIO()
        torch.save(self.aggregation.checkpoint(), buffer)
        write_whole(run.path / AGGREGATION, buffer.getvalue())
        network = self.aggregation
        run.write_image("mixing.png", plot.mixing(network.mixing, network.layers, network.steps))
        run.write_history(self.history)
        run.write_config(self.config)
        return run.path / AGGREGATION


def train_hyperfeatures(
    pairs: Sequence[Pair],
    *,
    model: Any,
    config: TrainHyperfeaturesConfig | None = None,
    validation: Sequence[Pair] = (),
    seed: int = 0,
    out: Path | str | None = None,
    cache: Path | str | None = None,
    resume: bool = False,
    progress: bool = False,
    device: str | torch.device = "auto",
) -> TrainHyperfeaturesResult:
    """Train an aggregation network on pairs.

    Args:
        pairs: From :func:`~vitfeats.apps.evaluation.read_pairs`, :class:`~vitfeats.apps.evaluation.WarpedImages`, or
            your own. Each is asked for when it is used.
        model: A :class:`~vitfeats.extractors.diffusion.DiffusionExtractor`, which keeps its size, precision and
            device; or what :func:`vitfeats.load_extractor` takes, a name for example, to be read by inversion, as
            published: 50 steps of which 11 are aggregated.
        config: Settings; None is the defaults, the published ones.
        validation: Pairs that are judged by and not learnt from.
        seed: Of the first weights and of the order of the pairs; the same seed gives the same bits on one CPU with as
            many threads.
        out: Folder for the history, checkpoints and the result, ``aggregation.pt``; None writes nothing.
        cache: Folder for the diffusion model's maps, which several runs may share; None is ``maps`` in ``out``.
        resume: Go on from the checkpoint in ``out``, if there is one.
        progress: Show a progress bar on standard error.
        device: Where a model that is loaded by name goes.

    Raises:
        ImageError, ShapeError: If an image cannot be read, or a point lies outside of it; the message names the pair.
        ConfigError: If settings are out of range, do not fit the model, or differ from those of the checkpoint.
        StoreError: If ``out`` cannot be made or its checkpoint cannot be read.
        KeyboardInterrupt: At Ctrl-C, after the step has ended and a checkpoint is written.
    """
    extractor: Any = model
    if not isinstance(model, Extractor):
        extractor = load_extractor(model, device=device, diffusion=DiffusionConfig.preset("hyperfeatures"))
    folder = None if out is None else RunFolder(out)
    kept = folder.path / CACHE if cache is None and folder is not None else cache
    trainer = HyperfeatureTrainer(pairs, extractor, config, validation=validation, seed=seed, cache=kept)
    history = begin(trainer, folder, resume)

    def finish(stopped: str) -> TrainHyperfeaturesResult:
        network = trainer.trained()
        reads = HyperfeatureExtractor.of(extractor, network, cell=trainer.config.cell)
        made = TrainHyperfeaturesResult(network, reads, history, trainer.config, stopped)
        if folder is not None:
            try:
                made.save(folder.path)
            except StoreError as error:  # what was trained is in the checkpoint, and in what is returned
                warnings.warn(f"'{AGGREGATION}' could not be written: {error}", RuntimeWarning, stacklevel=4)
        return made

    made = take_steps(
        trainer,
        trainer.config.steps,
        history,
        folder,
        checkpoint_every=trainer.config.checkpoint_every,
        after=lambda losses: None,
        finish=finish,
        shown=("loss", "pck"),
        progress=progress,
    )
    if made.stopped == "interrupted":
        raise KeyboardInterrupt(interruption(trainer.done, folder))
    return made
