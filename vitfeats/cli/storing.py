"""Commands of stores on disk: bulk, check-store."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from vitfeats.cli.shared import extractor_of, say
from vitfeats.configs import ExtractorConfig


@dataclass(frozen=True)
class Bulk:
    """Write the descriptors of many images into a store on disk; the same call goes on where one was stopped.

    Attributes:
        source: A folder of images (and the folders in it), a tar file, or a text file of paths, one a line.
        out: Folder of the store (made if missing).
        tap: What to read, facet@layer; several share one forward pass. Default: the model's usual tap.
        store_type: Of the numbers on disk; int8 has a scale for each token.
        per_shard: Images in a file.
        batch_size: Images in one forward pass.
        workers: Threads that decode. Default: one for each core.
        strict: Stop at an image that cannot be read.
        json: Print one JSON object instead of text.
        options: Model, size, stride, device.
    """

    source: Positional[Path]
    out: Path = Path("store")
    tap: tuple[str, ...] = ()
    store_type: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    per_shard: int = 64
    batch_size: int = 8
    workers: int | None = None
    strict: bool = False
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


def bulk(command: Bulk) -> int:
    """Write a store; images that cannot be read are named and left out."""
    from vitfeats.apps.bulk import extract

    found = extract(
        command.source,
        command.out,
        model=extractor_of(command.options),
        taps=command.tap or None,
        dtype=command.store_type,
        per_shard=command.per_shard,
        batch_size=command.batch_size,
        workers=command.workers,
        strict=command.strict,
        progress=not command.json,
    )
    facts = dataclasses.asdict(found) | {"path": str(found.path), "rate": found.rate}
    size = f"{found.bytes / 1e6:.1f} MB"
    say(command.json, facts, f"{found.path}: {found.images} images, {size}; {found.made} made now, {found.rate:.1f}/s")
    for name, reason in found.broken.items():
        print(f"vitfeats: '{name}': {reason}", file=sys.stderr)
    return 1 if found.broken else 0


@dataclass(frozen=True)
class CheckStore:
    """Read every number of a store, and name the shards that are missing or damaged.

    Attributes:
        store: Its folder.
        repair: Remove damaged shards, so that the call that made the store makes them again.
        json: Print one JSON object instead of text.
    """

    store: Positional[Path]
    repair: bool = False
    json: bool = False


def check(command: CheckStore) -> int:
    """Check a store."""
    from vitfeats.apps.bulk import Store

    store = Store(command.store)
    found = store.remove_damaged() if command.repair else list(store.check())
    facts = {"store": str(command.store), "shards": store.shards, "damaged": [dataclasses.asdict(one) for one in found]}
    lines = [f"shard {one.shard} ({one.images} images): {one.why}" for one in found]
    lines.append(f"{command.store}: {store.shards - len(found)} of {store.shards} shards whole")
    say(command.json, facts, "\n".join(lines))
    return 1 if found else 0
