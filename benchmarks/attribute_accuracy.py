"""Share of attributes of generated pictures that are what the prompt asked for.

python benchmarks/attribute_accuracy.py --workdir=DIR
python benchmarks/attribute_accuracy.py --workdir=DIR --rule ordinary confidence --num_steps 1 4 25

DIR is the workdir of a run of configs/shapes.py. The prompts are the captions of test scenes with
one object, whose pair of colour and shape no training picture has. Every attribute is read back
from the pixels; ``count`` is the share of pictures with just one object, and ``all`` that of
pictures with everything right. Beside the model stand the true pictures after a pass through the
autoencoder, which bound what it can reach, and as drawn, which shows that the reading itself is
right.
"""

import argparse
import dataclasses
import itertools

import numpy as np
from absl import logging

from vqd_jax.data import images
from vqd_jax.data.sets import shapes_text
from vqd_jax.errors import UserError
from vqd_jax.evaluation.attributes import attribute_scores
from vqd_jax.pipeline import VQDiffusion

# That of the prepared data set.
_DATA_SEED = 0


def shares(pictures, scenes) -> dict[str, np.ndarray]:
    """The share of every attribute that is right in pictures uint8 [R, S, S, 3]: float [R].

    ``all`` is 1 for a picture in which every attribute of every object and the count are right.
    """
    rows = [
        attribute_scores(image, [dataclasses.asdict(shape) for shape in scene.objects])
        for image, scene in zip(pictures, scenes, strict=True)
    ]
    rows = [row | {"all": float(min(row.values()) == 1)} for row in rows]
    return {name: np.array([row[name] for row in rows]) for row in rows[:1] for name in row}


def scores(pictures, scenes) -> dict[str, tuple[float, float]]:
    """Mean and standard error of ``shares``."""
    table = shares(pictures, scenes)
    return {n: (v.mean(), v.std(ddof=1) / np.sqrt(len(v))) for n, v in table.items()}


def asked(count: int) -> tuple[list[str], list]:
    """Captions of test scenes with one object, and the scenes."""
    scenes = (shapes_text.scene(_DATA_SEED, i, "test") for i in itertools.count())
    scenes = (scene for scene in scenes if len(scene.objects) == 1)
    scenes = list(itertools.islice(scenes, count))
    return [shapes_text.captions(scene)[0] for scene in scenes], scenes


def true_pictures(scenes: list, size: int) -> np.ndarray:
    """What scenes look like: uint8 [R, size, size, 3]."""
    return np.stack([images.center_crop(shapes_text.render(s, size), size) for s in scenes])


def of_model(model: VQDiffusion, count: int) -> dict[str, float]:
    """The share of every attribute that is right, in a picture of each of ``count`` captions."""
    prompts, scenes = asked(count)
    made = model.generate(prompts, num_images=1, batch_size=50)
    return {name: float(mean) for name, (mean, _) in scores(made.pixels[:, 0], scenes).items()}


def print_steps(model, prompts, scenes, rules, counts, options) -> None:
    """Prints the share of pictures in which everything is right, by rule and number of steps."""
    print(f"| rule, steps | {' | '.join(map(str, counts))} |")
    print("|" + "---|" * (1 + len(counts)))
    for rule in rules:
        cells = []
        for count in counts:
            made = model.generate(prompts, rule=rule, num_steps=count, **options)
            mean, error = scores(made.pixels[:, 0], scenes)["all"]
            cells.append(f"{100 * mean:.1f} ± {100 * error:.1f} %")
        print(f"| {rule} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="of a run on shapes_text")
    parser.add_argument("--num_prompts", type=int, default=200, help="test scenes with one object")
    parser.add_argument("--seed", type=int, default=0, help="decides the pictures")
    parser.add_argument("--guidance_scale", type=float, help="the config's if unset")
    parser.add_argument("--rule", nargs="+", help="prints a table of rules and --num_steps")
    parser.add_argument("--num_steps", nargs="+", type=int, default=[10, 25, 100])
    chosen = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    model = VQDiffusion.from_workdir(chosen.workdir)
    if not model.config.data.name.startswith("shapes_text"):
        raise UserError(f"{chosen.workdir} was trained on {model.config.data.name}, not on shapes")
    prompts, scenes = asked(chosen.num_prompts)
    options = {"seed": chosen.seed, "batch_size": 40}
    if chosen.guidance_scale is not None:
        options["guidance_scale"] = chosen.guidance_scale
    if chosen.rule:
        print_steps(model, prompts, scenes, chosen.rule, chosen.num_steps, options)
        return
    real = true_pictures(scenes, model.config.data.image_size)
    made = model.generate(prompts, **options)
    columns = {
        "generated": scores(made.pixels[:, 0], scenes),
        "reconstructed": scores(model.reconstruct(real), scenes),
        "drawn": scores(real, scenes),
    }
    print(f"{'attribute':12}" + "".join(f"{name:>22}" for name in columns))
    for attribute in next(iter(columns.values())):
        cells = (columns[name][attribute] for name in columns)
        print(f"{attribute:12}" + "".join(f"{100 * m:14.1f} % ± {100 * e:3.1f}" for m, e in cells))


if __name__ == "__main__":
    main()
