"""Descriptors of many images on disk: extraction that goes on after any interruption, and the store that it writes."""

from vitfeats.apps.bulk.extraction import Summary, extract
from vitfeats.apps.bulk.shards import Header, Rows, check_shard, read_header, read_image, write_shard
from vitfeats.apps.bulk.sources import Source, open_source
from vitfeats.apps.bulk.store import Damage, Store, create_store, locked

__all__ = [
    "Damage",
    "Header",
    "Rows",
    "Source",
    "Store",
    "Summary",
    "check_shard",
    "create_store",
    "extract",
    "locked",
    "open_source",
    "read_header",
    "read_image",
    "write_shard",
]
