"""What steps, truncation and guidance do to pictures of held-out captions of shapes.

python benchmarks/sampling.py --workdir=DIR --models RUN RUN RUN

RUN is the workdir of a run of configs/shapes.py, or of a model of mask_and_replace.py; several are
the seeds of one recipe. One setting is changed at a time, from 25 ordinary steps, truncation 0.9
and no guidance. ``right`` is the share of pictures in which everything is right, of captions whose
pair of colour and shape no training picture has. The error is the standard error over the models or
over all pictures, whichever is larger. What is measured of a model is a file in DIR and is not
measured again.
"""

import argparse
import functools
from pathlib import Path

import attribute_accuracy
import numpy as np
import study

from vqd_jax import files
from vqd_jax.interop import pretrained
from vqd_jax.pipeline import VQDiffusion

BASE = {"rule": "ordinary", "num_steps": 25, "truncation": 0.9, "guidance_scale": 1.0}
ROWS = {
    "25 steps, truncation 0.9, no guidance": {},
    "10 steps": {"num_steps": 10},
    "50 steps": {"num_steps": 50},
    "100 steps": {"num_steps": 100},
    "published fast, speed 4 (26 calls)": {"published_fast": 4},
    "published fast, speed 10 (11 calls)": {"published_fast": 10},
    "truncation 1 (none)": {"truncation": 1.0},
    "truncation 0.86": {"truncation": 0.86},
    "truncation 0.8": {"truncation": 0.8},
    "truncation 0.7": {"truncation": 0.7},
    "truncation 0.5": {"truncation": 0.5},
    "guidance 1.5": {"guidance_scale": 1.5},
    "guidance 2": {"guidance_scale": 2.0},
    "guidance 3": {"guidance_scale": 3.0},
    "guidance 5": {"guidance_scale": 5.0},
    "guidance 3, rising from 1": {"guidance_scale": 3.0, "guidance_ramp": True},
    "guidance 3, first half of the steps": {"guidance_scale": 3.0, "guidance_interval": (0, 0.5)},
    "guidance 3, second half of the steps": {"guidance_scale": 3.0, "guidance_interval": (0.5, 1)},
}


def options_of(row: str) -> dict:
    """What a row asks of ``VQDiffusion.generate``."""
    options = BASE | ROWS[row]
    if "published_fast" in options:
        # It has a rule and times of its own.
        del options["rule"], options["num_steps"]
    return options


def measure(model: VQDiffusion, row: str, count: int) -> dict[str, list[float]]:
    """Whether everything is right, 0 or 1, in a picture of each of ``count`` captions."""
    prompts, scenes = attribute_accuracy.asked(count)
    pixels = model.generate(prompts, batch_size=50, **options_of(row)).pixels[:, 0]
    return {"right": attribute_accuracy.shares(pixels, scenes)["all"].tolist()}


def percent(values: np.ndarray, sign: str = "") -> str:
    """The mean of values [models, pictures] and its standard error, in percent.

    Two or three models may agree by chance, so the error over all pictures is the least it can be.
    """
    samples = [values.ravel()] + [values.mean(axis=1)] * (len(values) > 1)
    error = max(x.std(ddof=1) / np.sqrt(len(x)) for x in samples)
    return f"{100 * values.mean():{sign}.1f} ± {100 * error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the study")
    parser.add_argument("--models", nargs="+", required=True, help="workdirs, one for each seed")
    parser.add_argument("--pictures", type=int, default=200, help="captions")
    parser.add_argument(
        "--row", action="append", choices=tuple(ROWS), help="beside the first; all if unset"
    )
    chosen = parser.parse_args()
    found = [pretrained.load_run(directory) for directory in chosen.models]
    shared, lines, right = VQDiffusion(*found[0]), [], {}
    first, *others = ROWS
    for name in [first, *(chosen.row or others)]:
        measured = []
        for run in found:
            model = shared.with_params(run.params)
            folder = f"{files.fingerprint(run.params)[:16]}_{chosen.pictures}"
            compute = functools.partial(measure, model, name, chosen.pictures)
            measured.append(study.once(chosen.workdir / folder / f"{name}.json", compute)["right"])
        right[name] = np.array(measured)
        apart = right[name] - next(iter(right.values()))
        lines.append([name, percent(right[name]), percent(apart, "+") if ROWS[name] else ""])
        print(*lines[-1], sep=" | ", flush=True)
    title = f"Right (%), {len(found)} models, {chosen.pictures} captions"
    study.print_table(title, ["setting", "right", "difference to the first row"], lines)
    study.print_cost(chosen.workdir, "")


if __name__ == "__main__":
    main()
