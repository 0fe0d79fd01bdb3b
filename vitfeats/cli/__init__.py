"""The command line."""

from vitfeats.cli.entry import main

__all__ = ["main"]
