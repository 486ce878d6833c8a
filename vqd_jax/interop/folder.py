"""A model to hand around: a folder with ``config.json`` and ``model.safetensors``.

Parameters are a nested dict; a tensor's name is its path, joined by dots. Reading executes nothing.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vqd_jax.errors import UserError


def flatten(params: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """{'encoder.conv_in.kernel': array, ...} of a nested dict."""
    flat = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, name + ".")
        else:
            flat[name] = np.ascontiguousarray(value)
    return flat


def save(directory: str, config: dict, params: Any) -> None:
    """Writes the folder; it appears complete or not at all.

    Args:
      directory: must not exist, or be a model folder, which is replaced.
      config: JSON-able description of the model.
      params: nested dict of arrays.
    """
    target = Path(directory)
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        save_file(flatten(params), scratch / "model.safetensors")
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    except SafetensorError as error:
        # A full disk, for one, is reported as this and not as an OSError.
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"{target} could not be written: {error}") from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def load_config(directory: str) -> dict:
    """The description in ``directory/config.json``.

    Raises:
      UserError: there is no such folder, or the file cannot be read.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{directory} is not a model folder: it has no config.json") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return config


def load_params(directory: str, abstract_params: Any) -> Any:
    """The parameters in ``directory/model.safetensors``, as a nested dict like ``abstract_params``.

    Raises:
      UserError: the file is missing or damaged, or a tensor is missing, left over, of another
        shape, or not finite; the message names it.
    """
    path = Path(directory) / "model.safetensors"
    try:
        flat = load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{directory} is not a model folder: it has no {path.name}") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    params = _take(abstract_params, flat, path)
    if flat:
        raise UserError(f"{path} has a tensor that the model lacks: {sorted(flat)[0]}")
    return params


def _take(abstract: Any, flat: dict[str, np.ndarray], path: Path, prefix: str = "") -> Any:
    params = {}
    for key, value in abstract.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            params[key] = _take(value, flat, path, name + ".")
            continue
        if name not in flat:
            raise UserError(f"{path} lacks the tensor {name}")
        array = flat.pop(name)
        if array.shape != value.shape:
            raise UserError(f"{path}: {name} is {array.shape}, the config asks for {value.shape}")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} has values that are not finite")
        params[key] = array
    return params
