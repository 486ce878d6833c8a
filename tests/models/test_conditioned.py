import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqd_jax.models import conditioned
from vqd_jax.models.denoiser import DenoiserConfig
from vqd_jax.models.text_encoder import TextEncoderConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

CONFIG = conditioned.ConditionedDenoiserConfig(
    TextEncoderConfig(vocab_size=11, context_length=5, width=6, num_layers=1, num_heads=2),
    DenoiserConfig(
        num_codes=7, grid=(2, 3), num_steps=5, width=8, num_layers=2, num_heads=2, text_width=6
    ),
)
TOKENS = np.array([[7, 7, 1, 0, 7, 3], [7, 6, 1, 0, 2, 3]])
TIME = np.array([5, 2])
IDS = np.array([[1, 4, 10, 0, 0], [1, 10, 0, 0, 0]])


initial = jax.jit(functools.partial(conditioned.init_params, CONFIG))


@pytest.fixture(scope="module")
def params():
    return initial(jax.random.key(0))


def test_log_x0_is_normalised(params):
    log_x0 = conditioned.bind(CONFIG, params).log_x0(TOKENS, TIME, IDS)
    assert log_x0.shape == (2, 6, 7)
    assert log_x0.dtype == jnp.float32
    np.testing.assert_allclose(jnp.exp(log_x0).sum(-1), 1, rtol=1e-5)


def test_parameters_are_a_nested_dict_of_float32(params):
    assert isinstance(params, dict)
    assert set(params) == {"text_encoder", "denoiser"}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    again = initial(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    other = initial(jax.random.key(1))
    kernel = lambda p: p["denoiser"]["to_logits"]["kernel"]  # noqa: E731
    assert np.abs(kernel(params) - kernel(other)).max() > 0.01


def test_precomputed_text_is_the_text(params):
    model = conditioned.bind(CONFIG, params)
    table = model.denoiser.modulations(jnp.arange(1, 6))
    logits = model.denoiser.denoise(TOKENS, table[:, TIME - 1], model.context(IDS))
    np.testing.assert_allclose(
        jax.nn.log_softmax(logits), model.log_x0(TOKENS, TIME, IDS), atol=1e-5
    )


@pytest.mark.slow
def test_bind_works_under_jit_and_grad(params):
    def loss(params):
        log_x0 = conditioned.bind(CONFIG, params).log_x0(TOKENS, TIME, IDS)
        return -log_x0[..., 0].mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, loss(params), rtol=1e-5)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    text = gradient["text_encoder"]["token_embedding"]["embedding"]
    seen = np.abs(text).max(-1) > 0
    np.testing.assert_array_equal(seen, np.isin(np.arange(11), IDS))


def test_the_widths_must_meet():
    with pytest.raises(ValueError, match=r"text_encoder\.width=6 is not denoiser\.text_width=8"):
        conditioned.ConditionedDenoiserConfig(
            CONFIG.text_encoder,
            DenoiserConfig(
                num_codes=7, grid=(2, 3), num_steps=5, width=8, num_layers=2, num_heads=2,
                text_width=8,
            ),
        )  # fmt: skip
