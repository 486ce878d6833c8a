"""A model to hand around: a folder with ``config.json`` and its parameters as safetensors.

Parameters are a nested dict; a tensor's name is its path, joined by dots. More than 5 GB go into
several files with an index, in the layout that Hugging Face uses. Reading executes nothing.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from vqd_jax import files as file_lib
from vqd_jax.errors import UserError
from vqd_jax.interop import tensors, torch_file

MAX_SHARD_BYTES = 5 * 10**9
STORED_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# What a model folder holds, ours or that of diffusers.
_MODEL_FILES = re.compile(
    r"config\.json|model_index\.json|model.*\.safetensors|model\.safetensors\.index\.json|tokenizer|"
    r"transformer|vqvae|text_encoder|scheduler|learned_classifier_free_sampling_embeddings"
)


def require_replaceable(target: Path) -> None:
    """Raises ``UserError`` if the target holds anything else than a model."""
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
def appearing(target: str | Path) -> Iterator[Path]:
    """A scratch folder that becomes ``target`` at the end, or vanishes after an error.

    Raises:
      UserError: see ``require_replaceable``.
      OSError: it cannot be written.
    """
    require_replaceable(Path(target))
    try:
        with file_lib.appearing(target) as scratch:
            scratch.mkdir()
            yield scratch
    except OSError as error:
        # An error such as a full disk names no file.
        raise OSError(f"{target} could not be written: {error}") from error


def save(
    directory: str | Path,
    config: dict,
    params: Any,
    *,
    dtype: str = "float32",
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes a model folder, which appears complete or not at all.

    Args:
      directory: the target; a model folder there is replaced.
      config: description of the model, of JSON values.
      params: nested dict of arrays.
      dtype: of the stored floats, a key of ``STORED_DTYPES``.
      files: further text files, {name: text}.

    Raises:
      UserError: the target holds something else than a model.
      OSError: it cannot be written.
    """
    with appearing(directory) as scratch:
        arrays = {name: np.asarray(array) for name, array in file_lib.flatten(params).items()}
        write_shards(scratch, "model", arrays, dtype=dtype)
        file_lib.write_json(scratch / "config.json", config)
        for name, text in (files or {}).items():
            file_lib.write_text(scratch / name, text)


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
        name: array.dtype if array.dtype.kind in "iub" else np.dtype(STORED_DTYPES[dtype])
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
        file_lib.write_json(
            directory / f"{stem}.safetensors.index.json",
            {"metadata": metadata, "weight_map": index},
        )


def read_json(path: Path) -> dict:
    """The JSON object in a file of a model folder.

    Raises:
      UserError: it is not there, cannot be read, or holds something else.
    """
    try:
        return file_lib.read_json(path, "take it from its source again")
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is not a model folder: it has no {path.name}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def load_config(directory: str | Path) -> dict:
    """The description in ``directory/config.json``.

    Raises:
      UserError: there is no such folder, or the file cannot be read.
    """
    return read_json(Path(directory) / "config.json")


def read_shards(directory: Path, stem: str) -> dict[str, tensors.Tensor]:
    """Tensors of ``stem.safetensors``, or of the files in its index; their values stay on disk.

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


def read_weights(directory: Path, stem: str, old: str) -> dict[str, tensors.Tensor]:
    """Tensors of ``stem.safetensors``, in one file or several, or else of the PyTorch file ``old``.

    Raises:
      UserError: there is neither, or a file cannot be read.
    """
    for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
        if (directory / name).exists():
            return read_shards(directory, stem)
    if not (directory / old).exists():
        others = sorted(p.name for p in directory.glob(f"{stem}.*.safetensors"))
        if others:
            # Such as the variant "fp16", whose values are those of the whole file, rounded.
            logging.info("%s has %s alone, which is taken", directory, others[0])
            return tensors.read_safetensors(directory / others[0])
        raise UserError(f"{directory} has neither {stem}.safetensors nor {old}")
    return torch_file.named_tensors(torch_file.load(directory / old))


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
      part: the part of the model that is read ("autoencoder"); then ``abstract_params`` is that of
        the part, which may be a single array.
      place: called with every array as soon as it is read; its results are returned instead.
        ``jax.device_put`` puts them on the device one by one, so that only one is held twice.

    Raises:
      UserError: a file is missing or damaged, or a tensor is missing, left over, of another
        shape, or not finite; the message names it.
    """
    found = read_shards(Path(directory), "model")
    if part:
        found = {name: x for name, x in found.items() if name.split(".")[0] == part}
        abstract_params = {part: abstract_params}
    params = fit(found, abstract_params, directory, place)
    return params[part] if part else params


def fit(
    found: Mapping[str, Any],
    abstract_params: Any,
    source: str | Path,
    place: Callable[[np.ndarray], Any] = lambda array: array,
) -> Any:
    """Tensors by name as a nested dict like ``abstract_params``.

    Args:
      found: tensors of a file, or arrays.
      abstract_params, place: see ``load_params``.
      source: where they were found, for messages.

    Raises:
      UserError: see ``load_params``.
    """
    arrays, wanted = {}, file_lib.flatten(abstract_params)
    for name, leaf in wanted.items():
        if name not in found:
            raise UserError(f"{source} lacks the tensor {name}")
        tensor = found[name]
        if tuple(tensor.shape) != tuple(leaf.shape):
            raise UserError(f"{source}: {name} is {tensor.shape}, the config asks for {leaf.shape}")
        in_file = isinstance(tensor, tensors.Tensor)
        array = tensor.read(leaf.dtype) if in_file else np.asarray(tensor, leaf.dtype)
        if not np.isfinite(array).all():
            raise UserError(f"{source}: {name} has values that are not finite")
        arrays[name] = place(array)
    if left := found.keys() - wanted.keys():
        raise UserError(f"{source} has a tensor that the model lacks: {min(left)}")
    return file_lib.unflatten(arrays, abstract_params)
