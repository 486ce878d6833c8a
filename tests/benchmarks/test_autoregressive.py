"""The autoregressive model beside ours: sizes, causality, the cache, and what it draws."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import coco, emoji, shapes, tiny
from vqd_jax import config as config_lib
from vqd_jax.models import conditioned, functional
from vqd_jax.models.text_encoder import TextEncoder

jax.config.update("jax_numpy_rank_promotion", "raise")

B, N, K, L = 3, 16, 32, 16
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script(benchmark):
    return benchmark("autoregressive")


@pytest.fixture(scope="module")
def sizes(script):
    return script.beside(config_lib.model_config(tiny.get_config()))


@pytest.fixture(scope="module")
def params(script, sizes):
    # Large enough that every token and the text matter to an untrained network.
    init = jax.jit(lambda: functional.init(script.Causal, sizes, jax.random.key(0)))
    return jax.tree.map(lambda x: 4 * x, init())


@pytest.fixture(scope="module")
def logits(script, sizes, params):
    """logits(codes, texts) of all tokens, without a cache."""
    return jax.jit(lambda *given: functional.bind(script.Causal, sizes, params)(*given))


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    texts = rng.integers(1, 49000, (B, L)).astype(np.int32)
    return rng.integers(0, K, (B, N)).astype(np.int32), texts


@pytest.mark.parametrize("config", [shapes, emoji, tiny], ids=lambda c: c.__name__)
def test_it_has_as_many_parameters_as_ours(script, config):
    ours = config_lib.model_config(config.get_config())
    causal = functional.abstract(script.Causal, script.beside(ours))
    denoiser = script.size_of(conditioned.abstract_params(ours)["denoiser"])
    text = functional.abstract(TextEncoder, ours.text_encoder)
    assert jax.tree.map(lambda x: x.shape, causal["text_encoder"]) == jax.tree.map(
        lambda x: x.shape, text
    )
    # Text encoders apart, which are equal and large.
    found = script.size_of(causal) - script.size_of(text)
    assert abs(found / denoiser - 1) < 0.05
    assert causal["code_embedding"]["embedding"].shape == (
        config.get_config().autoencoder.num_codes + 1,
        config.get_config().denoiser.width,
    )


@pytest.mark.slow
def test_logits_with_the_cache_are_those_without(script, sizes, params, logits):
    codes, texts = inputs()

    @jax.jit
    def one_by_one(codes, texts):
        model = functional.bind(script.Causal, sizes, params)
        given = model.given(texts)

        def step(cache, at):
            found, cache = model.step(given, cache, *at)
            return cache, found

        before = jnp.concatenate([jnp.full((B, 1), K), codes[:, :-1]], 1).T
        return jax.lax.scan(step, model.empty_cache(B), (before, jnp.arange(N)))[1]

    exact = np.asarray(logits(codes, texts))
    assert exact.std() > 0.5
    np.testing.assert_allclose(
        one_by_one(codes, texts).swapaxes(0, 1), exact, atol=1e-5 * exact.std()
    )


def test_a_later_token_changes_no_earlier_logits(logits):
    codes, texts = inputs()
    before = np.asarray(logits(codes, texts))
    for place in (0, 7, N - 1):
        changed = codes.copy()
        changed[:, place] = (changed[:, place] + 1) % K
        after = np.asarray(logits(changed, texts))
        np.testing.assert_array_equal(after[:, : place + 1], before[:, : place + 1])
        if place < N - 1:
            assert np.abs(after[:, place + 1 :] - before[:, place + 1 :]).max((1, 2)).min() > 1e-3
    others = np.asarray(logits(codes, np.roll(texts, 1, axis=0)))
    assert np.abs(others - before).max((1, 2)).min() > 1e-3


def test_what_it_draws_follows_guidance_truncation_and_keys(script, sizes, params, logits):
    _, texts = inputs()
    null = np.ones((1, L), np.int32)
    draw = jax.jit(functools.partial(script.sample, config=sizes))
    keys = jax.random.split(jax.random.key(0), B)
    # With next to no truncation left, the best code of the guided logits is drawn.
    codes = np.asarray(draw(params, keys, texts, null, jnp.float32(3.0), jnp.float32(1e-6)))
    cond, none = logits(codes, texts), logits(codes, np.repeat(null, B, 0))
    guided = none + 3.0 * (cond - none)
    np.testing.assert_array_equal(codes, guided.argmax(-1))
    assert (codes != np.asarray(cond).argmax(-1)).any()
    # A picture depends on its own key alone.
    free = np.asarray(draw(params, keys, texts, null, None, None))
    same = np.asarray(draw(params, keys.at[0].set(jax.random.key(9)), texts, null, None, None))
    np.testing.assert_array_equal(free[1:], same[1:])
    assert (free[0] != same[0]).any()


@pytest.mark.slow
def test_its_loss_is_its_likelihood(script, sizes, params, logits):
    codes, texts = inputs()
    found = script.nats(functional.bind(script.Causal, sizes, params), codes, texts)
    exact = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits(codes, texts))), codes[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_the_products_of_a_pass_grow_with_the_grid(benchmark):
    chips, tpu_compile = benchmark("autoregressive_chips"), benchmark("tpu_compile")
    config = coco.get_config()
    # 32 rows are those of the config; the attention of a token grows with their square.
    assert chips.pass_flops(config, 32) == tpu_compile.forward_flops(config)
    assert chips.pass_flops(config, 8) < chips.pass_flops(config, 32) / 16


def test_what_trains_and_times_here_does_not_choose_the_platform():
    # The scripts for chips that are not there keep JAX on the CPU; this one must not be one.
    code = "import os, autoregressive; print(os.environ.get('JAX_PLATFORMS'))"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None"
