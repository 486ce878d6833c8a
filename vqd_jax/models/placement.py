"""What a model is told of the devices that its program is made for.

On several of them the rows of a batch stay apart: the models mark the stream between their layers,
and what that means, the caller says. Without such marks the partitioner may as well divide
activations along their width, as the parameters are, and then exchanges activations instead of
parameters. On one device nothing is said and nothing happens.

The devices need not be those of this machine: a program may be compiled for others.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

_place: contextvars.ContextVar[Callable] = contextvars.ContextVar(
    "place", default=lambda x, axis: x
)
_device: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar("device", default=None)


@contextlib.contextmanager
def rows_placed_by(
    place: Callable[[jax.Array, int], jax.Array], device: jax.Device
) -> Iterator[None]:
    """Within the context, programs for ``device`` are traced, and ``place`` is applied to arrays.

    ``place`` is told the axis of the heads too, or 0. Without a context, a program is made for the
    first device of this machine.
    """
    tokens = _place.set(place), _device.set(device)
    try:
        yield
    finally:
        _place.reset(tokens[0])
        _device.reset(tokens[1])


def rows(x: jax.Array) -> jax.Array:
    """``x`` [B, ...] with its rows where the caller wants them."""
    return _place.get()(x, 0)


def heads(x: jax.Array) -> jax.Array:
    """``x`` [B, N, H, D/H] with its rows and its heads where the caller wants them."""
    return _place.get()(x, 2)


def compute_capability() -> float:
    """Of the GPU that the program is made for, such as 9.0 of an H100; 0 is no GPU of NVIDIA."""
    device = _device.get() or jax.local_devices()[0]
    found = str(getattr(device, "compute_capability", ""))
    # AMD's are called gfx942 and the like.
    return float(found) if device.platform == "gpu" and found[:1].isdigit() else 0.0
