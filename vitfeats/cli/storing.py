"""Commands of stores on disk: bulk, and store check, export, index and search."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, subcommand

from vitfeats.cli.shared import check_picture, counted, extractor_of, file_at, save_picture, say
from vitfeats.configs import ExtractorConfig
from vitfeats.errors import ConfigError

if TYPE_CHECKING:
    from vitfeats.apps.bulk import Hits


@dataclass(frozen=True)
class Bulk:
    """Write the descriptors of many images into a store on disk; the same call goes on where one was stopped.

    Exit code 0: all images are in it; 1: some could not be read, or the run could not be done.

    Attributes:
        source: A folder of images (and the folders in it), of tar files or of Parquet tables; one of these; or a text
            file of paths, one a line. A path, or an address such as s3://bucket/photographs.
        out: Folder of the store (made if missing), or an address.
        tap: What to read, facet@layer; several share one forward pass. Default: the model's usual tap.
        store_type: Of the numbers on disk; int8 has a scale for each token.
        pca: Reduce features to so many principal components, kept with the store.
        pooled: Write one vector an image and tap as Parquet too.
        per_shard: Images in a file.
        batch_size: Images in one forward pass.
        engine: This process, or Ray: a cluster, or several processes here.
        actors: Of Ray. Default: one for each graphics card, or one.
        workers: Threads that decode. Default: one for each core; with Ray two for each actor.
        image_column: Of Parquet tables: where the images are. Default: the first of a usual name.
        id_column: Of Parquet tables: what each image is called. Default: id, key or __key__, else table and row.
        strict: Stop at an image that cannot be read.
        retry_broken: Make shards again in which images are noted as broken.
        json: Print one JSON object instead of text.
        options: Model, size, stride, device (all is every graphics card).
    """

    source: Positional[str]
    out: str = "store"
    tap: tuple[str, ...] = ()
    store_type: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    pca: int | None = None
    pooled: bool = False
    per_shard: int = 64
    batch_size: int = 8
    engine: Literal["local", "ray"] = "local"
    actors: int | None = None
    workers: int | None = None
    image_column: str | None = None
    id_column: str | None = None
    strict: bool = False
    retry_broken: bool = False
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


def bulk(command: Bulk) -> int:
    """Write a store; images that cannot be read are named and left out."""
    from vitfeats.apps.bulk import extract, open_source

    source = open_source(command.source, image_column=command.image_column, id_column=command.id_column)
    every = command.options.device == "all"
    options = dataclasses.replace(command.options, device="auto") if every else command.options
    found = extract(
        source,
        command.out,
        model=extractor_of(options),
        taps=command.tap or None,
        dtype=command.store_type,
        pca=command.pca,
        pooled=command.pooled,
        per_shard=command.per_shard,
        batch_size=command.batch_size,
        engine=command.engine,
        device="all" if every else "auto",
        workers=command.workers,
        actors=command.actors,
        strict=command.strict,
        retry_broken=command.retry_broken,
        progress=not command.json,
    )
    facts = dataclasses.asdict(found) | {"path": str(found.path), "rate": found.rate}
    size = f"{found.bytes / 1e6:.1f} MB"
    told = f"{found.path}: {counted(found.images, 'image')}, {size}; {found.made} made now, {found.rate:.1f}/s"
    say(command.json, facts, told)
    for name, reason in found.broken.items():
        print(f"vitfeats: '{name}': {reason}", file=sys.stderr)
    return 1 if found.broken else 0


@dataclass(frozen=True)
class StoreCheck:
    """Read every number of a store, and name the shards that are missing or damaged; exit code 1 if there are such.

    Attributes:
        store: Its folder or address.
        repair: Remove damaged shards, so that the call that made the store makes them again.
        json: Print one JSON object instead of text.
    """

    store: Positional[str]
    repair: bool = False
    json: bool = False


@dataclass(frozen=True)
class StoreExport:
    """Write a store as files of other programs.

    Attributes:
        store: Its folder or address.
        out: What to write: a new path, for Parquet a file, else a folder.
        to: NumPy files, a Zarr group (version 3), or a Parquet table.
        tap: Of the store. Default: all.
        store_type: Of the numbers, for npy and zarr.
        pool: For parquet: one vector an image, or all tokens.
        json: Print one JSON object instead of text.
    """

    store: Positional[str]
    out: Path = Path("export")
    to: Literal["npy", "zarr", "parquet"] = "npy"
    tap: tuple[str, ...] = ()
    store_type: Literal["float16", "float32"] = "float16"
    pool: Literal["mean", "none"] = "mean"
    json: bool = False


@dataclass(frozen=True)
class StoreIndex:
    """Build a faiss index over a store, for searches that do not read all of it.

    Attributes:
        store: Its folder or address.
        of: Images, or patches: every token.
        tap: Of the store. Default: its first.
        kind: flat (exact), ivf, or what faiss.index_factory takes. Default: flat up to 100,000 rows, ivf beyond.
        out: Folder to write. Default: in the store.
        json: Print one JSON object instead of text.
    """

    store: Positional[str]
    of: Literal["images", "patches"] = "images"
    tap: str | None = None
    kind: str = "auto"
    out: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class StoreSearch:
    """Find the images of a store that are most like an image, or most like a point of it.

    Attributes:
        store: Its folder or address.
        image: An image file.
        point: x and y in its pixels: look for patches like the one there. Default: look for images like the whole.
        k: How many.
        tap: Of the store. Default: its first.
        index: From `vitfeats store index`. Default: read the whole store, which is exact.
        model: To load, where it is not to be found by the name in the store.
        device: Where the model goes.
        source: What the store was made of, to show the images that were found.
        out: Picture to write, with --source.
        json: Print one JSON object instead of text.
    """

    store: Positional[str]
    image: Positional[Path]
    point: tuple[float, float] | None = None
    k: int = 10
    tap: str | None = None
    index: Path | None = None
    model: str | None = None
    device: str = "auto"
    source: str | None = None
    out: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class OnStore:
    """Look after a store that `vitfeats bulk` made, and use it.

    Attributes:
        action: What to do.
    """

    action: OmitArgPrefixes[
        Annotated[StoreCheck, subcommand("check")]
        | Annotated[StoreExport, subcommand("export")]
        | Annotated[StoreIndex, subcommand("index")]
        | Annotated[StoreSearch, subcommand("search")]
    ]


def on_store(command: OnStore) -> int:
    """Do something with a store."""
    actions: dict[type, Any] = {StoreCheck: _check, StoreExport: _export, StoreIndex: _index, StoreSearch: _search}
    return actions[type(command.action)](command.action)


def _check(command: StoreCheck) -> int:
    from vitfeats.apps.bulk import Store

    store = Store(command.store)
    found = store.remove_damaged() if command.repair else list(store.check())
    facts = {"store": command.store, "shards": store.shards, "damaged": [dataclasses.asdict(one) for one in found]}
    lines = [f"shard {one.shard} ({counted(one.images, 'image')}): {one.why}" for one in found]
    lines.append(f"{command.store}: {store.shards - len(found)} of {counted(store.shards, 'shard')} whole")
    say(command.json, facts, "\n".join(lines))
    return 1 if found else 0


def _export(command: StoreExport) -> int:
    from vitfeats.apps.bulk import Store, export_npy, export_parquet, export_zarr

    store, taps = Store(command.store), command.tap or None
    if command.to == "parquet":
        export_parquet(store, command.out, taps=taps, pool=None if command.pool == "none" else "mean")
    else:
        export = export_npy if command.to == "npy" else export_zarr
        export(store, command.out, taps=taps, dtype=command.store_type)
    say(command.json, {"store": command.store, "out": str(command.out)}, f"wrote {command.out}")
    return 0


def _index(command: StoreIndex) -> int:
    from vitfeats.apps.bulk import Store, build_index

    store = Store(command.store)
    path = build_index(store, command.tap, of=command.of, kind=command.kind, path=command.out)
    say(command.json, {"store": command.store, "out": str(path)}, f"wrote {path}")
    return 0


def _search(command: StoreSearch) -> int:
    from vitfeats.apps.bulk import Store, search_images, search_patches, store_extractor

    if (command.source is None) != (command.out is None):
        raise ConfigError("expected --source and --out together: the images to show, and the picture to write")
    if command.out is not None:
        check_picture(command.out, [command.image])
    store = Store(command.store)
    tap = store.taps[0] if command.tap is None else command.tap
    d = store_extractor(store, model=command.model, device=command.device)(file_at(command.image), tap)
    if command.point is None:
        hits = search_images(store, d, tap=tap, k=command.k, index=command.index)
    else:
        hits = search_patches(store, d, [command.point], tap=tap, k=command.k, index=command.index)
    points = [None] * len(hits.ids[0]) if hits.points is None else hits.points[0].tolist()
    found = [
        {"id": name, "score": score} | ({} if point is None else {"point": point})
        for name, score, point in zip(hits.ids[0], hits.scores[0].tolist(), points, strict=True)
    ]
    told = [f"{one['score']:.4f}  {one['id']}{_where(one.get('point'))}" for one in found]
    if command.out is not None:
        save_picture(_shown(command, hits, points), command.out)
        told.append(f"wrote {command.out}")
    say(command.json, {"image": str(command.image), "tap": tap, "hits": found}, "\n".join(told))
    return 0


def _where(point: Any) -> str:
    return "" if point is None else f"  at {point[0]:.0f}, {point[1]:.0f}"


def _shown(command: StoreSearch, hits: "Hits", points: list[Any]) -> Any:
    """Return the image and what was found for it."""
    from vitfeats import plot
    from vitfeats.apps.bulk import open_source

    assert command.source is not None
    source = open_source(command.source)
    numbers = {name: number for number, name in enumerate(source.ids)}
    unknown = [name for name in hits.ids[0] if name not in numbers]
    if unknown:
        raise ConfigError(f"expected --source to be what the store was made of, but it has no '{unknown[0]}'")
    images = [command.image, *(source.image(numbers[name]) for name in hits.ids[0])]
    titles = ["asked", *(f"{score:.3f}" for score in hits.scores[0].tolist())]
    return plot.side_by_side(images, titles, columns=min(6, len(images)), marked=[command.point, *points])
