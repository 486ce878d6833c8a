"""The data sets, as TFDS builders. `load` prepares one where needed; TensorFlow is not imported."""

import contextlib
import os
import sys
import time

import tensorflow_datasets as tfds
from absl import logging
from google.protobuf.json_format import ParseError

from vqd_jax.data.builders.emoji_text import EmojiText
from vqd_jax.data.builders.shapes_text import ShapesText
from vqd_jax.errors import UserError

_BUILDERS = {"emoji_text": EmojiText, "shapes_text": ShapesText}


def _create(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    base, _, config = name.partition("/")
    names = [
        *_BUILDERS,
        *(f"{n}/{c}" for n, b in _BUILDERS.items() for c in b.builder_configs),
    ]
    if name not in names:
        raise UserError(f"unknown data set {name!r}; there are {', '.join(names)}")
    return _BUILDERS[base](data_dir=data_dir or None, config=config or None)


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    start = time.monotonic()
    logging.info("preparing %s in %s", builder.info.full_name, builder.data_path)
    bars = tfds.core.utils.tqdm_utils
    # TFDS prints to stdout and draws bars; a log file or a pipe wants neither.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        bars.display_progress_bar(sys.stderr.isatty())
        try:
            builder.download_and_prepare(file_format="array_record")
        finally:
            bars.display_progress_bar(True)
    logging.info("prepared %s in %.1f s", builder.info.full_name, time.monotonic() - start)


def load(name: str, data_dir: str = "") -> tfds.core.DatasetBuilder:
    """Gives a data set ready to be read, preparing it on first use.

    Preparation writes to a temporary directory beside the final one and renames it at the end, so
    an interrupted run leaves nothing that passes for a data set, and of two processes that prepare
    at once one wins and the other uses its result.

    Args:
      name: 'emoji_text', 'shapes_text' (32 pixels) or 'shapes_text/64px'.
      data_dir: where data sets live; '' means `TFDS_DATA_DIR`, or else ~/tensorflow_datasets.

    Returns:
      The prepared TFDS builder, stored as array_record.

    Raises:
      UserError: an unknown name.
      OSError: the directory cannot be written or holds something else. The subclass is the one of
        the cause (PermissionError, NotADirectoryError, FileNotFoundError, ...).
    """
    builder = _create(name, data_dir)
    path = builder.data_path
    try:
        if not path.exists():
            _prepare(builder)
    # A write that fails inside array_record is a RuntimeError.
    except (OSError, RuntimeError) as error:
        if not path.exists():
            reason = getattr(error, "strerror", None) or error
            message = (
                f"cannot prepare {name}: {reason}; make the directory writable, make room, or "
                "choose another data_dir (or TFDS_DATA_DIR)"
            )
            number = getattr(error, "errno", None)
            if number is None:
                raise OSError(f"{message}: {path}") from error
            # OSError picks the subclass by the number.
            raise OSError(number, message, str(path)) from error
        logging.info("%s was prepared by another process meanwhile", name)
    try:
        builder = _create(name, data_dir)
    except (OSError, ParseError) as error:
        raise OSError(f"{path} is damaged ({error}); remove it and run again") from error
    if not builder.info.splits:
        raise FileNotFoundError(
            f"{path} exists but holds no prepared data set (no dataset_info.json); "
            "remove that directory and run again"
        )
    return builder
