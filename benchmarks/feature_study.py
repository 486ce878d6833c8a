"""Which features and which distances are to be believed: graded damage, and checkpoints.

python benchmarks/feature_study.py --runs=DIR,DIR,DIR,DIR --output=OUT

Real pictures of shapes are damaged in eight grades: blur, noise, JPEG, replaced codes, dropped
colours. A distance that can be trusted grows with the grade (Spearman's rho). Mode collapse and
copies of training pictures show what each figure notices. Pictures that checkpoints of the runs
draw are ranked by each distance and by exact attribute accuracy. The runs are of configs/shapes.py
and its variants; the first one lends its autoencoder for the replaced codes.

Everything is kept in OUT: a run that is cut off goes on. The result is OUT/study.json, and a table.
"""

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from PIL import Image
from scipy import ndimage, stats

from vqd_jax import files
from vqd_jax.data.sets import shapes_text
from vqd_jax.errors import UserError
from vqd_jax.evaluation import distances, features
from vqd_jax.evaluation.attributes import ATTRIBUTES, attribute_scores
from vqd_jax.evaluation.pictures import Extractor
from vqd_jax.pipeline import VQDiffusion

_RUNS = flags.DEFINE_list("runs", None, "Workdirs of runs on shapes.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_NETS = flags.DEFINE_list("nets", ["random-64", "efficientnet-64"], "Networks and their sides.")
_COUNT = flags.DEFINE_integer("count", 400, "Pictures of each kind.")
_STEPS = flags.DEFINE_integer("num_steps", 10, "Steps of sampling.")

_SIDE = 32
_GRADES = 8
# The study's scenes, apart from those of any run.
_SEED = 7


def scenes(split, count, start=0):
    return [shapes_text.scene(_SEED, start + k, split) for k in range(count)]


def rendered(drawn):
    return np.stack([shapes_text.render(scene, _SIDE) for scene in drawn])


def blur(pixels, grade, rng):
    sigma = 0.25 * grade
    return ndimage.gaussian_filter(pixels.astype(float), (0, sigma, sigma, 0))


def noise(pixels, grade, rng):
    return pixels + rng.normal(size=pixels.shape) * 5.0 * grade


def jpeg(pixels, grade, rng):
    made = []
    for image in pixels:
        stream = io.BytesIO()
        Image.fromarray(image).save(
            stream, "JPEG", quality=(85, 70, 55, 42, 31, 22, 14, 8)[grade - 1]
        )
        made.append(np.asarray(Image.open(stream).convert("RGB")))
    return np.stack(made)


def damaged(pixels, model):
    """{(kind, grade): uint8 [N, S, S, 3]}; grade 0 is the pictures as they are."""
    found = {}
    for kind, function in (("blur", blur), ("noise", noise), ("jpeg", jpeg)):
        for grade in range(1, _GRADES + 1):
            made = function(pixels, grade, np.random.default_rng(grade))
            found[kind, grade] = np.clip(np.rint(made), 0, 255).astype(np.uint8)
    codes, rng = model.encode_images(pixels), np.random.default_rng(0)
    order, others = (
        rng.random(codes.shape),
        rng.integers(model.config.autoencoder.num_codes, size=codes.shape),
    )
    for grade in range(1, _GRADES + 1):
        # 10 % to 50 %; a token that is replaced stays so at higher grades.
        share = 0.1 + 0.4 * (grade - 1) / (_GRADES - 1)
        found["codes", grade] = model.decode_codes(np.where(order < share, others, codes))
    return found


def drawn_pictures(run, step, prompts, folder):
    """What a checkpoint draws from the prompts, from the file if it is there."""
    path = folder / f"{Path(run).name}_{step}.npy"
    if not path.exists():
        view = folder / f"view_{Path(run).name}_{step}"
        (view / "checkpoints").mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "autoencoder", f"checkpoints/{step}"):
            if not (view / name).exists():
                os.symlink(Path(run).resolve() / name, view / name)
        model = VQDiffusion.from_workdir(str(view))
        made = model.generate(prompts, seed=0, num_steps=_STEPS.value, batch_size=64).pixels[:, 0]
        with files.appearing(path) as scratch:
            np.save(scratch, made)
    return np.load(path)


def accuracy(pixels, drawn):
    """Share of attributes that are right."""
    rows = [
        attribute_scores(image, [dataclasses.asdict(o) for o in scene.objects])
        for image, scene in zip(pixels, drawn, strict=True)
    ]
    return float(np.mean([[row[name] for name in ATTRIBUTES] for row in rows]))


def net_of(name):
    kind, _, side = name.partition("-")
    make = {"random": features.random_net, "efficientnet": features.efficientnet_lite0,
            "mobilenet": features.mobilenet_v2}  # fmt: skip
    if kind not in make or not side.isdigit():
        raise UserError(f"--nets: {name!r}; give {', '.join(make)} with a side, as random-64")
    return make[kind](size=int(side))


def figures(made, real, reference):
    """All distances of features of equal numbers of pictures."""
    found = {
        "frechet": reference.of_moments(distances.Moments.of(made)),
        "kid": distances.kid(made, real).value,
    }
    return found | {n: e.value for n, e in distances.neighbour_metrics(made, real).items()}


def study_of(net, sets, real, training):
    """Every figure of every set, and the test for copies."""
    extractor = Extractor(net, _OUTPUT.value)
    seen = extractor.features(real)
    reference = distances.Reference(seen.mean(axis=0).astype(float), np.cov(seen.T.astype(float)))
    known = extractor.features(training)
    spacing = distances.nearest(known, known, same=True).distance
    found, pictures = {}, sets["real"][0]
    of_pictures = extractor.features(pictures)
    for name, (pixels, places) in sets.items():
        of_set = of_pictures if pixels is pictures else extractor.features(pixels)
        of_set = of_set if places is None else of_set[places]
        found[name] = figures(of_set, seen, reference)
        copied = distances.is_copy(distances.nearest(of_set, known), spacing)
        found[name]["copies"] = float(copied.mean())
        logging.info("%s %s: %s", net.name, name, found[name])
    return found


def with_special_sets(pictures, drawn, training, rng):
    """{name: (pixels, places or None)} of dropped colours, collapse and copies."""
    count, sets = len(pictures), {"real": (pictures, None)}
    colours = np.array([list(shapes_text.COLOURS).index(s.objects[0].colour) for s in drawn])
    kinds = len(shapes_text.COLOURS)
    for grade in range(1, _GRADES + 1):
        kept = np.flatnonzero(colours >= min(grade, kinds - 1))
        # Without replacement where there are enough, so that no picture counts twice.
        sets[f"classes {grade}"] = (pictures, kept[: _kept(colours, kinds)])
        few = rng.permutation(count)[: max(2, count // 2**grade)]
        sets[f"collapse {grade}"] = (pictures, np.resize(few, count))
        share = count * grade // _GRADES
        copies = np.concatenate([training[:share], pictures[share:]])
        sets[f"copies {grade}"] = (copies, None)
    return sets


def _kept(colours, kinds):
    """Pictures that every grade of dropped colours has."""
    return int((colours >= min(_GRADES, kinds - 1)).sum())


def summary(found, quality):
    """Spearman's rho of every figure with the grade, and with attribute accuracy."""
    names = list(found["real"])
    table = {}
    for kind in ("blur", "noise", "jpeg", "codes", "classes", "collapse", "copies"):
        grades = [found["real"]] if kind != "classes" else []
        grades += [found[f"{kind} {grade}"] for grade in range(1, _GRADES + 1)]
        for name in names:
            values = [row[name] for row in grades]
            rho = stats.spearmanr(range(len(values)), values).statistic if np.ptp(values) else 0.0
            table.setdefault(name, {})[kind] = float(rho)
    for name in names:
        values = [found[checkpoint][name] for checkpoint in quality]
        rho = stats.spearmanr(list(quality.values()), values).statistic if np.ptp(values) else 0.0
        table[name]["checkpoints"] = float(rho)
    return table


def main(argv):
    del argv
    logging.set_verbosity(logging.INFO)
    output, count = Path(_OUTPUT.value), _COUNT.value
    (output / "samples").mkdir(parents=True, exist_ok=True)
    drawn = scenes("validation", count)
    prompts = [shapes_text.captions(scene)[0] for scene in drawn]
    quality, made = {}, {}
    for run in _RUNS.value:
        steps = sorted(
            int(p.name) for p in (Path(run) / "checkpoints").iterdir() if p.name.isdigit()
        )
        for step in steps:
            name = f"{Path(run).name} {step}"
            made[name] = drawn_pictures(run, step, prompts, output / "samples")
            quality[name] = accuracy(made[name], drawn)
            logging.info("%s: %.3f of the attributes", name, quality[name])
    pictures = rendered(drawn)
    # More scenes of the same kind: to compare with, and to copy.
    real, training = (rendered(scenes("train", count, start)) for start in (0, count))
    model = VQDiffusion.from_workdir(_RUNS.value[0])
    sets = with_special_sets(pictures, drawn, training, np.random.default_rng(0))
    sets |= {f"{kind} {grade}": (x, None) for (kind, grade), x in damaged(pictures, model).items()}
    sets |= {name: (pixels, None) for name, pixels in made.items()}
    result = {"count": count, "accuracy": quality, "nets": {}}
    for name in _NETS.value:
        path = output / f"{name}.json"
        if not path.exists():
            files.write_json(path, study_of(net_of(name), sets, real, training))
        found = json.loads(path.read_text())
        result["nets"][name] = {"figures": found, "rho": summary(found, quality)}
        show(name, result["nets"][name]["rho"])
    files.write_json(output / "study.json", result)


def show(net, table):
    kinds = list(next(iter(table.values())))
    print(f"\n{net}: Spearman's rho with the grade, and with attribute accuracy")
    print(f"{'':12}" + "".join(f"{kind:>12}" for kind in kinds))
    for name, row in table.items():
        print(f"{name:12}" + "".join(f"{row[kind]:12.3f}" for kind in kinds))


if __name__ == "__main__":
    app.run(main)
