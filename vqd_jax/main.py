"""Trains and samples VQ-Diffusion.

python -m vqd_jax.main --config=configs/emoji.py --workdir=DIR
python -m vqd_jax.main --mode=sample --workdir=DIR --prompt="red heart" --num_images=4
"""

import io
import logging as python_logging
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from vqd_jax.errors import UserError

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; fields as --config.a.b=1.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "train_autoencoder", "sample"], "What to do.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "sample: a text; may be given several times.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 4, "sample: pictures of every prompt.")
_SEED = flags.DEFINE_integer("seed", 0, "sample: decides the pictures.")
_NUM_STEPS = flags.DEFINE_integer(
    "num_steps", None, "sample: network calls; the config's if unset."
)
_GUIDANCE = flags.DEFINE_float("guidance_scale", None, "sample: 1 is none; the config's if unset.")
_TRUNCATION = flags.DEFINE_float("truncation", None, "sample: 1 is none; the config's if unset.")
_ANIMATE = flags.DEFINE_bool("animate", False, "sample: write the denoising as animations too.")
_OUTPUT = flags.DEFINE_string("output", None, "sample: folder of the pictures; WORKDIR/samples.")


def main(argv: list[str]) -> None:
    """Runs the task that the flags name."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; every option begins with --")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing: the folder of the run")
    # After the flags, so that --help and mistakes in them need not wait for JAX.
    from vqd_jax import config as config_lib
    from vqd_jax import tasks

    if _CONFIG.value is not None:
        config_lib.validate(_CONFIG.value)
    if _MODE.value == "sample":
        tasks.sample(
            _WORKDIR.value,
            _PROMPT.value,
            config=_CONFIG.value,
            output=_OUTPUT.value,
            animate=_ANIMATE.value,
            num_images=_NUM_IMAGES.value,
            seed=_SEED.value,
            num_steps=_NUM_STEPS.value,
            guidance_scale=_GUIDANCE.value,
            truncation=_TRUNCATION.value,
        )
        return
    if _CONFIG.value is None:
        raise UserError("--config is missing: a file such as configs/emoji.py")
    if _PROMPT.value:
        raise UserError("--prompt belongs to --mode=sample; --config.sampling.prompts to training")
    train = tasks.train if _MODE.value == "train" else tasks.train_autoencoder
    train(_CONFIG.value, _WORKDIR.value)


def _parse(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except (flags.Error, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        # ml_collections reports unknown and mistyped fields as all of these.
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        _fail(f"{text} (see --help, and vqd_jax/config.py for the fields)")


def _guarded(argv: list[str]) -> None:
    try:
        main(argv)
    except (UserError, OSError) as error:
        logging.debug("cause", exc_info=True)
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; run the same command to go on from the last checkpoint")


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


class _BesideBars(io.TextIOBase):
    """A stream to stderr that leaves progress bars whole."""

    def write(self, text):
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self):
        sys.stderr.flush()


def _quiet() -> None:
    """Shows our own messages only, beside progress bars: libraries report failures as errors."""
    logging.set_verbosity(logging.INFO)
    package = Path(__file__).parent
    ours = lambda record: Path(record.pathname).is_relative_to(package)  # noqa: E731
    handler = logging.get_absl_handler()
    handler.python_handler.setStream(_BesideBars())
    handler.addFilter(ours)
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))


if __name__ == "__main__":
    _quiet()
    app.run(_guarded, flags_parser=_parse)
