"""What learns fastest: rows of one denoiser in equal time, some seeds each, on emoji or shapes.

python benchmarks/recipes.py --workdir=DIR --set=emoji --minutes=10 --seeds=3
python benchmarks/recipes.py --workdir=DIR --set=emoji --minutes=10 --seeds=3 --report

All rows share the tokenizer in DIR/SET/tokenizer, which is trained first, its codes, and for a seed
the order of the records. A row changes fields of the set's config and has as many steps as fit into
the minutes; --calibrate times them on a quiet machine. What is there is not done again. The report
has means and standard errors over the seeds: bits a token of training and validation pictures, and
what is right in pictures that are drawn: for emoji, the share of 100 captions of objects and of 100
of people whose true picture is the nearest of all (``emoji_retrieval``); for shapes, the attributes
of 100 captions whose pair of colour and shape no training picture has.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np
import study
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import emoji, shapes
from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.parallel import sharding
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import stage_two
from vqd_jax.training import task as task_lib

SETS = {"emoji": emoji, "shapes": shapes}
# Changes of the set's config, by dotted keys. "as configured" is the config itself.
ROWS = {
    "as configured": {},
    "all pictures equally often": {"data.balance_by": ""},
    "all concepts equally often": {"data.balance_power": 0.0},
    "AdamW, half the rate": {"training.optimizer": "adamw", "training.learning_rate": 2e-3},
    "half the learning rate": {"training.learning_rate": 2e-3},
    "twice the learning rate": {"training.learning_rate": 8e-3},
    "auxiliary weight 5e-4": {"training.auxiliary_weight": 5e-4},
    "auxiliary weight 0.1": {"training.auxiliary_weight": 0.1},
    "averages of 0.998": {"training.ema_decay": 0.998},
    "batches of 16": {"training.batch_size": 16},
    "batches of 64": {"training.batch_size": 64},
    "6 layers of 128": {"denoiser.num_layers": 6, "denoiser.width": 128},
    "3 layers of 64": {"denoiser.num_layers": 3, "denoiser.width": 64},
}
# Rows that have a meaning on one set alone.
_ONLY = {"all pictures equally often": "emoji", "all concepts equally often": "emoji"}


def rows_of(name: str) -> list[str]:
    """The rows of a set."""
    return [row for row in ROWS if _ONLY.get(row, name) == name]


def row_config(name: str, row: str, seed: int, num_steps: int, tokenizer: Path) -> ConfigDict:
    """The config of a row."""
    config = SETS[name].get_config()
    config.update_from_flattened_dict(ROWS[row])
    config.seed = seed
    config.autoencoder.path = str(tokenizer)
    config.training.num_steps = num_steps
    config.training.eval_every = num_steps
    config.training.save_every = max(num_steps // 4, 1)
    # As they are timed.
    config.training.steps_per_call = 1
    config_lib.validate(config)
    return config


def step_seconds(name: str, chosen: list[str], repeats: int = 12) -> dict[str, float]:
    """Median seconds of a step of the rows, which take turns."""
    made = {}
    for row in chosen:
        config = row_config(name, row, 0, 1000, Path("unused"))
        mesh = sharding.make_mesh(config)
        task = stage_two.DenoiserTask(config)
        state = task_lib.init_state(task, mesh)
        shapes_of = stage_two.abstract_batch(config, mesh)
        batch = {key: np.zeros(x.shape, x.dtype) for key, x in shapes_of.items()}
        made[row] = [task_lib.jit_step(task, mesh), state, sharding.put_batch(batch, mesh), []]
    for _ in range(repeats + 1):
        for entry in made.values():
            start = time.perf_counter()
            entry[1], metrics = entry[0](entry[1], entry[2])
            jax.block_until_ready(metrics)
            entry[3].append(time.perf_counter() - start)
    return {row: float(np.median(entry[3][1:])) for row, entry in made.items()}


def train(place: Path, name: str, minutes: float, seeds: int, chosen: list[str]) -> None:
    """Trains the tokenizer and all rows, or what is left of them."""
    calibrated = files.read_json(place / "calibration.json", "run with --calibrate")
    tokenizer = place / "tokenizer"
    if not (tokenizer / "autoencoder" / "model" / "config.json").exists():
        stage_two.train_autoencoder(SETS[name].get_config(), str(tokenizer))
    for seed in range(seeds):
        for row in chosen:
            num_steps = round(60 * minutes / calibrated[row])
            config = row_config(name, row, seed, num_steps, tokenizer)
            stage_two.train(config, str(folder_of(place, row, seed)))


def folder_of(place: Path, row: str, seed: int) -> Path:
    """The workdir of a row."""
    return place / f"{row.replace(' ', '_')}-{seed}"


def drawn_right(name: str, model: VQDiffusion) -> dict[str, float]:
    """Shares of pictures that are what the caption asks for."""
    if name == "shapes":
        import attribute_accuracy

        return attribute_accuracy.of_model(model, 100)
    import emoji_retrieval

    found = emoji_retrieval.of_model(model, 100)
    return {name: float(nearest.mean()) for name, nearest in found.items()}


def report(place: Path, name: str, seeds: int, chosen: list[str]) -> None:
    """Prints the table of what is trained; what was measured of a run is kept in it."""
    found = {}
    for row in chosen:
        for seed in range(seeds):
            workdir = folder_of(place, row, seed)
            if not (workdir / "samples.png").exists():
                continue
            kept = workdir / "recipe.json"
            if not kept.exists():
                last = study.metrics(workdir)
                numbers = {
                    f"{split} bits": last[f"{split}/bits_per_token"]
                    for split in ("train", "validation")
                }
                model = VQDiffusion.from_workdir(str(workdir))
                files.write_json(kept, numbers | drawn_right(name, model))
            found.setdefault(row, []).append(files.read_json(kept, "remove it"))
    columns = list(next(iter(found.values()))[0]) if found else []
    print(f"| row | runs | {' | '.join(columns)} |")
    print("|" + "---|" * (2 + len(columns)))
    for row, runs in found.items():
        cells = [study.over_seeds([run[column] for run in runs]) for column in columns]
        print(f"| {row} | {len(runs)} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--set", choices=tuple(SETS), default="emoji")
    parser.add_argument("--calibrate", action="store_true", help="time a step of the rows")
    parser.add_argument("--row", action="append", choices=tuple(ROWS), help="all if unset")
    parser.add_argument("--minutes", type=float, default=10.0, help="of every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="measure what is trained")
    chosen = parser.parse_args()
    place, rows = chosen.workdir / chosen.set, chosen.row or rows_of(chosen.set)
    if chosen.calibrate:
        place.mkdir(parents=True, exist_ok=True)
        seconds = step_seconds(chosen.set, rows)
        files.write_json(place / "calibration.json", seconds)
        for row, second in seconds.items():
            print(f"{row}: {second:.3f} s a step")
    elif chosen.report:
        report(place, chosen.set, chosen.seeds, rows)
    else:
        train(place, chosen.set, chosen.minutes, chosen.seeds, rows)


if __name__ == "__main__":
    main()
