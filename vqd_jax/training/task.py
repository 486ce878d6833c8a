"""What the loop needs of whatever is trained, and what all kinds of training share.

Letters: A parts of a batch, S steps of one call.
"""

import functools
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vqd_jax.models.attention import Placement
from vqd_jax.parallel import sharding


class Task:
    """One kind of training; ``loop.fit`` drives it.

    The state is a dataclass of ``flax.struct`` with ``step``, int32 []. It holds all that a step
    reads or changes: the parameters of any number of networks, their optimizers, the PRNG key.

    Attributes:
      name: what the progress bar and the messages call it.
      prefix: of the names of its metrics, such as 'train'.
      batches: pytrees of NumPy arrays, with this process's rows of every batch. Their place is
        saved beside the state.
    """

    name: str
    prefix: str
    batches: grain.IterDataset

    def create_state(self) -> Any:
        """The state before the first step. Jittable."""
        raise NotImplementedError

    def train_step(
        self, state: Any, batch: Any, placement: Placement
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The next state, and float32 scalars with ``loss`` and ``gradient_norm``. Jittable."""
        raise NotImplementedError

    def shardings(self, abstract: Any, mesh: Mesh) -> Any:
        """The places of the leaves of an abstract state; by default all are whole everywhere."""
        return jax.tree.map(lambda _: sharding.replicated(mesh), abstract)

    def begin(self, state: Any) -> Any:
        """The state that a new run begins from: ``state``, or one with trained weights in it."""
        return state

    def evaluate(self, step: int, state: Any, writer: Any) -> None:
        """Writes what is measured at ``schedule.eval_every``; must not consume the state."""


def abstract_state(task: Task, mesh: Mesh) -> Any:
    """Shapes, dtypes and places on the mesh of the state; nothing is allocated."""
    abstract = jax.eval_shape(task.create_state)
    return sharding.with_shardings(abstract, task.shardings(abstract, mesh))


def init_state(task: Task, mesh: Mesh) -> Any:
    """The state before the first step, made on the mesh: no device ever holds the whole of it."""
    return jax.jit(task.create_state, out_shardings=_places(task, mesh))()


def jit_step(task: Task, mesh: Mesh, steps_per_call: int = 1) -> Callable:
    """The compiled step, on one device or on thousands; it consumes the state that it is given.

    With ``steps_per_call`` S > 1 it is S steps: the leaves of the batch have S as an axis before
    their rows, and so have the metrics. A call of fewer steps is another program.
    """
    placed, several = _places(task, mesh), steps_per_call > 1
    step = functools.partial(task.train_step, placement=sharding.placement(mesh))

    def steps(state, batches):
        return jax.lax.scan(step, state, batches)

    return jax.jit(
        steps if several else step,
        donate_argnums=0,
        in_shardings=(placed, sharding.batch_sharding(mesh, leading=int(several))),
        out_shardings=(placed, sharding.replicated(mesh)),
    )


def _places(task: Task, mesh: Mesh) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract_state(task, mesh))


def accumulate(
    gradients: Callable[[Any, jax.Array, Any], tuple[Any, Any, Any]],
    carried: Any,
    key: jax.Array,
    batch: Any,
    parts: int,
) -> tuple[Any, Any, Any]:
    """Gradients of a batch, computed on its parts one after the other.

    Args:
      gradients: (carried, key, rows) -> (gradients, carried, metrics); metrics are means over rows.
      carried: what one part hands to the next.
      key: PRNG key; if A > 1, part a uses ``fold_in(key, a)``.
      batch: pytree of arrays [B, ...].
      parts: A, a divisor of B.

    Returns:
      The mean gradients, what the last part handed on, and the mean metrics.
    """
    if parts == 1:
        return gradients(carried, key, batch)

    def split(x):
        # Part a has the rows a, a + A, ...: every device keeps the rows that it has.
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def part(carry, at):
        carried, total = carry
        index, rows = at
        made, carried, values = gradients(carried, jax.random.fold_in(key, index), rows)
        return (carried, jax.tree.map(lambda t, x: t + x / parts, total, (made, values))), None

    rows = jax.tree.map(split, batch)
    made, _, values = jax.eval_shape(gradients, carried, key, jax.tree.map(lambda x: x[0], rows))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (made, values))
    carry, _ = jax.lax.scan(part, (carried, zeros), (jnp.arange(parts), rows))
    carried, (made, values) = carry
    return made, carried, values
