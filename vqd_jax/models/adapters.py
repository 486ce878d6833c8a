"""Low-rank adapters: what fine-tuning learns beside parameters that stay as they are.

A kernel W [..., in, out] becomes W + A B with A [..., in, r] and B [..., r, out] (Hu et al., "LoRA:
Low-Rank Adaptation of Large Language Models", ICLR 2022; their scale is 1 here). B begins at 0, so
that fine-tuning begins at the trained model.

Adapters are a nested dict like that of the parameters, with ``{"down": A, "up": B}`` in the place
of each kernel that has one.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from vqd_jax import files
from vqd_jax.errors import UserError
from vqd_jax.models import functional

_ENDS = (".down", ".up")


def abstract(params: Any, rank: int, paths: str) -> Any:
    """Shapes of the adapters of the kernels that a pattern finds.

    Args:
      params: nested dict of arrays or of their shapes.
      rank: r.
      paths: regular expression, searched in the dotted path of each kernel.

    Raises:
      UserError: it finds none.
    """
    found = {}
    for path, leaf in files.flatten(params).items():
        if path.endswith(".kernel") and re.search(paths, path):
            *lead, size_in, size_out = leaf.shape
            found[f"{path}.down"] = jax.ShapeDtypeStruct((*lead, size_in, rank), jnp.float32)
            found[f"{path}.up"] = jax.ShapeDtypeStruct((*lead, rank, size_out), jnp.float32)
    if not found:
        raise UserError(f"config.training.adapter_paths={paths!r} finds no kernel of the model")
    return traverse_util.unflatten_dict(found, sep=".")


def init(params: Any, rank: int, paths: str, key: jax.Array) -> Any:
    """Adapters that change nothing: A is normal with variance 1 / in, B is 0. See ``abstract``."""

    def value(path, leaf, noise):
        return noise * leaf.shape[-2] ** -0.5 if path[-1].key == "down" else jnp.zeros(leaf.shape)

    return functional.draw(abstract(params, rank, paths), key, value)


def merged(params: Any, adapters: Any) -> Any:
    """The parameters with the adapters added to their kernels."""
    flat, parts = dict(files.flatten(params)), files.flatten(adapters)
    for path in {name.removesuffix(end) for name in parts for end in _ENDS if name.endswith(end)}:
        added = jnp.matmul(parts[f"{path}.down"], parts[f"{path}.up"])
        flat[path] = flat[path] + added.astype(flat[path].dtype)
    return files.unflatten(flat, params)
