import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny
from vqd_jax.training import optimizer

ADAM = {"b1": 0.9, "b2": 0.9, "weight_decay": 0.1}


def test_frozen_parameters_neither_move_nor_have_moments():
    adamw = optax.adamw(1.0, **ADAM)
    transform = optimizer.clipped(adamw, 1.0, frozen=("text",))
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
    transform = optimizer.clipped(optax.adamw(1.0, b1=0.0, b2=0.0, weight_decay=0.0), 1.0)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    clip, adam = transform.init(params)
    gradients = {"a": jnp.array([3.0, 0.0, 0.0]), "b": jnp.array(4.0)}
    clipped, _ = optax.clip_by_global_norm(1.0).update(gradients, clip)
    np.testing.assert_allclose(clipped["a"][0], 0.6, rtol=1e-6)
    # With b1 = b2 = 0 the moments are the clipped gradient and its square.
    _, (_, new) = transform.update(gradients, (clip, adam), params)
    np.testing.assert_allclose(new[0].mu["b"], 0.8, rtol=1e-6)


def test_muon_orthogonalises_every_layer_s_kernel():
    gradient = jax.random.normal(jax.random.key(0), (2, 24, 8))
    params = {"denoiser": {"kernel": jnp.zeros_like(gradient)}}
    transform = optimizer.muon(lambda _: 0.5, **ADAM)
    updates, state = transform.update(
        {"denoiser": {"kernel": gradient}}, transform.init(params), params
    )
    found = np.asarray(updates["denoiser"]["kernel"])
    # An orthogonal matrix of 24 x 8 has the root mean square sqrt(1 / 24).
    unit = found / (-0.5 * 0.2 * np.sqrt(24))
    for layer, g in zip(unit, np.asarray(gradient), strict=True):
        u, _, v = np.linalg.svd(g, full_matrices=False)
        # Five steps bring singular values between 0.7 and 1.2, and turn nothing.
        turned = u.T @ layer @ v.T
        assert np.all((np.diag(turned) > 0.65) & (np.diag(turned) < 1.25))
        np.testing.assert_allclose(turned - np.diag(np.diag(turned)), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.mean(found**2)), 0.5 * 0.2, rtol=0.15)
    # One moment, and the counts.
    assert sum(x.size for x in jax.tree.leaves(state)) < gradient.size + 10


def test_muon_is_adamw_with_nesterov_s_momentum_for_all_but_scanned_kernels():
    params = {
        "text_encoder": {"blocks": {"kernel": jnp.ones((2, 4, 4))}},
        "denoiser": {
            "blocks": {"mlp_in": {"kernel": jnp.ones((2, 3, 5)), "bias": jnp.ones((2, 5))}},
            "norm_x": {"embedding": {"embedding": jnp.ones((2, 7, 3))}},
            "to_logits": {"kernel": jnp.ones((3, 9)), "bias": jnp.ones(9)},
        },
    }
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    transform = optimizer.clipped(optimizer.muon(lambda _: 1.0, **ADAM), 100.0, ("text_encoder",))
    updates, _ = transform.update(gradients, transform.init(params), params)
    frozen = updates.pop("text_encoder")["blocks"]["kernel"]
    np.testing.assert_array_equal(frozen, gradients.pop("text_encoder")["blocks"]["kernel"])
    del params["text_encoder"]
    adam = optax.nadamw(1.0, **ADAM)
    wanted, _ = adam.update(gradients, adam.init(params), params)
    kernels = [x["denoiser"]["blocks"]["mlp_in"].pop("kernel") for x in (updates, wanted)]
    assert np.abs(kernels[0] - kernels[1]).min() > 0.1
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, wanted)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_config_says_which_and_how(kind):
    c = tiny.get_config().training
    c.update({"optimizer": kind, "weight_decay": 0.1, "learning_rate": 0.5, "warmup_steps": 0})
    transform, rate = optimizer.make(c)
    np.testing.assert_allclose(rate(0), 0.5)
    gradient = jax.random.normal(jax.random.key(0), (2, 3, 5))
    params = {"denoiser": {"kernel": jnp.ones((2, 3, 5))}}
    gradients = {"denoiser": {"kernel": gradient}}
    alone = {"adamw": optax.adamw, "muon": optimizer.muon}[kind]
    alone = alone(rate, b1=c.adam_b1, b2=c.adam_b2, weight_decay=0.1)
    found, _ = transform.update(gradients, transform.init(params), params)
    # The first step does not see how long a gradient is, so clipping leaves it alone.
    wanted, _ = alone.update(gradients, alone.init(params), params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), found, wanted)
