"""Adversarial losses against PyTorch, and one step's gradients of both networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqd_jax.models import discriminator
from vqd_jax.models.convolution import conv
from vqd_jax.training import adversarial

jax.config.update("jax_numpy_rank_promotion", "raise")

RNG = np.random.default_rng(0)
REAL = RNG.normal(0.5, 1.0, size=(2, 3, 3, 1)).astype(np.float32)
FAKE = RNG.normal(-0.5, 1.0, size=(2, 3, 3, 1)).astype(np.float32)


def test_losses_and_their_gradients_equal_those_of_pytorch():
    torch = pytest.importorskip("torch")
    relu = torch.nn.functional.relu
    state = adversarial.LecamState(jnp.float32(0.3), jnp.float32(-0.2))
    pairs = {
        "discriminator": (
            adversarial.discriminator_hinge,
            lambda r, f: 0.5 * (relu(1 - r).mean() + relu(1 + f).mean()),
        ),
        "generator": (
            lambda r, f: adversarial.generator_hinge(f),
            lambda r, f: -f.mean() + 0 * r.sum(),
        ),
        "lecam": (
            lambda r, f: adversarial.lecam(state, r, f),
            lambda r, f: relu(r + 0.2).pow(2).mean() + relu(0.3 - f).pow(2).mean(),
        ),
    }
    for name, (ours, theirs) in pairs.items():
        value, gradients = jax.value_and_grad(ours, argnums=(0, 1))(REAL, FAKE)
        tensors = [torch.tensor(x, requires_grad=True) for x in (REAL, FAKE)]
        expected = theirs(*tensors)
        expected.backward()
        np.testing.assert_allclose(value, expected.item(), rtol=1e-6, err_msg=name)
        for a, b in zip(gradients, tensors, strict=True):
            np.testing.assert_allclose(a, b.grad.numpy(), rtol=1e-5, atol=1e-8, err_msg=name)


def test_lecam_averages():
    state = adversarial.init_lecam()
    for _ in range(3):
        state = adversarial.update_lecam(state, REAL, FAKE, decay=0.9)
    np.testing.assert_allclose(state.real, (1 - 0.9**3) * REAL.mean(), rtol=1e-5)
    np.testing.assert_allclose(state.fake, (1 - 0.9**3) * FAKE.mean(), rtol=1e-5)
    # No gradient: the averages are constants of a step.
    moved = jax.grad(lambda r: adversarial.lecam(adversarial.LecamState(r, -r), REAL, FAKE))
    assert float(moved(jnp.float32(0.1))) == 0.0
    through = jax.grad(lambda r: adversarial.update_lecam(state, r, FAKE).real)
    np.testing.assert_array_equal(through(jnp.asarray(REAL)), 0.0)


def test_a_balanced_game_has_no_lecam_penalty():
    zeros = np.zeros_like(REAL)
    assert float(adversarial.lecam(adversarial.init_lecam(), zeros, zeros)) == 0.0
    assert float(adversarial.lecam(adversarial.init_lecam(), zeros + 3, zeros)) == 9.0


def test_when_the_adversarial_loss_begins():
    share = [float(adversarial.adversarial_share(jnp.int32(s), 10, 4)) for s in range(8, 17)]
    np.testing.assert_allclose(share, [0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1], rtol=1e-6)
    at_once = [float(adversarial.adversarial_share(jnp.int32(s), 10)) for s in (9, 10, 11)]
    assert at_once == [0.0, 1.0, 1.0]
    assert float(adversarial.adversarial_share(jnp.int32(0), 0)) == 1.0


def test_the_adaptive_weight_is_limited_and_has_no_gradient():
    a = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(adversarial.adaptive_weight(a, a / 5), 5 / (1 + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(adversarial.adaptive_weight(a, a * 0), 1e4)
    np.testing.assert_allclose(adversarial.adaptive_weight(1e9 * a, a), 1e4)
    assert float(jnp.sum(jax.grad(lambda x: adversarial.adaptive_weight(x, a))(a))) == 0.0
    # A tree counts as one vector.
    tree = {"kernel": a[:1], "bias": a[1:]}
    np.testing.assert_allclose(adversarial.adaptive_weight(tree, a), 1.0, rtol=1e-4)


# A step of stage one in small: a decoder of two convolutions and a discriminator.
CONFIG = discriminator.DiscriminatorConfig("patchgan", channels=4, num_layers=2)


def _decode(params, z):
    return conv(jnp.tanh(conv(z, params["first"], padding=1)), params["last"], padding=1)


def _autoencoder_loss(params, judge, z, images, weight):
    decoded = _decode(params, z)
    reconstruction = jnp.mean(jnp.abs(decoded - images))
    gan = adversarial.generator_hinge(discriminator.bind(CONFIG, judge)(decoded))
    return reconstruction + weight * gan, (reconstruction, gan)


def _judge_loss(judge, params, z, images, state):
    logits = discriminator.bind(CONFIG, judge)
    real, fake = logits(images), logits(jax.lax.stop_gradient(_decode(params, z)))
    lecam = adversarial.lecam(state, real, fake)
    return adversarial.discriminator_hinge(real, fake) + 0.05 * lecam


def test_gradients_of_one_step_equal_those_of_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    z, images = draw(2, 16, 16, 5), draw(2, 16, 16, 3)
    params = {"first": 0.1 * draw(3, 3, 5, 8), "last": 0.1 * draw(3, 3, 8, 3)}
    init = jax.jit(discriminator.init_params, static_argnums=0)
    judge = jax.tree.map(lambda x: 5 * x, init(CONFIG, jax.random.key(0)))
    state = adversarial.LecamState(jnp.float32(0.2), jnp.float32(-0.1))

    @jax.jit
    def step(params, judge):
        def part(index):
            loss = lambda last: _autoencoder_loss(  # noqa: E731
                params | {"last": last}, judge, z, images, 0.0
            )[1][index]
            return jax.grad(loss)(params["last"])

        weight = adversarial.adaptive_weight(part(0), part(1))
        ours = jax.grad(_autoencoder_loss, has_aux=True)(params, judge, z, images, 0.8 * weight)[0]
        return weight, ours, jax.grad(_judge_loss)(judge, params, z, images, state)

    weight, ours, ours_judge = step(params, judge)

    def tensor(x):
        x = np.array(x)
        x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x
        return torch.tensor(np.ascontiguousarray(x), requires_grad=True)

    theirs, theirs_judge = (jax.tree.map(tensor, tree) for tree in (params, judge))
    planes = lambda x: torch.tensor(x.transpose(0, 3, 1, 2).copy())  # noqa: E731
    functional = torch.nn.functional

    def logits(x):
        for index in range(3):
            layer, norm = theirs_judge["conv"][index], theirs_judge["norm"].get(index - 1)
            stride = 1 if index == 2 else 2
            x = functional.conv2d(x, layer["kernel"], layer.get("bias"), stride, 1)
            if norm:
                x = functional.batch_norm(x, None, None, norm["scale"], norm["bias"], True)
            x = functional.leaky_relu(x, 0.2)
        layer = theirs_judge["to_logits"]
        return functional.conv2d(x, layer["kernel"], layer["bias"], 1, 1)

    hidden = torch.tanh(functional.conv2d(planes(z), theirs["first"], padding=1))
    decoded = functional.conv2d(hidden, theirs["last"], padding=1)
    reconstruction = (decoded - planes(images)).abs().mean()
    gan = -logits(decoded).mean()
    norms = [
        torch.autograd.grad(loss, theirs["last"], retain_graph=True)[0].norm()
        for loss in (reconstruction, gan)
    ]
    expected = torch.clamp(norms[0] / (norms[1] + 1e-4), 0.0, 1e4).detach()
    np.testing.assert_allclose(weight, expected.item(), rtol=1e-4)
    (reconstruction + 0.8 * expected * gan).backward()
    _compare(ours, theirs)
    for leaf in jax.tree.leaves(theirs_judge):
        leaf.grad = None
    relu = functional.relu
    real, fake = logits(planes(images)), logits(decoded.detach())
    loss = 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())
    lecam = relu(real + 0.1).pow(2).mean() + relu(0.2 - fake).pow(2).mean()
    (loss + 0.05 * lecam).backward()
    _compare(ours_judge, theirs_judge)


def _compare(ours, theirs):
    def compare(a, b):
        b = b.grad.numpy()
        b = b.transpose(2, 3, 1, 0) if b.ndim == 4 else b
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())

    jax.tree.map(compare, ours, theirs)
