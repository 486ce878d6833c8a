"""Perceptual distance: LPIPS against its package, SqueezeNet against PyTorch, properties."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqd_jax.errors import UserError
from vqd_jax.interop import perceptual_files
from vqd_jax.models import perceptual
from vqd_jax.models.perceptual import PerceptualConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

SQUEEZENET = PerceptualConfig()
RNG = np.random.default_rng(0)
A = RNG.uniform(-1, 1, size=(2, 32, 32, 3)).astype(np.float32)
B = np.clip(A + 0.3 * RNG.normal(size=A.shape), -1, 1).astype(np.float32)


@functools.partial(jax.jit, static_argnames="config")
def distance(params, a, b, config=SQUEEZENET):
    return perceptual.distance(params, a, b, config=config)


@functools.partial(jax.jit, static_argnames="config")
def gradient(params, a, b, config=SQUEEZENET):
    return jax.grad(lambda a: perceptual.distance(params, a, b, config=config).sum())(a)


@pytest.fixture(scope="module")
def squeezenet():
    config, params = perceptual_files.load("squeezenet")
    assert config == SQUEEZENET
    return params


def _planes(torch, x):
    return torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)


@pytest.mark.parametrize(
    "old", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["zip", "before 1.6"]
)
def test_lpips_equals_its_package_on_a_torchvision_file(tmp_path, old, monkeypatch):
    torch, lpips = pytest.importorskip("torch"), pytest.importorskip("lpips")
    torch.manual_seed(0)
    networks = pytest.importorskip("torchvision.models.vgg")
    # The classifier, which LPIPS leaves out, has 124 million random numbers.
    trunk = types.SimpleNamespace(features=networks.make_layers(networks.cfgs["D"]))
    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda pretrained: trunk)
    theirs = lpips.LPIPS(pnet_rand=True, net="vgg", verbose=False)
    # The slices of its trunk keep the places of torchvision's "features".
    state = {
        f"features.{name.split('.', 1)[1]}": value
        for name, value in theirs.net.state_dict().items()
    }
    path = tmp_path / "vgg16-0.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    config, params = perceptual_files.load("vgg16", path)
    a, b = A[:, :16, :16], B[:, :16, :16]
    pixels = _planes(torch, a)
    expected = theirs(pixels, _planes(torch, b))
    expected.sum().backward()
    np.testing.assert_allclose(
        distance(params, a, b, config), expected.detach().numpy().reshape(-1), rtol=1e-4
    )
    if not old:
        wanted = pixels.grad.permute(0, 2, 3, 1).numpy()
        ours = gradient(params, a, b, config)
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_squeezenet_equals_pytorch(squeezenet):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    def conv(x, layer, **options):
        kernel = torch.tensor(np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1)))
        return functional.conv2d(x, kernel, torch.tensor(layer["bias"]), **options).relu()

    def pool(x):
        return functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), value=-np.inf), 3, 2)

    def layers(x):
        means = torch.tensor([103.94, 116.78, 123.68])[None, :, None, None]
        x = conv(x.flip(1) * 127.5 + 127.5 - means, squeezenet["conv1"], stride=2, padding=1)
        seen = [x]
        for index in range(8):
            fire = squeezenet["fire"][index]
            x = conv(pool(x) if index in (0, 2, 4) else x, fire["squeeze"])
            x = torch.cat([conv(x, fire["expand1"]), conv(x, fire["expand3"], padding=1)], 1)
            if index in (1, 3, 4, 5, 6, 7):
                seen.append(x)
        return [*seen, conv(x, squeezenet["conv10"])]

    pixels, total = _planes(torch, A), 0
    for a, b in zip(layers(pixels), layers(_planes(torch, B)), strict=True):
        a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
        total = total + (a - b).square().sum(1).mean((1, 2)) / 8
    total.sum().backward()
    np.testing.assert_allclose(distance(squeezenet, A, B), total.detach().numpy(), rtol=1e-4)
    wanted = pixels.grad.permute(0, 2, 3, 1).numpy()
    ours = gradient(squeezenet, A, B)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["squeezenet", "random"])
def test_the_distance_grows_with_noise_and_with_blur(name):
    params = perceptual_files.load(name)[1]
    noise = RNG.normal(size=A.shape).astype(np.float32)
    smooth = np.repeat(np.repeat(A[:, ::4, ::4], 4, axis=1), 4, axis=2)
    found = [distance(params, smooth, smooth + amount * noise) for amount in (0, 0.02, 0.1, 0.5)]
    np.testing.assert_allclose(found[0], 0.0, atol=1e-12)
    assert (np.diff(np.array(found), axis=0) > 0).all()
    np.testing.assert_allclose(distance(params, A, B), distance(params, B, A), rtol=1e-5)


def test_gradients_are_finite_where_features_vanish(squeezenet):
    # Random parameters without biases see nothing in a picture of the mean colour.
    blank = np.zeros((2, 32, 32, 3), np.float32)
    silent = jax.tree.map(np.zeros_like, squeezenet)
    for params in (squeezenet, silent):
        assert np.isfinite(gradient(params, blank, blank + 0.1)).all()
        np.testing.assert_allclose(gradient(params, blank, blank), 0.0, atol=1e-8)


def test_every_pixel_counts(squeezenet):
    moved = gradient(squeezenet, A, B)
    assert (np.abs(moved).max(axis=-1) > 0).all()


@pytest.mark.slow
def test_bfloat16_changes_the_distance_by_rounding(squeezenet):
    exact, config = distance(squeezenet, A, B), PerceptualConfig(dtype="bfloat16")
    rounded = distance(squeezenet, A, B, config)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, rtol=0.05)


def test_the_packaged_network_is_whole(squeezenet):
    # 1,235,496 numbers, as published.
    assert sum(x.size for x in jax.tree.leaves(squeezenet)) == 1_235_496


def test_wrong_pictures_and_networks_are_refused(squeezenet, tmp_path):
    with pytest.raises(AssertionError):
        distance(squeezenet, A, B[:, :16])
    with pytest.raises(ValueError, match=r"pictures of \(4, 4\) pixels: squeezenet needs 8"):
        distance(squeezenet, A[:, :4, :4], B[:, :4, :4])
    with pytest.raises(ValueError, match="network='alexnet'"):
        PerceptualConfig("alexnet")
    with pytest.raises(UserError, match="'alexnet': must be one of squeezenet, random, vgg16"):
        perceptual_files.load("alexnet")
    for name, path in (("vgg16", ""), ("squeezenet", "some.pth")):
        with pytest.raises(UserError, match="vgg16 needs the path of torchvision's"):
            perceptual_files.load(name, path)
    with pytest.raises(UserError, match="nothing.pth is not a file"):
        perceptual_files.load("vgg16", tmp_path / "nothing.pth")


def test_another_file_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3)}, path)
    with pytest.raises(
        UserError, match="other.pth is not torchvision's VGG16: it lacks features.0.b"
    ):
        perceptual_files.load("vgg16", path)
