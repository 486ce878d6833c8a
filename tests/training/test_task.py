import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vqd_jax.parallel import sharding
from vqd_jax.training import task

jax.config.update("jax_numpy_rank_promotion", "raise")


def gradients(carried, key, rows, weights):
    """Of mean (rows @ weights)^2 with noise; carries how many rows it saw."""
    noise = jax.random.normal(key, (rows["x"].shape[0],))

    def loss(weights):
        return jnp.mean((rows["x"] @ weights + noise) ** 2)

    value, made = jax.value_and_grad(loss)(weights)
    return made, carried + rows["x"].shape[0], {"loss": value}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_gradients_are_the_mean_of_the_parts(parts):
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(8, 3)).astype(np.float32)}
    weights, key = jnp.asarray([1.0, -2.0, 0.5]), jax.random.key(3)
    compute = functools.partial(gradients, weights=weights)
    made, carried, values = jax.jit(
        lambda batch: task.accumulate(compute, jnp.int32(0), key, batch, parts)
    )(batch)
    expected = []
    for part in range(parts):
        part_key = key if parts == 1 else jax.random.fold_in(key, part)
        expected.append(compute(0, part_key, {"x": batch["x"][part::parts]}))
    np.testing.assert_allclose(made, sum(e[0] for e in expected) / parts, rtol=1e-5)
    loss = sum(e[2]["loss"] for e in expected) / parts
    np.testing.assert_allclose(values["loss"], loss, rtol=1e-5)
    assert int(carried) == 8


class State(flax.struct.PyTreeNode):
    step: jax.Array
    first: jax.Array
    second: jax.Array


class TwoOptimizers(task.Task):
    """Two parameters that pull at each other, each with a rate of its own."""

    def create_state(self):
        return State(jnp.zeros((), jnp.int32), jnp.float32(1.0), jnp.float32(-1.0))

    def train_step(self, state, batch, placement):
        pull = state.second - state.first + batch["x"].mean()
        metrics = {"loss": pull**2, "gradient_norm": jnp.abs(pull)}
        moved = State(state.step + 1, state.first + 0.1 * pull, state.second - 0.3 * pull)
        return moved, metrics


def test_several_steps_of_one_call_are_the_steps_one_by_one():
    two = TwoOptimizers()
    mesh = sharding.make_mesh(ConfigDict({"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}))
    batches = {"x": np.arange(6, dtype=np.float32).reshape(3, 2)}
    state, losses = task.init_state(two, mesh), []
    step = task.jit_step(two, mesh)
    for index in range(3):
        state, metrics = step(state, sharding.put_batch({"x": batches["x"][index]}, mesh))
        losses.append(float(metrics["loss"]))
    several = task.jit_step(two, mesh, steps_per_call=3)
    after, metrics = several(
        task.init_state(two, mesh), sharding.put_batch(batches, mesh, leading=1)
    )
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-6)
    assert int(after.step) == 3
    np.testing.assert_allclose(after.second, state.second, rtol=1e-6)
