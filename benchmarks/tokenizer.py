"""What every term of a VQGAN's loss gives in equal time: rows of one tokenizer, on two sets.

pip install -e '.[eval]'
python benchmarks/tokenizer.py --workdir=DIR --set=emoji --calibrate
python benchmarks/tokenizer.py --workdir=DIR --set=emoji --minutes=6
python benchmarks/tokenizer.py --workdir=DIR --set=emoji --report
python benchmarks/tokenizer.py --workdir=DIR --trained RUN RUN

The calibration times a step of every row, which takes a quiet machine. A row then has as many steps
as fit into the minutes, so the training itself may run beside other work; the same command goes on
with what is left. The report measures 64 validation pictures: PSNR, SSIM, the share of the codes
that they use, and how far the reconstructions are from the pictures in the features of
EfficientNet-Lite0, |f(x)/|f(x)| - f(x')/|f(x')||^2 with its 1280 features f, a network that trained
none of the rows. It draws the first eight pictures of all rows. ``--trained`` does the same for
workdirs of any tokenizers of one set, for training pictures too. Sharpness is the mean squared
difference of neighbouring pixels over that of the pictures.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import emoji, shapes
from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.data import batches, encode, images, sets
from vqd_jax.evaluation import features, measures
from vqd_jax.interop import pretrained
from vqd_jax.parallel import rows as row_lib
from vqd_jax.parallel import sharding
from vqd_jax.training import stage_one, tokenizer
from vqd_jax.training import task as task_lib

SETS = {"emoji": (emoji, 64), "shapes": (shapes, 32)}
_PERCEPTUAL = {"squared_weight": 0.5, "perceptual_weight": 0.1}
_ADVERSARIAL = _PERCEPTUAL | {
    "adversarial_weight": 0.02,
    "discriminator_channels": 32,
    "discriminator_layers": 2,
}
# Validation pictures of the report.
MEASURED = 64
# Changes of config.autoencoder; the warm-up of the adversarial loss takes a third of the steps.
ROWS = {
    "L2": {},
    "L1": {"squared_weight": 0.0},
    "+ perceptual": _PERCEPTUAL,
    "+ adversarial": _ADVERSARIAL,
    "+ LeCam, averaged": _ADVERSARIAL | {"lecam_weight": 0.001, "ema_decay": 0.999},
}


def row_config(name: str, row: str, num_steps: int):
    """The config of a row."""
    module, side = SETS[name]
    config = module.get_config()
    config.data.image_size = side
    config.autoencoder.update(ROWS[row])
    config.autoencoder.num_steps = num_steps
    if "adversarial_weight" in ROWS[row]:
        config.autoencoder.adversarial_warmup = num_steps // 3
    config.training.eval_every = num_steps
    config.training.save_every = 100
    config.training.log_every = 20
    config_lib.validate(config)
    return config


def step_seconds(name: str, repeats: int = 12) -> dict[str, float]:
    """Median seconds of a step of every row, the rows in turn."""
    made = {}
    for row in ROWS:
        config = row_config(name, row, 1000)
        mesh = sharding.make_mesh(config)
        task = stage_one.AutoencoderTask(config, mesh)
        state = task.begin(task_lib.init_state(task, mesh))
        side, size = config.data.image_size, config.autoencoder.batch_size
        pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3)).astype(np.uint8)
        step = task_lib.jit_step(task, mesh)
        state, metrics = step(state, sharding.put_batch({"image": pixels}, mesh))
        jax.block_until_ready(metrics)
        print(f"{row}: compiled", flush=True)
        made[row] = [step, state, sharding.put_batch({"image": pixels}, mesh), []]
    for _ in range(repeats):
        for entry in made.values():
            start = time.perf_counter()
            entry[1], metrics = entry[0](entry[1], entry[2])
            jax.block_until_ready(metrics)
            entry[3].append(time.perf_counter() - start)
    return {row: float(np.median(entry[3])) for row, entry in made.items()}


def folder_of(workdir: Path, name: str, row: str) -> Path:
    """The workdir of a row."""
    return workdir / name / row.replace("+ ", "").replace(", ", "_").lower()


def train(workdir: Path, name: str, row: str, minutes: float) -> None:
    """Trains a row, or what is left of it."""
    calibrated = files.read_json(workdir / name / "calibration.json", "run with --calibrate")
    num_steps = round(60 * minutes / calibrated[row])
    config = row_config(name, row, num_steps)
    place = folder_of(workdir, name, row)
    place.mkdir(parents=True, exist_ok=True)
    stage_one.prepare(config, str(place), encode.data_set(config))
    files.write_text(place / "config.json", config_lib.to_json(config))
    print(f"{row}: {num_steps} steps", flush=True)


def pictures_of(config, split: str = "") -> np.ndarray:
    """Some pictures of a split, uint8 [R, S, S, 3]; the first ones of that to evaluate on if ""."""
    builder = encode.data_set(config)
    found = batches.records(builder, split or sets.evaluation_split(builder))
    places = np.random.default_rng(0).permutation(len(found)) if split else range(len(found))
    side = config.data.image_size
    return np.stack([images.center_crop(found[int(i)]["image"], side) for i in places[:MEASURED]])


@dataclasses.dataclass
class Measured:
    """A line of the table, and the reconstructions that are shown."""

    numbers: dict[str, float]
    shown: np.ndarray


def measure(place: Path, net: features.FeatureNet, split: str = "") -> Measured:
    """What a trained row does to the pictures of a split; see ``pictures_of``."""
    config = config_lib.load(str(place / "config.json"))
    params = pretrained.load_autoencoder(config, pretrained.model_folder(str(place)))
    sizes, pictures = config_lib.autoencoder_config(config), pictures_of(config, split)
    run = jax.jit(functools.partial(tokenizer.reconstruct, config=sizes))
    parts = [
        [np.asarray(x)[:count] for x in run(params, part)]
        for part, count in row_lib.batches(pictures, 16)
    ]
    made, codes = (np.concatenate(part) for part in zip(*parts, strict=True))

    def unit(pixels):
        found = row_lib.in_batches(net.features, pixels, 16)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    apart = np.sum((unit(pictures) - unit(made)) ** 2, axis=1)
    numbers = {
        "steps": config.autoencoder.num_steps,
        "PSNR": float(measures.psnr(pictures, made).mean()),
        "SSIM": float(measures.ssim(pictures, made).mean()),
        "feature distance": float(apart.mean()),
        "sharpness": measures.sharpness(made) / measures.sharpness(pictures),
        "codes used": len(np.unique(codes)) / sizes.num_codes,
    }
    return Measured(numbers, np.stack([pictures[:8], made[:8]]))


def report(folder: Path, places: dict[str, Path], split: str = "") -> None:
    """Prints a table of trained tokenizers, by name, and draws their pictures into ``folder``."""
    net = features.efficientnet_lite0()
    print(f"{split or 'validation'} pictures:")
    print("| row | steps | PSNR, dB | SSIM | feature distance | sharpness | codes used |")
    print("|---|---|---|---|---|---|---|")
    shown, labels, found = [], [], {}
    for row, place in places.items():
        if not Path(pretrained.model_folder(str(place))).exists():
            continue
        made = measure(place, net, split)
        found[row] = made.numbers
        print(
            "| {row} | {steps} | {PSNR:.2f} | {SSIM:.3f} | {feature distance:.4f} | "
            "{sharpness:.2f} | {codes used:.0%} |".format(row=row, **made.numbers),
            flush=True,
        )
        if not shown:
            shown.append(made.shown[0])
            labels.append("pictures")
        shown.append(made.shown[1])
        labels.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    stem = "rows" + (f"_{split}" if split else "")
    files.write_text(folder / f"{stem}.json", json.dumps(found, indent=2))
    images.save(folder / f"{stem}.png", images.grid(np.stack(shown), labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--set", choices=tuple(SETS), default="emoji")
    parser.add_argument("--calibrate", action="store_true", help="time a step of every row")
    parser.add_argument("--row", action="append", choices=tuple(ROWS), help="all if unset")
    parser.add_argument("--minutes", type=float, default=6.0, help="of every row")
    parser.add_argument("--report", action="store_true", help="measure and draw what is trained")
    parser.add_argument("--trained", nargs="+", type=Path, help="workdirs to measure and draw")
    chosen = parser.parse_args()
    if chosen.calibrate:
        found = step_seconds(chosen.set)
        print(json.dumps(found, indent=2))
        (chosen.workdir / chosen.set).mkdir(parents=True, exist_ok=True)
        files.write_json(chosen.workdir / chosen.set / "calibration.json", found)
    elif chosen.trained:
        for split in ("", "train"):
            report(chosen.workdir, {place.name: place for place in chosen.trained}, split)
    elif chosen.report:
        rows = {row: folder_of(chosen.workdir, chosen.set, row) for row in ROWS}
        report(chosen.workdir / chosen.set, rows)
    else:
        for row in chosen.row or ROWS:
            train(chosen.workdir, chosen.set, row, chosen.minutes)


if __name__ == "__main__":
    main()
