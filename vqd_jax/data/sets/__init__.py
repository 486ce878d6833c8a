"""The data sets: ``load`` gives one as a TFDS builder and prepares it where needed.

`emoji_text` and `shapes_text` are made by this project and need no files. Every other set is made
from the files that its publisher ships, which the user has; see ``file_set``. The names are
``options.DATA_SETS``; the set `my_set` is the class ``MySet`` of the module ``my_set``.

TensorFlow is never imported, and TFDS is imported when the first set is loaded.
"""

import hashlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from vqd_jax.data import bad_records as bad_records_lib
from vqd_jax.data.sets.tree import SOURCE
from vqd_jax.errors import UserError
from vqd_jax.options import DATA_SETS

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


def load(
    name: str,
    data_dir: str = "",
    prepared_dir: str = "",
    max_bad_share: float = 0.01,
    beam: str = "",
) -> "tfds.core.DatasetBuilder":
    """A data set that is ready to be read. It is prepared on first use.

    The preparation writes into a temporary folder and renames it at the end, so an interrupted one
    leaves nothing that passes for a data set. The next preparation removes the remains. If several
    processes ask for a set, one prepares it and the others wait.

    Records that cannot be used are left out of a set made from files. ``bad_records.jsonl`` beside
    the prepared data names them and the reasons; see ``bad_records``. The set remembers what it was
    made from: annotation files by their contents, images by their names.

    Args:
      name: one of ``options.DATA_SETS``.
      data_dir: of a set made from files, the directory that holds them. Of another set, the
        directory for prepared sets; '' is ``TFDS_DATA_DIR`` or ~/tensorflow_datasets.
      prepared_dir: where a set made from files is prepared; '' is ``data_dir``, or the default
        above if that cannot be written.
      max_bad_share: bad records that are tolerated, as a share of all records, 0 to 1.
      beam: if not empty, Apache Beam prepares the set with these pipeline options, such as
        '--runner=DirectRunner --direct_num_workers=8'.

    Returns:
      The prepared TFDS builder, stored as array_record.

    Raises:
      UserError: an unknown name; a data directory that does not exist, or holds another set or a
        damaged file; files that changed since the preparation; too many bad records.
      OSError: a file cannot be read, or the directory cannot be written or holds something else.
        The subclass is that of the cause (PermissionError, NotADirectoryError, ...).
    """
    if name not in DATA_SETS:
        raise UserError(f"unknown data set {name!r}; there are {', '.join(DATA_SETS)}")
    from vqd_jax.data.sets import prepare

    cls, config = builder_class(name), name.partition("/")[2]
    if not hasattr(cls, "facts"):
        return prepare.made_here(cls, config, data_dir)
    if not data_dir:
        raise UserError(
            f"{name} is made from its publisher's files: config.data.dir must name their directory"
        )
    return prepare.from_files(cls, config, data_dir, prepared_dir, max_bad_share, beam)


def builder_class(name: str) -> "type[tfds.core.DatasetBuilder]":
    """The class of the builder of a set in ``options.DATA_SETS``."""
    base = name.partition("/")[0]
    module = importlib.import_module(f"{__name__}.{base}")
    return getattr(module, "".join(word.capitalize() for word in base.split("_")))


def bad_records(builder: "tfds.core.DatasetBuilder") -> list[dict[str, str]]:
    """`file` and `reason` of every bad record that was met when a set was prepared."""
    found = bad_records_lib.read(Path(builder.data_path) / bad_records_lib.FILE)
    return [entry for entry in found if bad_records_lib.LEFT_OUT not in entry]


def left_out(builder: "tfds.core.DatasetBuilder") -> dict[str, str]:
    """{file: reason} of the files beside the records of a set that are no part of one."""
    found = bad_records_lib.read(Path(builder.data_path) / bad_records_lib.FILE)
    return {e["file"]: e["reason"] for e in found if bad_records_lib.LEFT_OUT in e}


def source_fingerprint(builder: "tfds.core.DatasetBuilder") -> str:
    """The name of a prepared set and a hash of what it was made from.

    Whatever is computed from a set and kept, such as codes, is kept with this.
    """
    path = Path(builder.data_path) / SOURCE
    if not path.exists():
        return builder.info.full_name
    return f"{builder.info.full_name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def evaluation_split(builder: "tfds.core.DatasetBuilder") -> str:
    """The split to evaluate on: 'validation', or else 'test'.

    Raises:
      UserError: the set has neither.
    """
    for split in ("validation", "test"):
        if split in builder.info.splits:
            return split
    raise UserError(
        f"{builder.info.full_name} has no images to validate on: give it a folder named "
        "'validation', or at least two images (of tars: two tars)"
    )
