"""The networks give what PyTorch gives with the same weights; wrong files are told in one line."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from vqd_jax.data.text import ClipTokenizer
from vqd_jax.errors import UserError
from vqd_jax.evaluation import features, inception
from vqd_jax.interop import clip_files, convert, folder, tensors
from vqd_jax.models.clip import PIXEL_MEAN, PIXEL_STD, resize_and_crop

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parents[1] / "golden"


def pictures(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def randomise(model, torch):
    """Random weights, and statistics of batch norm such that every layer is alive."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape, scale=1.0, shift=0.0):
        return torch.randn(shape, generator=generator) * scale + shift

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                fan = module.weight[0].numel()
                module.weight.copy_(draw(module.weight.shape, (2 / fan) ** 0.5))
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.weight.copy_(draw(module.weight.shape, 0.1, 1.0))
                module.bias.copy_(draw(module.bias.shape, 0.1))
                module.running_mean.copy_(draw(module.bias.shape, 0.1))
                module.running_var.copy_(draw(module.bias.shape).abs() * 0.2 + 0.9)
    return model.eval()


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """(torch-fidelity's network with random weights, its file)."""
    torch = pytest.importorskip("torch")
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    network = fidelity.FeatureExtractorInceptionV3.__new__(fidelity.FeatureExtractorInceptionV3)
    original, fidelity.load_state_dict_from_url = fidelity.load_state_dict_from_url, None
    loaded, load = torch.nn.Module.load_state_dict, lambda self, *_: None
    try:
        # Its constructor fetches weights, which are replaced anyway.
        fidelity.load_state_dict_from_url = lambda *_, **__: {}
        fidelity.FeatureExtractorInceptionV3.load_state_dict = load
        network.__init__("inception", ["2048"])
    finally:
        fidelity.load_state_dict_from_url = original
        fidelity.FeatureExtractorInceptionV3.load_state_dict = loaded
    torch.save(randomise(network, torch).state_dict(), path)
    return network, path


def test_inception_is_torch_fidelitys(inception_file):
    import torch

    network, path = inception_file
    net = features.inception_v3(path, expected="")
    pixels = pictures(2, 32)
    with torch.no_grad():
        (expected,) = network(torch.tensor(pixels.transpose(0, 3, 1, 2)))
    assert relative(net.features(pixels), expected.numpy()) < 1e-4
    assert net.name == "inception-v3-tensorflow" and net.sha256 == features.sha256(path)


@pytest.mark.slow
def test_inception_is_pytorch_fids(inception_file):
    import torch

    fid = pytest.importorskip("pytorch_fid.inception")
    _, path = inception_file
    original = fid.load_state_dict_from_url
    weights = torch.load(path, weights_only=True)
    fid.load_state_dict_from_url = lambda *_, **__: weights
    try:
        network = fid.InceptionV3([3]).eval()
    finally:
        fid.load_state_dict_from_url = original
    pixels = pictures(2, 40, 1)
    with torch.no_grad():
        (expected,) = network(torch.tensor(pixels.transpose(0, 3, 1, 2)).float() / 255)
    net = features.inception_v3(path, "pytorch", expected="")
    assert relative(net.features(pixels), expected[..., 0, 0].numpy()) < 1e-4


@pytest.mark.parametrize("side", [8, 32, 299, 400])
def test_the_resize_is_tensorflows(side):
    torch = pytest.importorskip("torch")
    compat = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    pixels = pictures(2, side)
    there = torch.tensor(pixels.transpose(0, 3, 1, 2)).float()
    expected = compat.interpolate_bilinear_2d_like_tensorflow1x(
        there, size=(299, 299), align_corners=False
    )
    found = inception.resize_bilinear(pixels, 299, 0.0)
    np.testing.assert_array_equal(found, expected.numpy().transpose(0, 2, 3, 1))
    expected = torch.nn.functional.interpolate(
        there / 255, size=(299, 299), mode="bilinear", align_corners=False
    )
    found = inception.resize_bilinear(pixels.astype(np.float32) / 255, 299, 0.5)
    # Of values in 0..1: PyTorch adds in another order.
    np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), atol=2e-5)


def test_mobilenet_is_torchvisions(tmp_path):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    network = randomise(torchvision.models.mobilenet_v2(weights=None), torch)
    torch.save(network.state_dict(), tmp_path / "mobilenet.pth")
    pixels = pictures(2, 64)
    mean, std = (
        torch.tensor(c)[:, None, None] for c in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with torch.no_grad():
        x = (torch.tensor(pixels.transpose(0, 3, 1, 2)).float() / 255 - mean) / std
        expected = network.features(x).mean(dim=(2, 3)).numpy()
    net = features.mobilenet_v2(tmp_path / "mobilenet.pth", size=64)
    assert relative(net.features(pixels), expected) < 1e-4


def saved_clip(where, config, params):
    described = {"kind": "clip", **dataclasses.asdict(config)}
    files = ClipTokenizer(config.text.context_length).files("tokenizer")
    folder.save(where, described, params, files=files)
    return features.Clip(where)


def test_clip_features_and_score_are_the_published_ones(tmp_path):
    """tests/golden/README.md tells the origin of the numbers."""
    found = tensors.read_safetensors(GOLDEN / "clip.safetensors")
    config, params, _ = clip_files.read(found, "clip", text_heads=3, image_heads=2)
    numbers = np.load(GOLDEN / "clip.npz")
    both = saved_clip(tmp_path / "clip", config, params)
    picture = numbers["picture_16x16"][None]
    image = np.asarray(both.images.features(picture))
    assert relative(image, numbers["image_embedding"][:1]) < 1e-5
    # The cosine of transformers, which its logits are times a factor.
    factor = np.exp(np.asarray(found["logit_scale"]))
    expected = numbers["logits_per_text"][:, 0] / factor
    np.testing.assert_allclose(numbers["text_embedding"] @ image[0], expected, atol=1e-5)
    # Of another size: Pillow's bicubic filter, up to rounding.
    image = np.asarray(both.images.features(pictures(1, 40)))
    resized = resize_and_crop(pictures(1, 40)[0], 16)[None]
    assert relative(image, np.asarray(both.images.features(resized))) < 0.02


def test_clip_texts_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    vision = text | dict(image_size=16, patch_size=8)
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).eval()
    model.save_pretrained(tmp_path / "source")
    convert.convert(str(tmp_path / "source"), str(tmp_path / "clip"))
    both = features.Clip(tmp_path / "clip")
    words = ["a red heart", "a black cat"]
    ids = torch.tensor(ClipTokenizer().encode_batch(words).astype(np.int64))
    pixels = pictures(2, 16)
    with torch.no_grad():
        standard = (pixels / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
        there = torch.tensor(standard.transpose(0, 3, 1, 2)).float()
        seen = model(input_ids=ids, pixel_values=there)
    np.testing.assert_allclose(both.texts(words), seen.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(both.images.features(pixels), seen.image_embeds.numpy(), atol=1e-5)
    assert both.images.name == "clip-vit-32w8-16" and both.images.width == 16


def test_random_features_differ_by_seed():
    pixels = pictures(2, 32)
    first, second = (features.random_net(seed=seed) for seed in (0, 1))
    assert np.asarray(first.features(pixels)).shape == (2, first.width)
    np.testing.assert_array_equal(first.features(pixels), features.random_net().features(pixels))
    assert not np.allclose(first.features(pixels), second.features(pixels))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: features.inception_v3(p / "no.pth", expected=""), "no.pth is not a file"),
        (
            lambda p: features.inception_v3(p / "wrong.pth", expected="6726825d"),
            "should have 6726825d",
        ),
        (lambda p: features.inception_v3(p / "wrong.pth", expected=""), "is not a PyTorch file"),
        (lambda p: features.mobilenet_v2(p / "wrong.pth"), "is not a PyTorch file"),
        (lambda p: features.Clip(p), "is not a model folder"),
    ],
)
def test_wrong_files_are_told_in_one_line(tmp_path, make, message):
    (tmp_path / "wrong.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)
