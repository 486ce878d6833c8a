"""A function of tokens, applied to a sixteenth of them at a time.

A function of [B, N, K] arrays stores several intermediate results of that size. In chunks they take
a sixteenth of the memory, and on a CPU they stay in the cache. Small arrays have fewer chunks, or
one: a GPU would launch a kernel for next to nothing. The chunks divide the token axis and never the
batch, because the batch may be spread over devices.

Letters: B batch, N tokens, K codes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NUM_CHUNKS = 16
# A chunk of the largest array has at least as many elements: 1 MiB of float32, which fits the cache
# of a CPU's core.
MIN_SIZE = 2**18


def over_tokens(function: Callable, *arrays: jax.Array, axis: int) -> Any:
    """``function(*arrays)`` for arrays whose ``axis`` is the N tokens, as is that of the results.

    Args:
      function: of chunks of the arrays; treats every token alike and returns a pytree.
      *arrays: any shapes with the same N.
      axis: the token axis of all arrays and results.
    """
    num_tokens = arrays[0].shape[axis]
    of_token = max(x.size for x in arrays) // num_tokens
    width = min(max(-(-num_tokens // NUM_CHUNKS), -(-MIN_SIZE // of_token)), num_tokens)
    if width == num_tokens:
        return function(*arrays)
    # The last chunk overlaps the one before, so that all have one width.
    starts = np.minimum(np.arange(0, num_tokens, width, dtype=np.int32), num_tokens - width)

    def chunk(start):
        cut = (jax.lax.dynamic_slice_in_dim(x, start, width, axis) for x in arrays)
        return function(*cut)

    def whole(part):
        return jnp.zeros([*part.shape[:axis], num_tokens, *part.shape[axis + 1 :]], part.dtype)

    def put(index, results):
        start = jnp.asarray(starts)[index]

        def write(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis)

        return jax.tree.map(write, results, chunk(start))

    results = jax.tree.map(whole, jax.eval_shape(chunk, 0))
    return jax.lax.fori_loop(0, len(starts), put, results)
