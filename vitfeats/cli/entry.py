"""The command line: runs what the modules beside it describe, and says how it went.

Exit code 0: done; 1: something could not be done, said on standard error; 2: the command was not understood.
Results go to standard output, progress to standard error. Nothing heavy is imported before a command runs.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import OmitSubcommandPrefixes, subcommand

from vitfeats.cli.making import Invert, Splice, run_invert, run_splice
from vitfeats.cli.measuring import Eval, evaluate
from vitfeats.cli.reading import (
    Extract,
    Hyperfeatures,
    Match,
    Models,
    Pca,
    Similarity,
    extract,
    hyperfeatures,
    match,
    models,
    pca,
    similarity,
)
from vitfeats.cli.segmenting import Cosegment, run_cosegment
from vitfeats.cli.showing import Demo, demo
from vitfeats.cli.storing import Bulk, OnStore, bulk, on_store
from vitfeats.cli.styling import Stylize, TrainStylizer, run_stylize, train
from vitfeats.cli.training import Pretrain, TrainDiffusion, TrainHyperfeatures, aggregation, diffusion, pretrained
from vitfeats.errors import VitFeatsError

Command = (
    Annotated[Extract, subcommand("extract")]
    | Annotated[Bulk, subcommand("bulk")]
    | Annotated[OnStore, subcommand("store")]
    | Annotated[Pca, subcommand("pca")]
    | Annotated[Similarity, subcommand("similarity")]
    | Annotated[Match, subcommand("match")]
    | Annotated[Splice, subcommand("splice")]
    | Annotated[Invert, subcommand("invert")]
    | Annotated[Stylize, subcommand("stylize")]
    | Annotated[Cosegment, subcommand("cosegment")]
    | Annotated[Hyperfeatures, subcommand("hyperfeatures")]
    | Annotated[TrainDiffusion, subcommand("train-diffusion")]
    | Annotated[TrainHyperfeatures, subcommand("train-hyperfeatures")]
    | Annotated[Pretrain, subcommand("pretrain")]
    | Annotated[TrainStylizer, subcommand("train-stylizer")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Demo, subcommand("demo")]
    | Annotated[Models, subcommand("models")]
)

RUN: dict[type, Any] = {
    Extract: extract,
    Bulk: bulk,
    OnStore: on_store,
    Pca: pca,
    Similarity: similarity,
    Match: match,
    Splice: run_splice,
    Invert: run_invert,
    Stylize: run_stylize,
    Cosegment: run_cosegment,
    Hyperfeatures: hyperfeatures,
    TrainDiffusion: diffusion,
    TrainHyperfeatures: aggregation,
    Pretrain: pretrained,
    TrainStylizer: train,
    Eval: evaluate,
    Demo: demo,
    Models: models,
}
"""What runs each command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code."""
    command: Any = tyro.cli(
        OmitSubcommandPrefixes[Command],  # type: ignore[arg-type] - tyro takes a union of dataclasses
        prog="vitfeats",
        description="Features out of vision models: keys, queries, values, tokens, CLS, attention, hyperfeatures.",
        args=arguments,
    )
    try:
        return RUN[type(command)](command)
    except VitFeatsError as error:
        print(f"vitfeats: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:  # a long run says how to go on
        told = next((words for words in interrupt.args if isinstance(words, str)), "interrupted")
        print(f"vitfeats: {told}", file=sys.stderr)
        return 130
