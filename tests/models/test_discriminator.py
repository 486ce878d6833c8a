"""Discriminators: both against PyTorch, the published size, blurs by hand, batch statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqd_jax.models import discriminator
from vqd_jax.models.discriminator import DiscriminatorConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

PATCHGAN = DiscriminatorConfig("patchgan", channels=6, num_layers=2)
BLURPOOL = DiscriminatorConfig("blurpool", channels=8, num_layers=2, norm_groups=4)


def _params(config, seed=0):
    """Initial parameters, with scales and biases that a fault could not leave out unseen."""
    params = INIT(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def moved(x):
        return x + 0.3 * rng.normal(size=x.shape).astype(np.float32) if x.ndim == 1 else 3 * x

    return jax.tree.map(moved, params)


INIT = jax.jit(discriminator.init_params, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _apply(config, params, images):
    return discriminator.bind(config, params)(images)


@pytest.mark.parametrize("config", [PATCHGAN, BLURPOOL], ids=["patchgan", "blurpool"])
def test_logits_and_gradients_equal_those_of_pytorch(config):
    torch = pytest.importorskip("torch")
    params = _params(config)
    images = np.random.default_rng(1).normal(size=(3, 24, 24, 3)).astype(np.float32)

    def total(params, images):
        logits = _apply(config, params, images)
        return jnp.sum(jnp.sin(logits)), logits

    grad = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (ours, ours_images), logits = grad(params, images)

    def tensor(x):
        x = np.array(x)
        x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x
        return torch.tensor(np.ascontiguousarray(x), requires_grad=True)

    theirs = jax.tree.map(tensor, params)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    expected = _in_pytorch(torch, theirs, pixels, config)
    expected.sin().sum().backward()
    _close(logits, expected.detach().permute(0, 2, 3, 1).numpy())
    _close(ours_images, pixels.grad.permute(0, 2, 3, 1).numpy())

    def compare(a, b):
        b = b.grad.numpy()
        _close(a, b.transpose(2, 3, 1, 0) if b.ndim == 4 else b)

    jax.tree.map(compare, ours, theirs)


def _in_pytorch(torch, params, x, config):
    """The network from its description, with PyTorch's own layers; [B, 3, S, S]."""
    functional, blurs = torch.nn.functional, config.kind == "blurpool"
    half, last = (1, 1) if blurs else (2, 1)
    side = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    count = len(params["conv"])
    for index in range(count):
        conv, norm = params["conv"][index], params["norm"].get(index - 1)
        if blurs and index:
            kernel = torch.outer(side, side).expand(x.shape[1], 1, 4, 4)
            padded = functional.pad(x, (1, 2, 1, 2), mode="replicate")[..., :-1, :-1]
            x = functional.conv2d(padded, kernel, stride=2, groups=x.shape[1])
        stride = last if index == count - 1 else half
        x = functional.conv2d(x, conv["kernel"], conv.get("bias"), stride=stride, padding=1)
        if index and blurs:
            x = functional.group_norm(x, config.norm_groups, norm["scale"], norm["bias"], 1e-6)
        elif index:
            x = functional.batch_norm(x, None, None, norm["scale"], norm["bias"], training=True)
        x = functional.leaky_relu(x, 0.2)
    return functional.conv2d(x, params["to_logits"]["kernel"], params["to_logits"]["bias"], 1, 1)


def _close(ours, theirs):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * scale)


def test_the_published_size():
    config = DiscriminatorConfig("patchgan")
    abstract = discriminator.abstract_params(config)
    # By hand, from the widths 3, 64, 128, 256, 512, 1 and 4x4 kernels.
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert sum(x.size for x in jax.tree.leaves(abstract)) == kernels + 64 + 2 * 896 + 1
    shape = jax.eval_shape(lambda p: _apply(config, p, jnp.zeros((2, 256, 256, 3))), abstract).shape
    assert shape == (2, 30, 30, 1)


@pytest.mark.slow
def test_a_logit_of_three_layers_sees_70_pixels():
    config = DiscriminatorConfig("patchgan", channels=2)
    params, images = _params(config), jax.random.normal(jax.random.key(0), (1, 128, 128, 3))
    # Batch statistics see all pixels; without them, a logit sees its patch.
    params["norm"] = {i: {k: v * 0 for k, v in n.items()} for i, n in params["norm"].items()}
    blank = jax.grad(lambda x: _apply(config, params, x)[0, 7, 7, 0])(images)
    np.testing.assert_array_equal(blank, 0.0)

    @jax.jit
    @jax.grad
    def gradient(x):
        module = discriminator.bind(config, _params(config))
        for layer in module.conv:
            x = discriminator._leaky(layer(x))
        return module.to_logits(x)[0, 7, 7, 0]

    seen = np.abs(gradient(images)).sum(axis=(0, 1, 3)) > 0
    assert np.ptp(np.flatnonzero(seen)) + 1 == 70


def test_blur_by_hand():
    row = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0])
    expected = [(1 + 3 + 6 + 4) / 8, (2 + 12 + 24 + 16) / 8, (8 + 48 + 48 + 16) / 8]
    blurred = discriminator.blur_pool(jnp.broadcast_to(row[None, :, None, None], (1, 5, 2, 1)))
    assert blurred.shape == (1, 3, 1, 1)
    np.testing.assert_allclose(blurred[0, :, 0, 0], expected)
    transposed = discriminator.blur_pool(jnp.broadcast_to(row[None, None, :, None], (1, 2, 5, 1)))
    np.testing.assert_allclose(transposed[0, 0, :, 0], expected)


def test_initial_parameters():
    params = INIT(DiscriminatorConfig("patchgan"), jax.random.key(0))
    np.testing.assert_allclose(np.std(params["conv"][2]["kernel"]), 0.02, rtol=0.01)
    np.testing.assert_allclose(np.mean(params["norm"][2]["scale"]), 1.0, atol=0.01)
    np.testing.assert_allclose(np.std(params["norm"][2]["scale"]), 0.02, rtol=0.15)
    params = INIT(DiscriminatorConfig("blurpool"), jax.random.key(0))
    np.testing.assert_allclose(np.var(params["conv"][2]["kernel"]), 2 / (9 * 128), rtol=0.02)
    np.testing.assert_array_equal(params["norm"][0]["scale"], 1.0)


@pytest.mark.parametrize("config", [PATCHGAN, BLURPOOL], ids=["patchgan", "blurpool"])
def test_bfloat16_changes_the_logits_by_rounding(config):
    params, images = _params(config), jax.random.normal(jax.random.key(1), (4, 24, 24, 3))
    exact = _apply(config, params, images)
    half = DiscriminatorConfig(**(vars(config) | {"dtype": "bfloat16"}))
    rounded = jax.jit(lambda p, x: jax.checkpoint(lambda p: _apply(half, p, x))(p))(params, images)
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - exact)
    assert 0 < error.max() and error.mean() < 0.02 * np.std(exact)


def test_a_picture_judges_the_others_only_by_batch_statistics():
    images = jax.random.normal(jax.random.key(2), (3, 24, 24, 3))
    changed = images.at[0].add(1.0)
    for config, differ in ((PATCHGAN, True), (BLURPOOL, False)):
        params = _params(config)
        a, b = (_apply(config, params, x)[1:] for x in (images, changed))
        assert bool(jnp.any(a != b)) == differ


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "stylegan"}, "kind='stylegan'"),
        ({"channels": 24}, "channels=24: must be a multiple of norm_groups=16"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(**fields)
