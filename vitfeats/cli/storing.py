"""Commands of stores on disk: bulk, check-store."""

import dataclasses
import sys

from vitfeats.cli.shared import extractor_of, say
from vitfeats.commands import Bulk, CheckStore


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
