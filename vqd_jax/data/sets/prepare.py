"""Prepares a data set once, opens it, and compares it with the files that it was made from."""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable

import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from google.protobuf.json_format import ParseError

from vqd_jax import files
from vqd_jax.data import bad_records
from vqd_jax.data.sets.file_set import FileSet
from vqd_jax.data.sets.image_text_folder import ImageTextFolder
from vqd_jax.data.sets.tree import SOURCE, ReadError, Tree
from vqd_jax.errors import UserError

# Another number is another way to make records of the same folder of one's own.
_READER = 2


def made_here(
    cls: type[tfds.core.DatasetBuilder], config: str, data_dir: str
) -> tfds.core.DatasetBuilder:
    """A set that needs no files, in ``data_dir``; see ``sets.load``."""
    home = epath.Path(data_dir).expanduser() if data_dir else _default_home()
    path = home.joinpath(*_parts(cls, config))
    _once(cls.name, path, lambda: _prepare(cls(data_dir=os.fspath(home), config=config or None)))
    return _open(path)


def from_files(
    cls: type[FileSet],
    config: str,
    data_dir: str,
    prepared_dir: str,
    max_bad_share: float,
    beam: str,
) -> tfds.core.DatasetBuilder:
    """A set made from the files in ``data_dir``; see ``sets.load``."""
    tree = Tree(data_dir, cls.ZIPS)
    parts = _parts(cls, config)
    try:
        facts = cls.facts(tree, config or _first_config(cls))
    except UserError as error:
        path = epath.Path(prepared_dir or data_dir).expanduser().joinpath(*parts)
        if not path.exists():
            raise
        # The prepared set was copied without the files that it was made from.
        logging.warning("%s is used as it is, not compared with its files: %s", path, error)
        return _open(path, (SOURCE,))
    builder_config = config or None
    if cls is ImageTextFolder:
        # A folder of one's own has no version: another content is another set, wherever it lies.
        key = json.dumps([_READER, facts]).encode()
        builder_config = tfds.core.BuilderConfig(name=hashlib.sha256(key).hexdigest()[:12])
        parts = _parts(cls, builder_config.name)
    home = _home(data_dir, prepared_dir, parts)
    path = home.joinpath(*parts)

    def prepare() -> None:
        builder = cls(
            tree=tree,
            max_bad_share=max_bad_share,
            beam=bool(beam),
            data_dir=os.fspath(home),
            config=builder_config,
        )
        rejected = path.parent / f"{path.name}.{bad_records.FILE}"
        rejected.unlink(missing_ok=True)
        try:
            _prepare(builder, beam)
        except UserError as error:
            if not (lines := builder.bad_records()):
                raise
            files.write_text(rejected, lines)
            raise UserError(f"{error}. {rejected} names them") from error

    _once(cls.name, path, prepare)
    builder = _open(path, (SOURCE,))
    _check_source(path, facts, builder.info.full_name, max_bad_share)
    return builder


def _first_config(cls: type[tfds.core.DatasetBuilder]) -> str:
    return next(iter(cls.builder_configs), "")


def _parts(cls: type[tfds.core.DatasetBuilder], config: str) -> list[str]:
    """Where a set lies in the directory for prepared sets: its name, config and version."""
    parts = (cls.name, config or _first_config(cls), str(cls.VERSION))
    return [part for part in parts if part]


def _default_home() -> epath.Path:
    return epath.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def _home(data_dir: str, prepared_dir: str, parts: list[str]) -> epath.Path:
    """Where a set made from files is prepared, or will be."""
    if prepared_dir:
        return epath.Path(prepared_dir).expanduser()
    beside = epath.Path(data_dir).expanduser()
    if beside.joinpath(*parts).exists() or os.access(beside, os.W_OK):
        return beside
    logging.info("%s cannot be written; prepared data goes to %s", beside, _default_home())
    return _default_home()


def _check_source(path: epath.Path, facts: dict, name: str, max_bad_share: float) -> None:
    """Refuses a prepared set whose files changed or that has too many bad records."""
    stored = files.read_json(path / SOURCE, f"remove {path} and run again")
    changes = files.differences(stored["facts"], facts)
    if changes:
        raise UserError(
            f"the files of {name} changed since it was prepared: {'; '.join(changes)}. "
            f"Put them back, or remove {path} to prepare it anew"
        )
    if bad := stored["bad"]:
        total, where = stored["good"] + bad, path / bad_records.FILE
        bad_records.require_share(bad, total, max_bad_share, f"{name}: ", f"{where} names them")
        logging.warning("%s: %d of %d records left out; see %s", name, bad, total, where)


def _prepare(builder: tfds.core.DatasetBuilder, beam: str = "") -> None:
    start = time.monotonic()
    logging.info("preparing %s in %s", builder.info.full_name, builder.data_path)
    download_config = tfds.download.DownloadConfig()
    if beam:
        download_config.beam_options = _beam_options(beam)
    bars = tfds.core.utils.tqdm_utils
    # TFDS prints to stdout and draws bars, which do not belong in a log file or a pipe.
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


def _once(name: str, path: epath.Path, prepare: Callable[[], None]) -> None:
    """Calls ``prepare`` if there is no ``path``. Of several processes, one calls it."""
    try:
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.exists():
                prepare()
    except ReadError:
        raise
    # A write that fails inside array_record is a RuntimeError.
    except (OSError, RuntimeError) as error:
        # A process that does not see this one's lock may have prepared the set meanwhile.
        if not path.exists():
            reason = getattr(error, "strerror", None) or error
            remedies = [files.advice(error), "choose another data_dir (or TFDS_DATA_DIR)"]
            # Errors that are not the system's say themselves what is wrong.
            of_system = isinstance(error, OSError) or remedies[0]
            told = f"; {' or '.join(filter(None, remedies))}" if of_system else ""
            message = f"cannot prepare {name}: {reason}{told}"
            if (number := getattr(error, "errno", None)) is None:
                raise OSError(f"{message}: {path}") from error
            # OSError picks the subclass by the number.
            raise OSError(number, message, os.fspath(path)) from error


@contextlib.contextmanager
def _alone(path: epath.Path):
    """Held by one process at a time; what killed ones left is removed first."""
    if "://" in os.fspath(path):
        # Object stores have no locks: two processes may both prepare, and one of them wins.
        yield
        return
    with files.lock(path.parent / f".{path.name}.lock"):
        for remains in path.parent.glob(f"incomplete.*_{path.name}"):
            shutil.rmtree(remains, ignore_errors=True)
        yield


def _open(path: epath.Path, needed: tuple[str, ...] = ()) -> tfds.core.DatasetBuilder:
    # TFDS says in many ways that a directory without its information is no data set.
    for name in ("dataset_info.json", *needed):
        if not (path / name).exists():
            raise FileNotFoundError(
                f"{path} exists but holds no prepared data set (no {name}); remove that directory "
                "and run again"
            )
    try:
        return tfds.builder_from_directory(path)
    except (OSError, ParseError) as error:
        raise OSError(f"{path} is damaged ({error}); remove it and run again") from error
