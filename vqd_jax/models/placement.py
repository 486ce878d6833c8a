"""Marks where the rows of a batch stay apart, for programs that run on several devices.

The models mark the stream between their layers; what that means, the caller says. Without such
marks the partitioner may as well divide activations along their width, as the parameters are, and
then exchanges activations instead of parameters. On one device nothing is said and nothing happens.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

_place: contextvars.ContextVar[Callable] = contextvars.ContextVar("place", default=lambda x: x)


@contextlib.contextmanager
def rows_placed_by(place: Callable[[jax.Array], jax.Array]) -> Iterator[None]:
    """Within the context, while a program is traced, ``place`` is applied by ``rows``."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def rows(x: jax.Array) -> jax.Array:
    """``x`` [B, ...] with its rows where the caller wants them."""
    return _place.get()(x)
