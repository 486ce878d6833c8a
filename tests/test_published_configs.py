"""The configs of the published sizes, built under ``eval_shape``."""

import importlib

import jax
import pytest

from vqd_jax import config as config_lib
from vqd_jax.data import text
from vqd_jax.models import autoencoder, conditioned

# Parameters of the denoiser, its grid, and parameters of the image tokenizer with its codebook.
SIZES = {
    "coco": (388_780_871, 32, 68_995_971),
    "cub": (388_780_871, 32, 68_995_971),
    "oxford102": (388_780_871, 32, 68_995_971),
    "cub_small": (35_936_647, 32, 68_995_971),
    "folder": (35_936_647, 32, 68_995_971),
    "ithq": (1_359_274_624, 32, 63_485_379 + 4096 * 128),
    "imagenet": (518_037_966, 16, 76_073_859),
    "ffhq": (411_185_664, 16, 72_141_699),
    "vqgan_f8": (37_979_072, 32, 66_890_627),
    "vqgan_openimages": (399_650_816, 32, 68_995_971),
    "vqgan_imagenet": (533_833_216, 16, 76_073_859),
    "vqgan_ffhq": (411_185_664, 16, 72_141_699),
}


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config_lib.validate(config)
    denoiser, grid, codec = SIZES[name]
    sizes = config_lib.model_config(config)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: conditioned.init_params(sizes, key))
    assert count(shapes["denoiser"]) == denoiser
    assert sizes.denoiser.grid == (grid, grid)
    if sizes.text_encoder is not None:
        assert count(shapes["text_encoder"]) == 63_428_096 - 512 * 512
        assert shapes["null_text"].shape == (77, 512)
    codec_shapes = autoencoder.abstract_params(config_lib.autoencoder_config(config))
    # The remap is a table of whole numbers beside the network.
    assert count({k: v for k, v in codec_shapes.items() if k != "remap"}) == codec


def test_the_first_imagenet_model_has_no_null_class():
    config = importlib.import_module("configs.imagenet").get_config()
    config.denoiser.learned_null = False
    sizes = config_lib.model_config(config)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: conditioned.init_params(sizes, key))
    assert count(shapes["denoiser"]) == 518_025_678


def test_configs_know_the_tokenizer():
    # The data stands above the configs, which cannot import it.
    assert config_lib.VOCAB_SIZE == text.VOCAB_SIZE
