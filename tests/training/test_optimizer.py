import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqd_jax.training import optimizer


def test_frozen_parameters_neither_move_nor_have_moments():
    transform = optimizer.adamw(
        lambda _: 1.0, b1=0.9, b2=0.9, weight_decay=0.1, clip_norm=1.0, frozen=("text",)
    )
    params = {"text": {"w": jnp.ones(3)}, "denoiser": {"w": jnp.ones(3)}}
    moments = transform.init(params)
    assert sum(x.size for x in jax.tree.leaves(moments)) < 3 * 3
    gradients = {"text": {"w": jnp.zeros(3)}, "denoiser": {"w": jnp.ones(3)}}
    updates, _ = transform.update(gradients, moments, params)
    np.testing.assert_array_equal(updates["text"]["w"], 0.0)
    assert np.all(np.asarray(updates["denoiser"]["w"]) < -1.0)


def test_learning_rate_warms_up_and_decays():
    rate = optimizer.learning_rate(1e-3, 10, 110, 0.05)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(60), rate(110)],
        [0, 5e-4, 1e-3, (0.05 + 0.95 / 2) * 1e-3, 5e-5],
        rtol=1e-5,
        atol=1e-9,
    )
    short = optimizer.learning_rate(1e-3, 100, 20, 0.05)
    np.testing.assert_allclose(short(19), 1e-3, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    transform = optimizer.adamw(lambda _: 1.0, b1=0.0, b2=0.0, weight_decay=0.0, clip_norm=1.0)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    clip, adam = transform.init(params)
    gradients = {"a": jnp.array([3.0, 0.0, 0.0]), "b": jnp.array(4.0)}
    clipped, _ = optax.clip_by_global_norm(1.0).update(gradients, clip)
    np.testing.assert_allclose(clipped["a"][0], 0.6, rtol=1e-6)
    # With b1 = b2 = 0 the moments are the clipped gradient and its square.
    _, (_, new) = transform.update(gradients, (clip, adam), params)
    np.testing.assert_allclose(new[0].mu["b"], 0.8, rtol=1e-6)
