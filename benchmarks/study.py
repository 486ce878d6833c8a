"""What the studies on shapes share: one tokenizer, files that are not made again, and tables.

A study is a command that may be stopped at any time. Whatever it finishes, a training or a
measurement, is a JSON file in its folder, and the next start goes on behind it.
"""

import argparse
import ast
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import shapes
from vqd_jax import config as config_lib
from vqd_jax import files, modes
from vqd_jax.errors import UserError
from vqd_jax.training import stage_two


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of every study."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--workdir", type=Path, required=True, help="folder of the study")
    made.add_argument(
        "--tokenizer", type=Path, help="a run of configs/shapes.py, whose tokenizer and codes are "
        "taken; WORKDIR/tokenizer, made first, if unset",
    )  # fmt: skip
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--pictures", type=int, default=200, help="captions of each measurement")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="changes a field of configs/shapes.py, as in --set training.num_steps=500",
    )  # fmt: skip
    made.add_argument("--report", action="store_true", help="print what is there; measure nothing")
    return made


def begin(flags: argparse.Namespace) -> ConfigDict:
    """The config that all runs of the study start from; makes the tokenizer and its codes.

    Raises:
      UserError: the folder has the files of a study with other settings.
    """
    config = shapes.get_config()
    # What a restart needs; --set may ask for more.
    config.training.keep_checkpoints = 1
    for change in flags.set:
        key, _, value = change.partition("=")
        config.update_from_flattened_dict({key: ast.literal_eval(value)})
    tokenizer = flags.tokenizer or flags.workdir / "tokenizer"
    decisive = config_lib.flatten(config) | {"pictures": flags.pictures, "tokenizer": tokenizer}
    decisive, defaults = (
        json.loads(json.dumps(fields, default=str))
        for fields in (decisive, config_lib.flatten(config_lib.default_config()))
    )
    kept = flags.workdir / "study.json"
    if kept.exists():
        # A study may have begun before a field was there, and before products were rounded.
        before = defaults | {"denoiser.product_dtype": "float32"}
        changed = files.differences(before | files.read_json(kept, "remove it"), decisive)
        if changed:
            raise UserError(
                f"{flags.workdir} has a study with other settings: {'; '.join(changed)}"
            )
    files.write_json(kept, decisive)
    if not (tokenizer / "codes" / "validation" / "manifest.json").exists():
        stage_two.train_autoencoder(config, str(tokenizer))
        modes.encode(config, str(tokenizer))
    config.autoencoder.path = str(tokenizer)
    config.data.codes = str(tokenizer / "codes")
    # A run is measured when it is finished.
    config.training.eval_every = config.training.num_steps
    return config


def once(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``compute`` returned, now or at an earlier start, and the ``seconds`` that it took.

    Of a computation that was stopped and began again, they are those of the last start.
    """
    if not path.exists():
        start = time.perf_counter()
        found = compute()
        files.write_json(path, found | {"seconds": time.perf_counter() - start})
    return files.read_json(path, "remove it")


def print_cost(workdir: Path, *kinds: str) -> None:
    """Prints how long that took which ``once`` has kept in files whose names begin with a kind."""
    for kind in kinds:
        found = [files.read_json(path, "remove it") for path in workdir.glob(f"*/{kind}*.json")]
        seconds = [x["seconds"] for x in found if "seconds" in x]
        print(f"{len(seconds)} of {kind or 'all'} took {sum(seconds) / 60:.1f} minutes")


def metrics(workdir: Path) -> dict[str, float]:
    """The last value of everything that a run has logged."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return functools.reduce(dict.__or__, map(json.loads, lines))


def over_seeds(values: Sequence[float], percent: bool = False) -> str:
    """Mean and standard error of a figure over the seeds; an en dash where there is none.

    One seed has no error, so its figure stands alone.
    """
    if not len(values):
        return "–"
    scaled, digits = np.asarray(values) * (100 if percent else 1), 1 if percent else 3
    if len(scaled) == 1:
        return f"{scaled[0]:.{digits}f}"
    error = scaled.std(ddof=1) / np.sqrt(len(scaled))
    return f"{scaled.mean():.{digits}f} ± {error:.{digits}f}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    print(f"\n{title}\n\n" + "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines))
