"""Modules as functions of a config and of parameters, which are a nested dict of arrays.

``make`` is the class of a module: it takes a config, ``rngs`` and maybe ``placement``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@functools.lru_cache(maxsize=32)
def _split(make: Callable, config: Any, **options: Any) -> tuple[nnx.GraphDef, Any]:
    """The static part of a module, and the shapes of its arrays."""
    model = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0), **options))
    graphdef, arrays = nnx.split(model)
    return graphdef, nnx.to_pure_dict(arrays)


def abstract(make: Callable, config: Any) -> Any:
    """Shapes of the parameters: a nested dict of ``jax.ShapeDtypeStruct``."""
    return _split(make, config)[1]


def init(make: Callable, config: Any, key: jax.Array) -> Any:
    """Initial parameters: a nested dict of arrays, decided by the PRNG key."""
    return nnx.to_pure_dict(nnx.state(make(config, rngs=nnx.Rngs(params=key))))


def bind(make: Callable, config: Any, params: Any, **options: Any) -> Any:
    """The module with these parameters, which may be traced: usable inside ``jit``.

    Args:
      make: the class.
      config: its sizes.
      params: a nested dict like that of ``abstract``.
      **options: ``placement``, where the class takes it.
    """
    return nnx.merge(_split(make, config, **options)[0], params)


def draw(abstract: Any, key: jax.Array, value: Callable) -> Any:
    """Parameters by a rule. All are slices of one draw; one for each compiles ten times as long.

    Args:
      abstract: shapes of the parameters, as ``abstract`` returns them.
      key: PRNG key.
      value: ``value(path, leaf, noise)`` returns the array of a leaf, which has the shape of
        ``noise``, float32 and standard normal.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    noise = jax.random.normal(key, (sum(leaf.size for _, leaf in leaves),), jnp.float32)
    params, start = [], 0
    for path, leaf in leaves:
        params.append(value(path, leaf, noise[start : start + leaf.size].reshape(leaf.shape)))
        start += leaf.size
    return treedef.unflatten(params)
