"""Descriptors of many images on disk: extraction that goes on after any interruption, and the store that it writes."""

from vitfeats.apps.bulk.exports import export_npy, export_parquet, export_zarr
from vitfeats.apps.bulk.extraction import Summary, extract
from vitfeats.apps.bulk.index import Index, build_index, open_index
from vitfeats.apps.bulk.making import store_extractor
from vitfeats.apps.bulk.opening import open_source
from vitfeats.apps.bulk.reduction import Reduction
from vitfeats.apps.bulk.search import Hits, search_images, search_patches
from vitfeats.apps.bulk.shards import Header, Rows, check_shard, read_header, read_image, write_shard
from vitfeats.apps.bulk.sources import Source
from vitfeats.apps.bulk.store import Damage, Store, create_store, locked

__all__ = [
    "Damage",
    "Header",
    "Hits",
    "Index",
    "Reduction",
    "Rows",
    "Source",
    "Store",
    "Summary",
    "build_index",
    "check_shard",
    "create_store",
    "export_npy",
    "export_parquet",
    "export_zarr",
    "extract",
    "locked",
    "open_index",
    "open_source",
    "read_header",
    "read_image",
    "search_images",
    "search_patches",
    "store_extractor",
    "write_shard",
]
