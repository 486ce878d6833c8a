"""A function of tokens, applied to a sixteenth of them at a time.

A function of [B, N, K] arrays stores several intermediate results of that size. In chunks they take
a sixteenth of the memory, and on a CPU they stay in the cache. Small arrays have fewer chunks, or
one: a GPU would launch a kernel for next to nothing. The chunks divide the token axis and never the
batch, because the batch may be spread over devices.

Letters: B batch, N tokens, K codes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

NUM_CHUNKS = 16
# A chunk of the largest array has at least as many elements. On a CPU it is 1 MiB of float32, which
# fits the cache of a core; on a GPU or TPU it is enough to be worth a kernel.
MIN_SIZE = {"cpu": 2**18, "others": 2**22}


def over_tokens(function: Callable, *arrays: jax.Array, axis: int) -> Any:
    """``function(*arrays)`` for arrays whose ``axis`` is the N tokens, as is that of the results.

    Args:
      function: of chunks of the arrays; treats every token alike and returns a pytree.
      *arrays: any shapes with the same N.
      axis: the token axis of all arrays and results.
    """
    num_tokens = arrays[0].shape[axis]
    of_token = max(x.size for x in arrays) // num_tokens
    widths = [
        min(max(-(-num_tokens // NUM_CHUNKS), -(-size // of_token)), num_tokens)
        for size in MIN_SIZE.values()
    ]
    on_cpu, on_others = (
        functools.partial(_in_chunks, function, axis=axis, width=width) for width in widths
    )
    if widths[0] == widths[1]:
        return on_cpu(*arrays)
    # The platform is known when the program is lowered, which may be for another machine.
    return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=on_others)


def _in_chunks(function, *arrays, axis, width):
    num_tokens = arrays[0].shape[axis]
    if width == num_tokens:
        return function(*arrays)

    def chunk(start):
        cut = (jax.lax.dynamic_slice_in_dim(x, start, width, axis) for x in arrays)
        return function(*cut)

    def whole(part):
        return jnp.zeros([*part.shape[:axis], num_tokens, *part.shape[axis + 1 :]], part.dtype)

    def put(index, results):
        # The last chunk overlaps the one before, so that all have one width.
        start = jnp.minimum(index * width, num_tokens - width)

        def write(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis)

        return jax.tree.map(write, results, chunk(start))

    results = jax.tree.map(whole, jax.eval_shape(chunk, 0))
    return jax.lax.fori_loop(0, -(-num_tokens // width), put, results)
