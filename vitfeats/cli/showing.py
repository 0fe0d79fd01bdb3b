"""Commands that show things in a browser: demo."""

from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes

from vitfeats.configs import DemoConfig


@dataclass(frozen=True)
class Demo:
    """Serve a page to explore, match, splice and paint pictures in a browser; Ctrl-C ends it.

    Attributes:
        options: Where it listens, which models it offers, and how much it takes.
    """

    options: OmitArgPrefixes[DemoConfig] = field(default_factory=DemoConfig)


def demo(command: Demo) -> int:
    """Serve the demo until Ctrl-C."""
    from vitfeats.apps.demo import serve

    serve(command.options)
    return 0
