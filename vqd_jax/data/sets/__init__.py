"""The data sets, as TFDS builders. `load` prepares one where needed; TensorFlow is not imported.

Sets that the project makes itself (`emoji_text`, `shapes_text`) need nothing. The others are made
from the files as their publishers ship them, which the user has; see `file_set`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from google.protobuf.json_format import ParseError

from vqd_jax.data.sets import file_set
from vqd_jax.data.sets.coco_text import CocoText
from vqd_jax.data.sets.cub_text import CubText
from vqd_jax.data.sets.emoji_text import EmojiText
from vqd_jax.data.sets.ffhq_images import FfhqImages
from vqd_jax.data.sets.image_text_folder import ImageTextFolder
from vqd_jax.data.sets.imagenet_class import ImagenetClass
from vqd_jax.data.sets.oxford102_text import Oxford102Text
from vqd_jax.data.sets.shapes_text import ShapesText
from vqd_jax.data.sets.tree import Tree
from vqd_jax.errors import UserError

_GENERATED = {"emoji_text": EmojiText, "shapes_text": ShapesText}
_FROM_FILES = {
    "coco_text": CocoText,
    "cub_text": CubText,
    "oxford102_text": Oxford102Text,
    "imagenet_class": ImagenetClass,
    "ffhq_images": FfhqImages,
    "image_text_folder": ImageTextFolder,
}
_BUILDERS = _GENERATED | _FROM_FILES
# Every name that `load` knows.
NAMES = (
    *_BUILDERS,
    *(f"{name}/{config}" for name, b in _BUILDERS.items() for config in b.builder_configs),
)


def load(
    name: str,
    data_dir: str = "",
    prepared_dir: str = "",
    max_bad_share: float = 0.01,
    beam: str = "",
) -> tfds.core.DatasetBuilder:
    """Gives a data set ready to be read, preparing it on first use.

    Preparation writes to a temporary directory beside the final one and renames it at the end, so
    an interrupted run leaves nothing that passes for a data set; the next one clears its remains.
    Of several processes one prepares while the others wait.

    A set made from files leaves out records that cannot be used and names them, with the reason, in
    ``bad_records.jsonl`` beside the prepared data (see ``bad_records``). It remembers what it was
    made from: annotation files by their contents, images by their names.

    Args:
      name: one of ``NAMES``.
      data_dir: for a set made from files, the directory that holds them; else where prepared sets
        live, '' being ``TFDS_DATA_DIR`` or ~/tensorflow_datasets.
      prepared_dir: where a set made from files is prepared; '' is ``data_dir``, or what '' means
        above if that cannot be written.
      max_bad_share: bad records tolerated, as a share of all records, 0 to 1.
      beam: if not empty, Apache Beam prepares the set, with these pipeline options, such as
        '--runner=DirectRunner --direct_num_workers=8'.

    Returns:
      The prepared TFDS builder, stored as array_record.

    Raises:
      UserError: an unknown name; a data directory that does not exist, holds another set or a
        damaged file; files that changed since preparation; too many bad records.
      OSError: the directory cannot be written or holds something else. The subclass is the one of
        the cause (PermissionError, NotADirectoryError, FileNotFoundError, ...).
    """
    base, _, config = name.partition("/")
    if name not in NAMES:
        raise UserError(f"unknown data set {name!r}; there are {', '.join(NAMES)}")
    if base in _GENERATED:
        builder = _create(name, data_dir)
        _prepare_once(name, builder.data_path, lambda: _prepare(builder))
        return _open(builder.data_path, lambda: _create(name, data_dir))
    if not data_dir:
        raise UserError(
            f"{name} is made from its publisher's files: config.data.dir must name their directory"
        )
    return _load_from_files(base, config, data_dir, prepared_dir, max_bad_share, beam)


def bad_records(builder: tfds.core.DatasetBuilder) -> list[dict[str, str]]:
    """`file` and `reason` of everything that was left out when a set was prepared."""
    path = Path(builder.data_path) / file_set.BAD_RECORDS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def source_fingerprint(builder: tfds.core.DatasetBuilder) -> str:
    """Names a prepared set and, for one made from files, what those held: other contents, other
    fingerprint. For whatever is computed from the set and kept."""
    path = Path(builder.data_path) / file_set.SOURCE
    if not path.exists():
        return builder.info.full_name
    return f"{builder.info.full_name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def evaluation_split(builder: tfds.core.DatasetBuilder) -> str:
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


def _load_from_files(
    base: str, config: str, data_dir: str, prepared_dir: str, max_bad_share: float, beam: str
) -> tfds.core.DatasetBuilder:
    cls = _FROM_FILES[base]
    configs = list(cls.builder_configs)
    config = config or (configs[0] if configs else "")
    tree = Tree(data_dir, cls.ZIPS)
    try:
        facts = cls.facts(tree, config)
    except UserError as error:
        path = Path(prepared_dir or data_dir).expanduser() / base / config / str(cls.VERSION)
        if not path.exists():
            raise
        # A prepared set that was copied without the files it was made from.
        logging.warning("%s is used as it is, not compared with its files: %s", path, error)
        return _open(path, lambda: tfds.builder_from_directory(path))
    builder_config = config or None
    if cls is ImageTextFolder:
        # A folder of one's own has no version: another folder or content is another set.
        key = json.dumps([str(tree.root), facts]).encode()
        builder_config = tfds.core.BuilderConfig(name=hashlib.sha256(key).hexdigest()[:12])
    parts = (base, getattr(builder_config, "name", config), str(cls.VERSION))
    home = epath.Path(_home(data_dir, prepared_dir, Path(*parts)))
    path = home.joinpath(*parts)

    def prepare() -> None:
        builder = cls(
            tree=tree,
            max_bad_share=max_bad_share,
            beam=bool(beam),
            data_dir=str(home),
            config=builder_config,
        )
        rejected = path.parent / f"{path.name}.{file_set.BAD_RECORDS}"
        rejected.unlink(missing_ok=True)
        try:
            _prepare(builder, beam)
        except UserError as error:
            if not (lines := builder.bad_records()):
                raise
            rejected.write_text(lines)
            raise UserError(f"{error}. {rejected} names them") from error

    _prepare_once(base, path, prepare)
    builder = _open(path, lambda: tfds.builder_from_directory(path))
    _check_source(path, facts, builder.info.full_name, max_bad_share)
    return builder


def _home(data_dir: str, prepared_dir: str, parts: Path) -> Path:
    """Where a prepared set lives, or will live."""
    if prepared_dir:
        return Path(prepared_dir).expanduser()
    beside = Path(data_dir).expanduser()
    if (beside / parts).exists() or os.access(beside, os.W_OK):
        return beside
    default = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    logging.info("%s cannot be written; prepared data goes to %s", beside, default)
    return default


def _check_source(path: Path, facts: dict, name: str, max_bad_share: float) -> None:
    try:
        stored = json.loads((path / file_set.SOURCE).read_text(encoding="utf-8"))
        old, good, bad = stored["facts"], stored["good"], stored["bad"]
    except (OSError, ValueError, KeyError) as error:
        raise OSError(f"{path} is damaged ({error}); remove it and run again") from error
    changes = [
        f"{key} ({old.get(key, 'not there')} then, {facts.get(key, 'not there')} now)"
        for key in sorted(old.keys() | facts.keys())
        if old.get(key) != facts.get(key)
    ]
    if changes:
        raise UserError(
            f"the files of {name} changed since it was prepared: {'; '.join(changes)}. "
            f"Put them back, or remove {path} to prepare it anew"
        )
    if bad:
        where = path / file_set.BAD_RECORDS
        file_set.check_share(name, bad, bad + good, max_bad_share, f" ({where})")
        logging.warning("%s: %d of %d records left out; see %s", name, bad, bad + good, where)


def _create(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    base, _, config = name.partition("/")
    return _BUILDERS[base](data_dir=data_dir or None, config=config or None)


def _prepare(builder: tfds.core.DatasetBuilder, beam: str = "") -> None:
    start = time.monotonic()
    logging.info("preparing %s in %s", builder.info.full_name, builder.data_path)
    download_config = tfds.download.DownloadConfig()
    if beam:
        download_config.beam_options = _beam_options(beam)
    bars = tfds.core.utils.tqdm_utils
    # TFDS prints to stdout and draws bars; a log file or a pipe wants neither.
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        # TFDS wants a directory for downloads, and would leave an empty one beside the set.
        tempfile.TemporaryDirectory() as downloads,
    ):
        bars.display_progress_bar(sys.stderr.isatty())
        try:
            builder.download_and_prepare(
                download_dir=downloads,
                file_format="array_record",
                download_config=download_config,
            )
        finally:
            bars.display_progress_bar(True)
    logging.info("prepared %s in %.1f s", builder.info.full_name, time.monotonic() - start)


def _beam_options(options: str):
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "config.data.beam asks for Apache Beam: pip install 'vqd_jax[beam]'"
        ) from error
    return PipelineOptions(shlex.split(options))


def _prepare_once(name: str, path: epath.Path, prepare: Callable[[], None]) -> None:
    try:
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if path.exists():
                logging.info("%s was prepared by another process meanwhile", name)
                return
            prepare()
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


@contextlib.contextmanager
def _lock(path: epath.Path) -> Iterator[None]:
    """Held by one process at a time; a killed one gives it up, and its remains are removed."""
    if "://" in os.fspath(path):
        # Object stores have no locks; there two processes may both prepare, and one wins.
        yield
        return
    with open(path.parent / f".{path.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for remains in path.parent.glob(f"incomplete.*_{path.name}"):
            shutil.rmtree(remains, ignore_errors=True)
        yield


def _open(
    path: epath.Path, create: Callable[[], tfds.core.DatasetBuilder]
) -> tfds.core.DatasetBuilder:
    # A directory without its information is no data set, and TFDS says so in many ways.
    if not (path / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"{path} exists but holds no prepared data set (no dataset_info.json); "
            "remove that directory and run again"
        )
    try:
        return create()
    except (OSError, ParseError) as error:
        raise OSError(f"{path} is damaged ({error}); remove it and run again") from error
