"""A model to hand around: a folder with ``config.json`` and its parameters as safetensors.

Parameters are a nested dict; a tensor's name is its path, joined by dots. More than 5 GB are spread
over files with an index, in the layout that Hugging Face uses. Reading executes nothing.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vqd_jax.errors import UserError
from vqd_jax.interop import tensors

MAX_SHARD_BYTES = 5 * 10**9
STORED_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def flatten(params: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """{'encoder.conv_in.kernel': array, ...} of a nested dict."""
    flat = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, name + ".")
        else:
            flat[name] = np.asarray(value, order="C")
    return flat


# What a model folder holds, ours or that of diffusers.
_MODEL_FILES = re.compile(
    r"config\.json|model_index\.json|model.*\.safetensors|model\.safetensors\.index\.json|tokenizer|"
    r"transformer|vqvae|text_encoder|scheduler|learned_classifier_free_sampling_embeddings"
)


def require_replaceable(target: Path) -> None:
    """Raises ``UserError`` unless the target is not there, empty, or a model folder and no more."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; give another target, a folder")
    names = sorted(child.name for child in target.iterdir())
    others = [name for name in names if not _MODEL_FILES.fullmatch(name)]
    if others or (names and not {"config.json", "model_index.json"} & set(names)):
        raise UserError(
            f"{target} holds other things than a model ({(others or names)[0]}), which would be "
            "lost; give another target"
        )


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A scratch folder beside ``target`` that becomes it at the end, or vanishes on an error.

    Raises:
      UserError: see ``require_replaceable``.
      OSError: it cannot be written.
    """
    # An absolute path, so that "." and ".." have a name and a parent.
    target = Path(os.path.abspath(target))
    require_replaceable(target)
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    except OSError as error:
        # A full disk, for one, comes without a name.
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"{target} could not be written: {error}") from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def save(
    directory: str | Path,
    config: dict,
    params: Any,
    *,
    dtype: str = "float32",
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes the folder; it appears complete or not at all.

    Args:
      directory: must not exist, or be a model folder, which is replaced.
      config: JSON-able description of the model.
      params: nested dict of arrays.
      dtype: in which floats are stored, a key of ``STORED_DTYPES``.
      files: further text files, {name: text}.
    """
    with appearing(Path(directory)) as scratch:
        write_shards(scratch, "model", flatten(params), dtype=dtype)
        text = json.dumps(config, indent=2) + "\n"
        for name, content in {"config.json": text, **(files or {})}.items():
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_text(content, encoding="utf-8")


def write_shards(
    directory: Path,
    stem: str,
    arrays: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    max_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes ``stem.safetensors``, or several files of at most ``max_bytes`` and their index."""
    stored = {
        name: np.dtype(STORED_DTYPES[dtype]) if _is_float(array) else array.dtype
        for name, array in arrays.items()
    }
    sizes = {name: array.size * stored[name].itemsize for name, array in arrays.items()}
    shards, size = [[]], 0
    for name in sorted(arrays):
        if shards[-1] and size + sizes[name] > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += sizes[name]
    index = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}.safetensors"
        if len(shards) > 1:
            file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors.write_safetensors(directory / file, {n: arrays[n] for n in names}, stored)
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_size": sum(sizes.values())}
        text = json.dumps({"metadata": metadata, "weight_map": index}, indent=2)
        (directory / f"{stem}.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind not in "iub"


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
      UserError: it is not there, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is not a model folder: it has no {path.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def load_config(directory: str | Path) -> dict:
    """The description in ``directory/config.json``.

    Raises:
      UserError: there is no such folder, or the file cannot be read.
    """
    return read_json(Path(directory) / "config.json")


def read_shards(directory: Path, stem: str) -> dict[str, tensors.Tensor]:
    """Tensors of ``stem.safetensors`` or of the files that its index names; values stay on disk.

    Raises:
      UserError: a file is missing, cut short or of another format, or the index names a file
        outside the folder.
    """
    index = directory / f"{stem}.safetensors.index.json"
    if not index.exists():
        if not (directory / f"{stem}.safetensors").exists():
            raise UserError(f"{directory} is not a model folder: it has no {stem}.safetensors")
        return tensors.read_safetensors(directory / f"{stem}.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    found = {}
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file:
            raise UserError(f"{index} names {file!r}: a path that leads out of the folder")
        found |= tensors.read_safetensors(directory / file)
    return found


def load_params(
    directory: str | Path,
    abstract_params: Any,
    part: str = "",
    place: Callable[[np.ndarray], Any] = lambda array: array,
) -> Any:
    """The parameters of a model folder, as a nested dict like ``abstract_params``.

    Args:
      directory: the model folder.
      abstract_params: nested dict of leaves with ``shape`` and ``dtype``.
      part: the part of the model that ``abstract_params`` is ("autoencoder"), which may be a single
        array; the tensors of the others are left alone.
      place: called with every array as soon as it is read; its results are returned instead.
        ``jax.device_put`` puts them on the device one by one, so that none is held twice for long.

    Raises:
      UserError: a file is missing or damaged, or a tensor is missing, left over, of another
        shape, or not finite; the message names it.
    """
    directory = Path(directory)
    flat = read_shards(directory, "model")
    if part:
        flat = {name: tensor for name, tensor in flat.items() if name.split(".")[0] == part}
        abstract_params = {part: abstract_params}
    params = _take(abstract_params, flat, directory, "", place)
    if flat:
        raise UserError(f"{directory} has a tensor that the model lacks: {sorted(flat)[0]}")
    return params[part] if part else params


def _take(
    abstract: Any, flat: dict[str, tensors.Tensor], path: Path, prefix: str, place: Callable
) -> Any:
    params = {}
    for key, value in abstract.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            params[key] = _take(value, flat, path, name + ".", place)
            continue
        if name not in flat:
            raise UserError(f"{path} lacks the tensor {name}")
        tensor = flat.pop(name)
        if tensor.shape != tuple(value.shape):
            raise UserError(f"{path}: {name} is {tensor.shape}, the config asks for {value.shape}")
        array = tensor.read(value.dtype)
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} has values that are not finite")
        params[key] = place(array)
    return params
