import pathlib
import shutil

import numpy as np
import pytest

from vqd_jax.errors import UserError
from vqd_jax.interop import convert, folder, published_yaml

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
# The fields that matter, in the layout of the published configs.
CONFIG = """
model:
  target: image_synthesis.modeling.models.conditional_dalle.C_DALLE
  params:
    content_codec_config:
      target: image_synthesis.modeling.codecs.image_codec.taming_gumbel_vqvae.TamingVQVAE
      params:
        config_path: OUTPUT/pretrained_model/class_model_codec.yaml
        quantize_number: 21
        mapping_path: help_folder/statistics/class_model_mapping.pt
    diffusion_config:
      params:
        transformer_config:
          params:
            n_layer: 2
            n_head: 4
        content_emb_config:
          params:
            spatial_size: !!python/tuple
            - 4
            - 4
"""
CODEC = "model:\n  params:\n    ddconfig:\n      resolution: 8\n"


@pytest.fixture
def released(tmp_path):
    """A checkpoint with its config, tokenizer's config and remap, as they are downloaded."""
    for name in ("class_model.pth", "class_model_mapping.pt"):
        shutil.copy(GOLDEN / name, tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "class_model_codec.yaml").write_text(CODEC)
    return tmp_path / "class_model.pth"


def test_the_config_beside_a_checkpoint_is_as_good_as_flags(released, tmp_path):
    options = {"num_heads": 4, "image_size": 8, "remap": str(GOLDEN / "class_model_mapping.pt")}
    convert.convert(str(GOLDEN / "class_model.pth"), str(tmp_path / "flags"), **options)
    convert.convert(str(released), str(tmp_path / "config"))
    found, wanted = (folder.read_shards(tmp_path / name, "model") for name in ("config", "flags"))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in found)
    assert folder.load_config(tmp_path / "config") == folder.load_config(tmp_path / "flags")


def test_a_remap_that_is_not_there_is_named(released, tmp_path):
    (tmp_path / "class_model_mapping.pt").unlink()
    with pytest.raises(UserError, match="asks for the remap .*/class_model_mapping.pt"):
        convert.convert(str(released), str(tmp_path / "target"))


def test_a_config_cannot_run_code_and_need_not_be_there(released):
    released.with_suffix(".yaml").write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="class_model.yaml beside the checkpoint cannot be read"):
        published_yaml.beside(str(released))
    released.with_suffix(".yaml").write_text("[1, 2]")
    assert published_yaml.beside(str(released)) == published_yaml.Described()
    assert published_yaml.beside(str(GOLDEN / "class_model.pth")) == published_yaml.Described()
