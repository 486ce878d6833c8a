"""Modules as functions of a config and of parameters, which are a nested dict of arrays.

``make`` is the class of a module: it takes a config, ``rngs`` and maybe ``placement``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
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
