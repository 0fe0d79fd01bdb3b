"""Descriptors of many images on disk: extraction that goes on after any interruption, and the store that it writes."""

from vitfeats.apps.bulk.local import Summary, extract, source_items
from vitfeats.apps.bulk.shards import Header, check_shard, read_header, read_image, write_shard
from vitfeats.apps.bulk.store import Damage, Store, create_store, locked

__all__ = [
    "Damage",
    "Header",
    "Store",
    "Summary",
    "check_shard",
    "create_store",
    "extract",
    "locked",
    "read_header",
    "read_image",
    "source_items",
    "write_shard",
]
