"""What few steps cost where a caption leaves much open: samplers and distilled students, on shapes.

python benchmarks/scenes.py teacher=runs/teacher student=runs/student --num_steps 1 2 4 10 25 100
python benchmarks/scenes.py teacher=runs/teacher --published_fast 4 10

Without a caption a picture may show any scene, but all of its tokens must agree on one. ``scenes``
is the share of such pictures that are one: the objects and the background are read from the pixels
and drawn again, and the PSNR of the two pictures is at least 20 dB. ``different`` is how many
different scenes there are among them. ``grounds`` is the number of background colours that all of
these pictures have, each counted by how often it comes (e to the entropy): fewer than real pictures
have, and a model has forgotten some. ``right`` is the share of pictures of held-out captions in
which everything is right, as in attribute_accuracy.py. The last row has the true pictures after a
pass through the tokenizer. Every share has its standard error.
"""

import argparse
import sys
from pathlib import Path

import attribute_accuracy
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqd_jax.data import images
from vqd_jax.data.sets import shapes_text
from vqd_jax.evaluation import attributes, measures
from vqd_jax.pipeline import VQDiffusion

_MIN_PSNR = 20.0


def scene_of(image: np.ndarray) -> shapes_text.Scene | None:
    """The scene that a picture uint8 [S, S, 3] shows; None if it shows none."""
    found = attributes.read_attributes(image)
    if len(found) not in (1, 2):
        return None
    objects = []
    for shape in found:
        row, column = divmod(shapes_text.POSITIONS.index(shape["position"]), 3)
        x, y = shapes_text.GRID[column], shapes_text.GRID[row]
        radius = float(np.mean(shapes_text.RADII[shape["size"]]))
        objects.append(shapes_text.Shape(**shape, x=x, y=y, radius=radius))
    scene = shapes_text.Scene(attributes.read_background(image), tuple(objects))
    apart = shapes_text.render(scene, len(image)).astype(float) - image
    squared = max(np.mean(apart**2), 1e-9)
    return scene if 10 * np.log10(255**2 / squared) >= _MIN_PSNR else None


def percent(values: list[bool]) -> str:
    """'97.0 ± 1.2 %'."""
    mean = float(np.mean(values))
    return f"{100 * mean:.1f} ± {100 * np.sqrt(mean * (1 - mean) / (len(values) - 1)):.1f} %"


def effective(values: list) -> float:
    """How many different values there are, e to the entropy of their shares."""
    return measures.code_use(np.unique(values, return_counts=True)[1])["code_perplexity"]


def row(name: str, free: np.ndarray, asked: np.ndarray, scenes: list) -> None:
    """Prints a row: pictures without a caption, and of the captions of scenes."""
    found = [scene_of(image) for image in free]
    different = len({scene for scene in found if scene})
    grounds = effective([attributes.read_background(image) for image in free])
    right = attribute_accuracy.scores(asked, scenes)["all"]
    print(
        f"| {name} | {percent([scene is not None for scene in found])} | {different} "
        f"| {grounds:.1f} | {100 * right[0]:.1f} ± {100 * right[1]:.1f} % |",
        flush=True,
    )


def settings(chosen: argparse.Namespace, of_model) -> list[dict]:
    """What every row asks of ``VQDiffusion.generate``."""
    truncations = chosen.truncation or [of_model.truncation]
    if chosen.published_fast:
        steps = [{"published_fast": speed} for speed in chosen.published_fast]
    else:
        rules = chosen.rule or [of_model.rule]
        steps = [{"rule": rule, "num_steps": n} for rule in rules for n in chosen.num_steps]
    return [step | {"truncation": share} for step in steps for share in truncations]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="name=DIR")
    parser.add_argument("--num_steps", nargs="+", type=int, default=[1, 2, 4, 10, 25, 100])
    parser.add_argument("--published_fast", nargs="+", type=int, help="speeds, not --num_steps")
    parser.add_argument("--rule", nargs="+", help="the model's own if unset")
    parser.add_argument("--truncation", nargs="+", type=float, help="likewise")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--grid", help="file for the first eight pictures of a row")
    chosen = parser.parse_args()
    prompts, scenes = attribute_accuracy.asked(chosen.pictures)
    shown, names = [], []
    print("| model, setting | scenes | different | grounds | right |\n" + "|---" * 5 + "|")
    for given in chosen.models:
        name, _, directory = given.partition("=")
        model = VQDiffusion.from_pretrained(directory)
        for options in settings(chosen, model.config.sampling):
            told = ", ".join(f"{key} {value}" for key, value in options.items())
            # Without a caption there is nothing to guide to.
            free = model.generate(
                [""] * chosen.pictures, seed=1, batch_size=50, guidance_scale=1.0, **options
            )
            asked = model.generate(prompts, batch_size=50, **options)
            shown.append(free.pixels[:8, 0])
            names.append(f"{name}: {told}")
            row(names[-1], free.pixels[:, 0], asked.pixels[:, 0], scenes)
    real = attribute_accuracy.true_pictures(scenes, model.config.data.image_size)
    tokens = model.reconstruct(real)
    row("through the tokenizer", tokens, tokens, scenes)
    if chosen.grid:
        images.save(chosen.grid, images.grid(np.stack(shown), names))


if __name__ == "__main__":
    main()
