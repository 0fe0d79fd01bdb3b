"""Settings of the demo in a browser."""

from dataclasses import dataclass

from vitfeats.configs.checks import require
from vitfeats.errors import ConfigError


@dataclass(frozen=True)
class DemoConfig:
    """What the demo offers, where it listens, and how much it takes from those who use it.

    Attributes:
        host: Address to listen on. 127.0.0.1 is this machine alone; 0.0.0.0 everybody who can reach it.
        port: To listen on; the first free one from 7860 on where it is left out.
        models: Names of `vitfeats models`, or shell patterns such as "dinov2*", to choose from. Those that come with
            the package are always there; the weights of others are downloaded when they are first chosen. Default:
            the usual ones.
        device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.
        threads: Of torch for each of the two jobs that run at a time, a long one and a short one. Default: half of the
            cores.
        upload_mb: Largest file that may be uploaded, in megabytes.
        megapixels: Most pixels of a picture, in millions, whatever its file's size; 178 at most.
        folder_mb: Most megabytes of pictures, given and made, that are kept in the temporary folder; the oldest are
            deleted first.
        hours: How long they are kept at most.
        open: Open the page in a browser.

    Raises:
        ConfigError: If a number is out of its range.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    models: tuple[str, ...] = ()
    device: str = "auto"
    threads: int | None = None
    upload_mb: float = 20.0
    megapixels: float = 64.0
    folder_mb: float = 1000.0
    hours: float = 6.0
    open: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that no page could use."""
        require(self, 1, "folder_mb", *(["threads"] if self.threads is not None else []))
        require(self, 1, *(["port"] if self.port is not None else []), most=65535)
        require(self, 0, "upload_mb", "hours")
        require(self, 0, "megapixels", most=178)  # above it Pillow refuses a picture
        for name in ("upload_mb", "megapixels", "hours"):
            if not getattr(self, name):
                raise ConfigError(f"expected {name} above 0, got {getattr(self, name)}")
