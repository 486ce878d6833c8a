"""What a run begins with besides random numbers: a pretrained text encoder, a whole model."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.data.text import TextFeatures
from vqd_jax.errors import UserError
from vqd_jax.interop import folder
from vqd_jax.models import conditioned, text_encoder
from vqd_jax.training.state import TrainState

# Features of the empty caption may first be learnt in fine-tuning (Improved VQ-Diffusion, 3.1).
_MAY_BE_NEW = ("null_text",)


def adopt(config: ConfigDict, state: TrainState) -> TrainState:
    """The state with the parameters of ``training.init_from`` and of ``text_encoder.path``.

    Every value goes to where the one that it replaces lives.

    Raises:
      UserError: a folder cannot be read, or holds parameters of other sizes than the config asks.
    """
    sizes = config_lib.model_config(config)
    key = jax.random.key(0)
    abstract = jax.eval_shape(lambda: conditioned.init_params(sizes, key))
    found = {}
    if config.training.init_from:
        found |= _model(config.training.init_from, abstract)
    if config.text_encoder.path and "text_encoder" in abstract:
        found["text_encoder"] = load_text_encoder(config)
    if not found:
        return state

    def placed(params: Any) -> Any:
        put = lambda old, new: jax.device_put(new, old.sharding)  # noqa: E731
        return params | {n: jax.tree.map(put, params[n], part) for n, part in found.items()}

    # Two copies: a donated state must not hold one buffer twice.
    return state.replace(params=placed(state.params), ema_params=placed(state.ema_params))


def _model(directory: str, abstract: Any) -> Any:
    if folder.load_config(directory).get("kind") != config_lib.MODEL_KIND:
        raise UserError(f"config.training.init_from={directory}: not the folder of a whole model")
    names = {name.split(".")[0] for name in folder.read_shards(Path(directory), "model")}
    parts = {}
    for part, shapes in abstract.items():
        if part not in names and part in _MAY_BE_NEW:
            logging.info("%s has no %s; it is learnt from the start", directory, part)
            continue
        parts[part] = _load(directory, shapes, part)
    return parts


def load_text_encoder(config: ConfigDict) -> Any:
    """Parameters of the text encoder in ``config.text_encoder.path``.

    Raises:
      UserError: it cannot be read, or has other sizes than the config says.
    """
    directory, sizes = config.text_encoder.path, config_lib.model_config(config)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: conditioned.init_params(sizes, key))["text_encoder"]
    kind = folder.load_config(directory).get("kind")
    parts = {"clip": "text", config_lib.MODEL_KIND: "text_encoder"}
    if kind not in parts:
        raise UserError(
            f"config.text_encoder.path={directory}: neither a converted CLIP nor a model with a "
            "text encoder"
        )
    return _load(directory, shapes, parts[kind])


def text_features(config: ConfigDict) -> TextFeatures | None:
    """Features by the pretrained text encoder, in float32; None if they are not to be cached.

    Raises:
      UserError: see ``load_text_encoder``.
    """
    if not config.data.cache_text_features:
        return None
    sizes = dataclasses.replace(config_lib.model_config(config).text_encoder, dtype="float32")
    params = load_text_encoder(config)
    compute = jax.jit(lambda params, ids: text_encoder.bind(sizes, params)(ids))
    return TextFeatures(functools.partial(compute, params), sizes.width, files.fingerprint(params))


def _load(directory: str, shapes: Any, part: str) -> Any:
    if isinstance(shapes, dict):
        return folder.load_params(directory, shapes, part)
    # A parameter on the top level, not a module with a name before its own.
    tensor = folder.read_shards(Path(directory), "model")[part]
    if tensor.shape != tuple(shapes.shape):
        raise UserError(
            f"{directory}: {part} is {tensor.shape}, the config asks for {shapes.shape}"
        )
    return np.array(tensor, shapes.dtype)
