"""Does a caption bring its own picture? Retrieval, sharpness and copies of a model of the emoji.

python benchmarks/emoji_retrieval.py --model=emoji
python benchmarks/emoji_retrieval.py --model=DIR --guidance_scale=1,1.5,2,3 --num_steps=25
python benchmarks/emoji_retrieval.py --model=runs/flat [--data=emoji_text]

A picture is drawn for each of 200 captions of training objects (all categories but people and
body), of 200 training people, of the combinations that the model's config holds out, and of the
validation and test pictures, whose concepts it never saw. A picture counts as right if the true one
is the nearest of a pool: all training pictures, all pictures of its concept for a combination, and
all pictures of the set for unseen concepts. The distance is that of pixels after the mean over
squares, at 16x16, and a tie counts against. ``--features`` adds EfficientNet-Lite0 (extra `eval`).

A model of a folder of one's own, such as one that was fine-tuned, is asked for all its training
captions among its training pictures, and for all held-out ones among all pictures;
``--data=emoji_text`` asks it for what its base knew, and ``--data=image_text_folder
--dir=PICTURES`` asks any model for those pictures. Where the model's own training pictures have
the same captions, a row says how often these are the nearest: what a perfect memory would have.

The ceiling is the same for the true pictures after a pass through the tokenizer. PSNR is to the
true picture. Sharpness is the mean squared difference of neighbouring pixels over that of the true
pictures. A picture counts as a copy of the training picture that is nearest to it, if that one's
own nearest neighbour among the training pictures is more than three times as far away.
"""

import argparse
import itertools
from typing import NamedTuple

import numpy as np

from vqd_jax.data import batches, encode, images
from vqd_jax.errors import UserError
from vqd_jax.evaluation import distances, features, measures
from vqd_jax.pipeline import VQDiffusion

SPLITS = ("train", "validation", "test")
# Settings of the sampler that may be given as lists; all their combinations are drawn.
SWEPT = ("rule", "num_steps", "truncation", "guidance_scale")
_SIDE = 16


class Records(NamedTuple):
    """Pictures uint8 [R, S, S, 3] of a split, with a caption, concept and category of each."""

    pixels: np.ndarray
    captions: list[str]
    concepts: np.ndarray
    categories: np.ndarray

    @property
    def objects(self) -> np.ndarray:
        return self.categories != "People & Body"


class Asked(NamedTuple):
    """A group of captions: places [P] of their pictures in a pool, and that pool's members.

    Attributes:
      places: of the true pictures among all records.
      pools: bool [P, R], among which each true picture has to be the nearest.
    """

    places: np.ndarray
    pools: np.ndarray


def read(builder, side: int, splits: tuple[str, ...]) -> Records:
    """The records of some splits, one after the other."""
    there = [split for split in splits if split in builder.info.splits]
    found = [record for split in there for record in batches.records(builder, split)]
    return Records(
        np.stack([images.center_crop(record["image"], side) for record in found]),
        [record["captions"][0] for record in found],
        np.array([record.get("concept", record["file"]) for record in found]),
        np.array([record.get("category", "") for record in found]),
    )


def groups(records: Records, num_train: int, held_out: set[str], count: int) -> dict[str, Asked]:
    """The captions to ask for. The first ``num_train`` records are the training split."""
    total = np.arange(len(records.captions))
    training = total < num_train
    held = np.array([caption in held_out for caption in records.captions])
    seen, order = training & ~held, np.random.default_rng(0).permutation(len(total))
    made = {}
    for name, chosen in (
        ("objects", seen & records.objects),
        ("people", seen & ~records.objects),
    ):
        places = order[chosen[order]][:count]
        if not len(places):
            continue
        made[name] = Asked(places, np.repeat(training[None], len(places), 0))
    places = total[held]
    if len(places):
        same = records.concepts[places][:, None] == records.concepts[None]
        made["unseen combinations"] = Asked(places, same)
    places = total[~training]
    made["unseen concepts"] = Asked(places, np.ones((len(places), len(total)), bool))
    return made


def small(pixels: np.ndarray) -> np.ndarray:
    """Means over squares: uint8 [P, S, S, 3] -> float32 [P, 16 * 16 * 3]."""
    count, side = pixels.shape[:2]
    block = side // _SIDE
    means = pixels.reshape(count, _SIDE, block, _SIDE, block, 3).mean(axis=(2, 4))
    return means.reshape(count, -1).astype(np.float32)


def right(made: np.ndarray, real: np.ndarray, asked: Asked) -> np.ndarray:
    """Whether each true picture is the only nearest of its pool, bool [P]."""
    apart = distances.squared_distances(np.asarray(made, np.float64), np.asarray(real, np.float64))
    own = apart[np.arange(len(made)), asked.places]
    return ((apart <= own[:, None]) & asked.pools).sum(axis=1) == 1


def copies(made: np.ndarray, training: np.ndarray) -> float:
    """Share of pictures that are three times as near to a training picture as its neighbours."""
    found = distances.nearest(made, training)
    spacing = distances.nearest(training, training, same=True).distance
    return float(np.mean(distances.is_copy(found, spacing / 3.0)))


def share(values: np.ndarray) -> str:
    """A percentage with its standard error."""
    return f"{mean(100 * values)} %"


def mean(values: np.ndarray) -> str:
    """A mean with its standard error."""
    found = distances.mean_estimate(values)
    return f"{found.value:.1f} ± {found.error:.1f}"


def of_model(model: VQDiffusion, count: int) -> dict[str, np.ndarray]:
    """Whether the true picture is nearest, for ``count`` training objects and as many people."""
    builder = encode.data_set(model.config)
    records = read(builder, model.config.data.image_size, SPLITS)
    held_out, found = set(model.config.data.hold_out), {}
    num_train = builder.info.splits["train"].num_examples
    asked_for = groups(records, num_train, held_out, count)
    for name in ("objects", "people"):
        prompts = [records.captions[place] for place in asked_for[name].places]
        made = model.generate(prompts, num_images=1, batch_size=50)
        found[name] = right(small(made.pixels[:, 0]), small(records.pixels), asked_for[name])
    return found


def remembered_by(model: VQDiffusion) -> dict[str, np.ndarray]:
    """The model's own training pictures by caption; none where they are not on this machine."""
    try:
        own = read(encode.data_set(model.config), model.config.data.image_size, SPLITS[:1])
    except UserError:
        return {}
    return dict(zip(own.captions, own.pixels, strict=True))


def numbers(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji", help="folder, workdir or packaged name")
    parser.add_argument("--count", type=int, default=200, help="captions of each training group")
    parser.add_argument("--guidance_scale", type=numbers(float), default=[None])
    parser.add_argument("--truncation", type=numbers(float), default=[None])
    parser.add_argument("--num_steps", type=numbers(int), default=[None])
    parser.add_argument("--rule", type=numbers(str), default=[None])
    parser.add_argument("--group", action="append", help="some groups alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--features", action="store_true", help="measure in features, too")
    parser.add_argument("--data", default="", help="another data set than the model's own")
    parser.add_argument("--dir", default="", help="of its files")
    chosen = parser.parse_args()
    model = VQDiffusion.from_pretrained(chosen.model)
    remembered = {}
    if chosen.data:
        remembered = remembered_by(model)
        model.config.data.update({"name": chosen.data, "dir": chosen.dir, "hold_out": ()})
    builder = encode.data_set(model.config)
    records = read(builder, model.config.data.image_size, SPLITS)
    num_train = builder.info.splits["train"].num_examples
    real = {"pixels": small(records.pixels)}
    net = features.efficientnet_lite0() if chosen.features else None

    def seen(pixels):
        found = {"pixels": small(pixels)}
        if net:
            parts = [net.features(pixels[i : i + 16]) for i in range(0, len(pixels), 16)]
            found["features"] = np.concatenate(parts)
        return found

    if net:
        real = seen(records.pixels)
    asked_for = groups(records, num_train, set(model.config.data.hold_out), chosen.count)
    print("| pictures | captions | right in pixels | in features | PSNR, dB | sharpness | copies |")
    print("|---|---|---|---|---|---|---|")

    def line(name, pixels, asked):
        found = {key: right(x, real[key], asked) for key, x in seen(pixels).items()}
        true = records.pixels[asked.places]
        sharp = measures.sharpness(pixels) / measures.sharpness(true)
        copied = copies(small(pixels), real["pixels"][:num_train])
        in_features = share(found["features"]) if net else "-"
        print(
            f"| {name} | {len(pixels)} | {share(found['pixels'])} | {in_features} | "
            f"{mean(measures.psnr(pixels, true))} | {sharp:.2f} | {100 * copied:.0f} % |",
            flush=True,
        )

    for name, asked in asked_for.items():
        if chosen.group and name not in chosen.group:
            continue
        line(
            f"{name}: through the tokenizer", model.reconstruct(records.pixels[asked.places]), asked
        )
        prompts = [records.captions[place] for place in asked.places]
        if remembered and remembered.keys() >= set(prompts):
            pictures = np.stack([remembered[prompt] for prompt in prompts])
            line(f"{name}: the model's own training pictures", pictures, asked)
        for values in itertools.product(*(getattr(chosen, name) for name in SWEPT)):
            given = zip(SWEPT, values, strict=True)
            options = {key: value for key, value in given if value is not None}
            made = model.generate(prompts, num_images=1, seed=chosen.seed, batch_size=50, **options)
            told = ", ".join(f"{key} {value}" for key, value in options.items())
            line(f"{name}: drawn {told}".rstrip(), made.pixels[:, 0], asked)


if __name__ == "__main__":
    main()
