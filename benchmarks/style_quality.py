"""How far style transfer goes: the three bundled networks on photographs and patterns that none has learned from.

    python benchmarks/style_quality.py PICTURES --names benchmarks/held_out.txt

PICTURES is a folder or a tar file. Each of 40 photographs is painted at 128 pixels in a drawn pattern of its own. The
rows "content" and "colours matched" (moved to the mean and deviation of the style's, in CIELAB) use no network.
Style: the global style loss at relu1_1 to relu4_1 of vgg_mini, as a share of that of the untouched content. Content:
the content loss at relu4_1 (0 the same, 2 unrelated), which AdaAttN was not trained with; and the structure loss of
mini's keys, key@11, which no network was trained with, as a share of that between contents and styles. In brackets the
standard deviation over the photographs.
"""

import argparse
import random
from pathlib import Path

import torch

import vitfeats as vf
from vitfeats.apps.evaluation import match_colours
from vitfeats.apps.style_transfer import load_stylizer, stylize
from vitfeats.configs import STYLE_METHODS
from vitfeats.pictures import read_names, read_pictures
from vitfeats.preprocess import load_image, to_pil

SIZE = 128
LEVELS = [f"out@relu{level}_1" for level in range(1, 5)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--names", type=Path, help="text file, one name a line")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = [] if options.names is None else read_names(options.names)
    found = read_pictures(options.pictures, side=SIZE, only=wanted)
    chosen = random.Random(0).sample(sorted(found), min(options.count, len(found)))
    print("| row | style | content, vgg_mini | structure, mini |\n| --- | --- | --- | --- |")
    for name, figures in measured([found[name] for name in chosen]).items():
        told = [f"{values.mean():.2f} ({values.std():.2f})" for values in figures.unbind(1)]
        print(f"| {name} | {' | '.join(told)} |")


@torch.no_grad()
def measured(pictures: list) -> dict[str, torch.Tensor]:
    """Return for each row the three figures of each picture: (pictures, 3)."""
    maps = vf.load_extractor("vgg_mini", size=SIZE, device="cpu")
    keys = vf.load_extractor("mini", size=SIZE, device="cpu")
    stylizers = {method: load_stylizer(method, device="cpu") for method in STYLE_METHODS}
    found: dict[str, list[list[float]]] = {}
    for picture, style in zip(pictures, vf.patterns.usual(len(pictures), SIZE, seed=1), strict=True):
        side = min(picture.shape[:2])
        content = to_pil(load_image(picture[:side, :side]))
        made = {"content": content, "colours matched": match_colours(content, style)}
        made |= {method: stylize(content, style, stylizer=each).image for method, each in stylizers.items()}
        of_style, of_content = maps(style, LEVELS), maps(content, LEVELS)
        kept, other = keys(content, "key@11"), keys(style, "key@11")
        apart = vf.structure_loss(kept, other)
        untouched = sum(float(vf.global_style_loss(of_content[tap], of_style[tap])) for tap in LEVELS)
        for name, image in made.items():
            out = maps(image, LEVELS)
            distance = sum(float(vf.global_style_loss(out[tap], of_style[tap])) for tap in LEVELS)
            strayed = float(vf.content_loss(out[LEVELS[3]], of_content[LEVELS[3]]))
            structure = float(vf.structure_loss(keys(image, "key@11"), kept) / apart)
            found.setdefault(name, []).append([distance / untouched, strayed, structure])
    return {name: torch.tensor(figures) for name, figures in found.items()}


if __name__ == "__main__":
    main()
