"""The command line: runs what the modules beside it describe, and says how it went.

Exit code 0: done; 1: something could not be done, said on standard error; 2: the command was not understood.
Results go to standard output, progress to standard error. Nothing heavy is imported before a command runs.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version
from typing import Annotated, Any, get_args

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
from vitfeats.errors import VitFeatsError, WeightsUnavailableError

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

NAMES = [get_args(command)[1].name for command in get_args(Command)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        print(f"vitfeats {version('vitfeats')}")
        return 0
    unknown = [name for name in given[:1] if name not in NAMES and not name.startswith("-")]
    if unknown and (near := get_close_matches(unknown[0], NAMES, n=1)):
        print(f"vitfeats: expected a command, got '{unknown[0]}'. Did you mean '{near[0]}'?", file=sys.stderr)
        raise SystemExit(2)  # as tyro ends where it understands nothing
    command: Any = tyro.cli(
        OmitSubcommandPrefixes[Command],  # type: ignore[arg-type] - tyro takes a union of dataclasses
        prog="vitfeats",
        description="Features out of vision models: keys, queries, values, tokens, CLS, attention, hyperfeatures. "
        "vitfeats --version prints the version.",
        args=arguments,
    )
    try:
        return RUN[type(command)](command)
    except VitFeatsError as error:
        print(f"vitfeats: {type(error).__name__}: {_in_options(str(error), command)}", file=sys.stderr)
        options = getattr(command, "options", None)
        if isinstance(error, WeightsUnavailableError) and getattr(options, "checkpoint", None) is None:
            print("vitfeats: see Install, 'Without a network connection', in the documentation", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:  # a long run says how to go on
        told = next((words for words in interrupt.args if isinstance(words, str)), "interrupted")
        print(f"vitfeats: {told}", file=sys.stderr)
        return 130


def _in_options(message: str, command: Any) -> str:
    """Return a message of the library in words of the command line: "checkpoint='FILE'" is "--checkpoint FILE"."""
    names = "|".join(_settings_of(command))
    # Only whole settings in a sentence: what stands inside of a call stays Python.
    return re.sub(rf"(?<![\w(.])({names})=(?:'([^']*)'|([-\w.]*))(?=[\s,;]|$)", _option, message)


def _option(found: re.Match[str]) -> str:
    name, value = found[1].replace("_", "-"), found[2] or found[3] or ""
    if value in ("True", "False"):
        return f"--{name}" if value == "True" else f"--no-{name}"
    return f"--{name} {value}".rstrip()


def _settings_of(command: Any) -> list[str]:
    """Return the names of a command's settings, and of those in them."""
    inner = [getattr(command, field.name) for field in dataclasses.fields(command)]
    nested = [name for value in inner if dataclasses.is_dataclass(value) for name in _settings_of(value)]
    return [field.name for field in dataclasses.fields(command)] + nested
