"""What the command line understands: one dataclass a command. Nothing heavy is imported here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, subcommand

from vitfeats.configs import CosegmentPreset, ExtractorConfig, Preset, ProtocolName, StyleMethod


@dataclass(frozen=True)
class Extract:
    """Write the descriptors of images to safetensors files, one for each image and tap.

    Attributes:
        images: Image files of any sizes.
        out: Folder for the files IMAGE.FACET@LAYER.safetensors (made if missing).
        tap: What to read, facet@layer; several share one forward pass. Default: the model's usual tap.
        batch_size: Images in one forward pass.
        json: Print one JSON object instead of text.
        options: Model, size, stride, device.
    """

    images: Positional[tuple[Path, ...]]
    out: Path = Path("features")
    tap: tuple[str, ...] = ()
    batch_size: int = 8
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


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


@dataclass(frozen=True)
class Pca:
    """Paint the first three principal components of image tokens as colours, one PCA over all images.

    Attributes:
        images: Image files of any sizes.
        sample: Use photographs that come with the installed packages: portraits, stereo, textures, cat, coffee,
            astronaut, grace_hopper, china, flower.
        out: Picture to write.
        tap: What to read, facet@layer. Default: the model's usual tap.
        foreground: Leave the background out, found from the images' borders, and paint it black.
        json: Print one JSON object instead of text.
        options: Model, size (default 448), stride (default half the patch), device.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    out: Path = Path("pca.png")
    tap: str | None = None
    foreground: Literal["none", "border"] = "none"
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Similarity:
    """Show where a point of one image looks alike in another.

    Attributes:
        images: Two image files; one file is compared with itself.
        sample: Use a sample instead, as for pca.
        point: x and y in pixels of the first image, from its top-left corner. Default: its middle.
        out: Picture to write.
        tap: What to read, facet@layer. Default: the model's usual tap.
        json: Print one JSON object instead of text.
        options: Model, size (default 448), stride (default half the patch), device.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    point: tuple[float, float] | None = None
    out: Path = Path("similarity.png")
    tap: str | None = None
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Match:
    """Match the tokens of two images that are each other's nearest neighbour.

    Attributes:
        images: Two image files.
        sample: Use a sample instead, as for pca.
        most: How many of the matches to draw, drawn at random.
        out: Picture to write.
        tap: What to read, facet@layer. Default: the model's usual tap.
        json: Print one JSON object, with every match in source pixels, instead of text.
        options: Model, size (default 448), stride (default half the patch), device.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    most: int = 40
    out: Path = Path("matches.png")
    tap: str | None = None
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Splice:
    """Paint the structure of one image with the appearance of another: train a small generator for this pair.

    Attributes:
        images: Two image files: structure, then appearance.
        sample: Use a sample instead, as for pca; portraits is the pair to begin with.
        out: Folder for the result, losses, history, snapshots and checkpoints (made if missing).
        preset: reference is the published recipe (with --model dino_vitb8); fast the default; draft a first look.
        config: Settings in YAML; "preset: NAME" in it begins from another preset.
        steps: Optimiser steps, in place of the settings'.
        seed: Of first weights and crops.
        resume: Go on from the checkpoint in the folder, if there is one.
        tensorboard: Write losses and pictures for TensorBoard into the folder.
        json: Print one JSON object instead of text.
        options: Model, size and stride of what it sees (default: the settings'), device.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    out: Path = Path("splice")
    preset: Preset = "fast"
    config: Path | None = None
    steps: int | None = None
    seed: int = 0
    resume: bool = False
    tensorboard: bool = False
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Invert:
    """Find a picture that has the features of an image: what do they know of it?

    Attributes:
        images: One image file.
        sample: Use a sample instead, as for pca; its first image.
        out: Folder for pictures, losses and settings (made if missing).
        tap: Which feature, facet@layer. Default: the model's usual tap.
        layers: Invert the tap's facet at each of these layers, and draw them in a row.
        preset: reference has the published numbers; fast is the default; draft a first look.
        config: Settings in YAML; "preset: NAME" in it begins from another preset.
        steps: Optimiser steps, in place of the settings'.
        starts: Pictures to find, each from random weights of its own, in place of the settings'.
        seed: Of first weights and noise.
        json: Print one JSON object instead of text.
        options: Model, device; size and stride are the settings' unless given.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    out: Path = Path("inversion")
    tap: str | None = None
    layers: tuple[int, ...] = ()
    preset: Preset = "fast"
    config: Path | None = None
    steps: int | None = None
    starts: int | None = None
    seed: int = 0
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Stylize:
    """Paint images in the style of others, in one pass of a network that was trained for any style.

    Attributes:
        images: Image files, or folders of them, such as the frames of a film.
        sample: Paint a sample instead, as for pca.
        style: Image files; or drawn patterns by kind and seed, pattern:glass:3 (strokes, glass, mosaic, hatching,
            marbling, waves, dots, weave). With a sample, one pattern unless given.
        weights: A share for each style; default equal ones.
        method: adaattn, sanet, adain; several are drawn side by side. Default: adaattn, or what the checkpoint holds;
            with a sample, all three.
        strength: 0 to 1: how far to go from the content to the style.
        colours: Bring the colours of the result to those of the style, or of the content.
        mask: Picture of the content's size whose grey values are labels of regions.
        style_masks: For each style the same; each region is painted in the style's regions of its label.
        size: Shorter side in pixels that contents are brought to; default their own.
        style_size: The same for styles: it sets the scale of the strokes. Default their own, 512 at most.
        most: Positions of each style that attention looks at, drawn at random; 0 is all.
        checkpoint: Weights that were trained or published, in place of those that come with the package.
        encoder: Model whose maps they work on; default what they were trained with.
        out: Picture to write; of several images, a folder for pictures of their names (made if missing).
        resume: Leave out images whose picture is in the folder already.
        batch_size: Images of one size that run together.
        seed: Of the positions that are drawn.
        device: cpu, cuda, mps; auto takes a GPU if there is one.
        json: Print one JSON object instead of text.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    style: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    method: tuple[StyleMethod, ...] = ()
    strength: float = 1.0
    colours: Literal["network", "style", "content"] = "network"
    mask: Path | None = None
    style_masks: tuple[Path, ...] = ()
    size: int | None = None
    style_size: int | None = None
    most: int = 4096
    checkpoint: Path | None = None
    encoder: str | None = None
    out: Path = Path("styled.png")
    resume: bool = False
    batch_size: int = 1
    seed: int = 0
    device: str = "auto"
    json: bool = False


@dataclass(frozen=True)
class Cosegment:
    """Cut out what images share: masks, cut-outs and overlays, and with --parts its parts.

    Attributes:
        images: Image files, or folders of them, searched with the folders in them.
        sample: Use a sample instead, as for pca.
        out: Folder for masks, cut-outs, overlays, overview.png and cosegmentation.json (made if missing).
        parts: Find so many parts, the same in all images.
        preset: default; or reference, the published recipe (with --model dino_vits8).
        config: Settings in YAML; "preset: NAME" in it begins from another preset.
        refine: How masks are brought to pixels, in place of the settings'; auto is grabcut where OpenCV is installed.
        outliers: Leave out images whose CLS has a smaller cosine to the mean CLS, in place of the settings'.
        seed: Of clusters and crops.
        batch_size: Images in one forward pass.
        json: Print one JSON object instead of text.
        options: Model, size and stride (default: the settings'), device.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    out: Path = Path("cosegmentation")
    parts: int = 0
    preset: CosegmentPreset = "default"
    config: Path | None = None
    refine: Literal["auto", "grabcut", "guided", "none"] | None = None
    outliers: float | None = None
    seed: int = 0
    batch_size: int = 8
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Hyperfeatures:
    """Write the hyperfeatures of images: the maps of a diffusion model's layers and steps, aggregated into one.

    Attributes:
        images: Image files of any sizes.
        sample: Use a sample instead, as for pca.
        out: Folder for IMAGE.safetensors, pca.png and, of two images, matches.png (made if missing).
        most: How many of the matches to draw, drawn at random.
        seed: Of the noise.
        json: Print one JSON object instead of text.
        options: Model (default hyperfeatures:ddpm_mini; hyperfeatures:sd15 for the paper's), size, device, checkpoint.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    out: Path = Path("hyperfeatures")
    most: int = 40
    seed: int = 0
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class TrainDiffusion:
    """Train a small diffusion model of pixels, such as the bundled ddpm_mini.

    Attributes:
        pictures: A folder (with the folders in it) or a tar file of pictures.
        out: Folder for the history, checkpoints and the model (made if missing).
        held_out: Text file with the names of pictures to judge by and not to learn from, as paths without suffix.
        config: Settings in YAML.
        steps: Optimiser steps, in place of the settings'.
        minutes: Stop after so many minutes, to be resumed.
        seed: Of first weights, crops and noise.
        resume: Go on from the checkpoint in the folder, if there is one.
        device: Where to train.
        json: Print one JSON object instead of text.
    """

    pictures: Positional[Path]
    out: Path = Path("diffusion")
    held_out: Path | None = None
    config: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    resume: bool = False
    device: str = "cpu"
    json: bool = False


@dataclass(frozen=True)
class TrainHyperfeatures:
    """Train the network that makes one map of a diffusion model's layers and steps, on pairs of pictures.

    Attributes:
        pictures: A folder (with the folders in it) or a tar file of pictures, learned from with random warps of them.
            With --pairs, the folder that the image paths in it begin at.
        pairs: JSON file of pairs with points that show the same, as Diffusion Hyperfeatures has them, in place of
            warps.
        out: Folder for the history, checkpoints, the model's maps and aggregation.pt (made if missing).
        held_out: Text file with the names of pictures to judge by and not to learn from, as paths without suffix: at
            most 50 of them, evenly spread, and warps of them.
        config: Settings in YAML.
        diffusion: How the diffusion model reads, in YAML. What it does not set is as published: inversion, 50 steps of
            which 11 are kept.
        steps: Optimiser steps, in place of the settings'.
        seed: Of first weights, the order and the warps.
        resume: Go on from the checkpoint in the folder, if there is one.
        json: Print one JSON object instead of text.
        options: Model (default ddpm_mini; any diffusion model), size, device.
    """

    pictures: Positional[Path]
    pairs: Path | None = None
    out: Path = Path("aggregation")
    held_out: Path | None = None
    config: Path | None = None
    diffusion: Path | None = None
    steps: int | None = None
    seed: int = 0
    resume: bool = False
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Pretrain:
    """Train a vision transformer on your own pictures, without labels or with them.

    Attributes:
        data: A folder (with the folders in it) or a tar file of pictures; folders are classes, where labels are used.
        out: Folder for the history, checkpoints, curves and the model (made if missing).
        held_out: Text file with the names of pictures to judge by and not to learn from, as paths without suffix.
        config: Settings in YAML.
        steps: Optimiser steps, in place of the settings'.
        minutes: Minutes to train for, in place of steps.
        seed: Of first weights, the order, crops and masks.
        resume: Go on from the checkpoint in the folder, if there is one.
        device: Where to train.
        json: Print one JSON object instead of text.
    """

    data: Path
    out: Path = Path("pretrained")
    held_out: Path | None = None
    config: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    resume: bool = False
    device: str = "auto"
    json: bool = False


@dataclass(frozen=True)
class TrainStylizer:
    """Train a network of style transfer for any style.

    Attributes:
        content: A folder (with the folders in it) or a tar file of pictures to learn to paint.
        style: The same, of styles. Without it: drawn patterns, textures, and the most colourful of the contents.
        out: Folder for the history, checkpoints, pictures of results and stylizer.safetensors (made if missing).
        held_out: Text file with the names of contents not to learn from, as paths without suffix.
        method: Which network, with its published settings. Default: the one of the file, or adaattn.
        config: Settings in YAML, in place of those.
        steps: Optimiser steps, in place of the settings'.
        seed: Of first weights, crops and draws.
        resume: Go on from the checkpoint in the folder, if there is one.
        device: Where to train.
        json: Print one JSON object instead of text.
    """

    content: Path
    style: Path | None = None
    out: Path = Path("stylizer")
    held_out: Path | None = None
    method: StyleMethod | None = None
    config: Path | None = None
    steps: int | None = None
    seed: int = 0
    resume: bool = False
    device: str = "auto"
    json: bool = False


@dataclass(frozen=True)
class Eval:
    """Measure how well features carry points from one image to another: PCK under a named protocol.

    Attributes:
        data: The data: a folder of the layout; of pairs, the JSON or CSV file; of warps, pictures in a folder or tar.
        layout: What the data are: SPair-71k, PF-PASCAL, PF-WILLOW, CUB-200-2011, AP-10K, a list of pairs, or pictures
            to be warped at random.
        sample: Measure on the stereo pair that comes with scikit-image, alone or beside the data.
        table: Measure every row of a table; bundled needs no download. Without it, one model and tap.
        tap: What to read, facet@layer; several are joined. Default: the model's usual tap.
        log_bin: Give each token its surroundings too (without --table).
        protocol: How points are carried, and which are correct.
        own_size: Read images at the models' own size, whatever the protocol's.
        reference: Measure distances by the object's box or the target image. Default: the protocol's; the image where
            the data have no boxes.
        thresholds: Shares of the reference's longer side; the first is the main one.
        mean: Over what; default the protocol's. A file pck.json has them all.
        split: Of the data, where there are splits: train, val or test.
        category: Only this category (SPair-71k).
        images: Folder that the image paths of a list of pairs begin at. Default: the folder of the list.
        names: Text file with the names of the pictures to warp, as paths without suffix; default all.
        side: Shorter side in pixels that pictures to warp are brought to.
        subset: How many of the pairs, drawn at random.
        seed: Of that draw, of warps and of drawn pairs.
        cache: Folder that keeps the features of every image, for other protocols and runs.
        out: Folder for the table, the errors of each pair, and pictures (made if missing).
        resume: Go on with the run in that folder.
        json: Print one JSON object instead of text.
        options: Model, size, stride (without --table), device, dtype.
    """

    data: Path | None = None
    layout: Literal["spair", "pf-pascal", "pf-willow", "cub", "ap10k", "pairs", "warps"] = "spair"
    sample: Literal["stereo"] | None = None
    table: Literal["bundled", "hyperfeatures"] | None = None
    tap: tuple[str, ...] = ()
    log_bin: bool = False
    protocol: ProtocolName = "spair"
    own_size: bool = False
    reference: Literal["box", "image"] | None = None
    thresholds: tuple[float, ...] = ()
    mean: Literal["keypoint", "image", "category", "category_keypoint"] | None = None
    split: str = "test"
    category: str | None = None
    images: Path | None = None
    names: Path | None = None
    side: int = 256
    subset: int | None = None
    seed: int = 0
    cache: Path | None = None
    out: Path = Path("pck")
    resume: bool = False
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Models:
    """List the models by name.

    Attributes:
        pattern: Shell pattern for the names, for example 'dino*'.
        json: Print one JSON array instead of a table.
    """

    pattern: Positional[str] = "*"
    json: bool = False


Command = (
    Annotated[Extract, subcommand("extract")]
    | Annotated[Bulk, subcommand("bulk")]
    | Annotated[CheckStore, subcommand("check-store")]
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
    | Annotated[Models, subcommand("models")]
)
