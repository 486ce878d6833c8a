"""Published layouts of CLIP give the published numbers; golden/README.md tells their origin."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from vqd_jax.errors import UserError
from vqd_jax.interop import clip_files as clip
from vqd_jax.interop import tables, tensors, torch_file
from vqd_jax.models import clip as clip_model
from vqd_jax.models.clip import PIXEL_MEAN, PIXEL_STD
from vqd_jax.models.text_encoder import TextEncoder

sys.path.insert(0, str(Path(__file__).parent))
from torch_writer import Call, tensor, write  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parents[1] / "golden"
HEADS = dict(text_heads=3, image_heads=2)


@pytest.fixture(scope="module")
def numbers():
    return np.load(GOLDEN / "clip.npz")


@pytest.fixture(scope="module")
def huggingface():
    found = tensors.read_safetensors(GOLDEN / "clip.safetensors")
    return {name: np.asarray(tensor) for name, tensor in found.items()}


@pytest.fixture(scope="module")
def openai(huggingface):
    """The same weights under OpenAI's names, written down independently of the tables."""
    positions = "positional_embedding"
    renamed = {}
    for name, array in huggingface.items():
        for old, new in (
            (r"text_model\.embeddings\.token_embedding", "token_embedding"),
            (r"text_model\.embeddings\.position_embedding\.weight", positions),
            (r"text_model\.final_layer_norm", "ln_final"),
            (r"text_model\.encoder\.layers", "transformer.resblocks"),
            (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
            (r"vision_model\.embeddings\.patch_embedding", "visual.conv1"),
            (
                r"vision_model\.embeddings\.position_embedding\.weight",
                "visual.positional_embedding",
            ),
            (r"vision_model\.pre_layrnorm", "visual.ln_pre"),
            (r"vision_model\.post_layernorm", "visual.ln_post"),
            (r"vision_model\.encoder\.layers", "visual.transformer.resblocks"),
            (r"self_attn\.out_proj", "attn.out_proj"),
            (r"layer_norm", "ln_"),
            (r"mlp\.fc1", "mlp.c_fc"),
            (r"mlp\.fc2", "mlp.c_proj"),
        ):
            name = re.sub(old, new, name)
        renamed[name] = array
    renamed["text_projection"] = renamed.pop("text_projection.weight").T
    renamed["visual.proj"] = renamed.pop("visual_projection.weight").T
    for name in [n for n in renamed if ".self_attn.q_proj." in n]:
        parts = [renamed.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        name = re.sub(r"self_attn\.q_proj\.(weight|bias)", r"attn.in_proj_\1", name)
        renamed[name] = np.concatenate(parts)
    return {name: np.asarray(array, order="C") for name, array in renamed.items()}


def check(config, params, numbers):
    model = clip_model.bind(config, params)
    # The golden pixels themselves: how Pillow resizes is not a matter of the files.
    pixels = numbers["pixels"].transpose(0, 2, 3, 1) * PIXEL_STD + PIXEL_MEAN
    pictures = np.round(pixels * 255.0).astype(np.uint8)
    text, image = model.embed_text(numbers["ids"]), model.embed_images(pictures)
    np.testing.assert_allclose(model.text(numbers["ids"]), numbers["text_states"], atol=5e-6)
    np.testing.assert_allclose(text, numbers["text_embedding"], atol=5e-6)
    np.testing.assert_allclose(image, numbers["image_embedding"], atol=5e-6)
    scale = np.exp(model.logit_scale[...])
    np.testing.assert_allclose(text @ image.T * scale, numbers["logits_per_text"], atol=1e-4)


def test_hugging_face(huggingface, numbers):
    config, params, used = clip.read(huggingface, "clip", **HEADS)
    assert used == set(huggingface)
    assert config.image.image_size == 16 and config.text.vocab_size == 40
    check(config, params, numbers)


def test_openai(openai, numbers):
    config, params, used = clip.read(openai, "clip", **HEADS)
    assert used == set(openai)
    check(config, params, numbers)


def test_open_clip_with_a_text_module_of_its_own(openai, numbers):
    moved = {
        name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": array
        for name, array in openai.items()
    }
    config, params, used = clip.read(moved, "clip", **HEADS)
    assert used == set(moved)
    check(config, params, numbers)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_text_model_on_its_own(huggingface, numbers, prefix):
    tower = {prefix + n: x for n, x in tables.under(huggingface, "text_model.").items()}
    config, params, used = clip.read_text_encoder(tower, "clip", num_heads=3, normalize=False)
    assert used == set(tower)
    features = TextEncoder(config, rngs=nnx.Rngs(0))
    nnx.update(features, params)
    np.testing.assert_allclose(features(numbers["ids"]), numbers["text_states"], atol=5e-6)
    with pytest.raises(UserError, match="it is no whole CLIP"):
        clip.read(tower, "clip")


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_the_text_tower_in_a_published_checkpoint(weights):
    found = torch_file.load(GOLDEN / "text_model.pth")[weights]
    prefix = "condition_emb." if weights == "ema" else "transformer.condition_emb."
    found = tables.under(found, prefix)
    config, params, used = clip.read_text_encoder(found, "text_model.pth")
    assert set(found) - used == {"text_projection"}
    assert (config.vocab_size, config.width, config.num_heads) == (600, 64, 1)
    model = TextEncoder(config, rngs=nnx.Rngs(0))
    nnx.update(model, params)
    numbers = np.load(GOLDEN / "text_model.npz")
    features = model(numbers["text_ids"])
    np.testing.assert_allclose(features, numbers["clip_features"], atol=5e-6)
    np.testing.assert_allclose(features[1:2], numbers["clip_features_half"], atol=2e-3)


def test_the_text_encoder_of_a_diffusers_pipeline():
    folder, numbers = GOLDEN / "diffusers_pipeline", np.load(GOLDEN / "diffusers_pipeline.npz")
    found = clip.open_weights(folder / "text_encoder")
    heads = json.loads((folder / "text_encoder" / "config.json").read_text())["num_attention_heads"]
    config, params, used = clip.read_text_encoder(found, "text_encoder", num_heads=heads)
    assert used == set(found)
    model = TextEncoder(config, rngs=nnx.Rngs(0))
    nnx.update(model, params)
    np.testing.assert_allclose(model(numbers["text_ids"]), numbers["text_embeds"], atol=5e-6)


def test_tables_write_what_they_read(huggingface, openai):
    for source, rows in (
        (tables.under(huggingface, "text_model."), clip.HUGGINGFACE_TEXT),
        (openai, clip.OPENAI_TEXT),
    ):
        _, params, used = clip.read_text_encoder(source, "clip", num_heads=3)
        written = tables.write(rows, params)
        assert set(written) == used
        for name, array in written.items():
            np.testing.assert_array_equal(array, source[name])


def script_module(flat):
    """Nested modules as TorchScript stores them."""
    state = {}
    for name, value in flat.items():
        head, _, rest = name.partition(".")
        if rest:
            state.setdefault(head, {})[rest] = value
        else:
            state[head] = value
    return {
        name: Call(f"__torch__ {name}_", state=script_module(value))
        if isinstance(value, dict)
        else value
        for name, value in state.items()
    }


def test_openais_archive(tmp_path, openai, numbers):
    """Half precision, modules instead of a dictionary, three integers beside the weights."""
    stored = {}
    for index, (name, array) in enumerate(openai.items()):
        stored[name] = tensor("HalfStorage", array.astype(np.float16), str(index))
    stored["context_length"] = tensor("LongStorage", np.array(12), "sizes")
    write(tmp_path / "ViT.pt", Call("__torch__ Multimodal", state=script_module(stored)))
    found = clip.open_weights(tmp_path / "ViT.pt")
    config, params, used = clip.read(found, "ViT.pt", **HEADS)
    tables.require_all_used(found, used, clip.IGNORED, "ViT.pt")
    ids = numbers["ids"]
    text = clip_model.bind(config, params).embed_text(ids)
    np.testing.assert_allclose(text, numbers["text_embedding"], atol=2e-3)


def test_a_folder_with_its_number_of_heads(tmp_path, huggingface, numbers):
    folder = tmp_path / "clip"
    folder.mkdir()
    save_file(huggingface, folder / "model.safetensors")
    towers = {
        f"{tower}_config": {"num_attention_heads": heads, "hidden_act": "quick_gelu"}
        for tower, heads in (("text", 3), ("vision", 2))
    }
    (folder / "config.json").write_text(json.dumps(towers))
    check(*clip.load(folder), numbers)
    towers["vision_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(towers))
    with pytest.raises(UserError, match="activation gelu, not quick_gelu"):
        clip.load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not that of a CLIP"):
        clip.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has neither model.safetensors nor pytorch_model.bin"):
        clip.load(folder)


def test_training_checkpoints_of_several_devices(tmp_path, openai):
    stored = {
        f"module.{name}": tensor("FloatStorage", array, str(index))
        for index, (name, array) in enumerate(openai.items())
    }
    write(tmp_path / "epoch_1.pt", {"epoch": 1, "state_dict": stored})
    assert set(clip.open_weights(tmp_path / "epoch_1.pt")) == set(openai)


def test_left_over_and_foreign_tensors_are_named(tmp_path, openai):
    save_file(openai | {"visual.extra": np.zeros(2)}, tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match=r"no place for: visual\.extra"):
        clip.load(tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match="is not a CLIP: it has none of token_embedding.weight"):
        clip.read({"encoder.conv_in.weight": np.zeros(3)}, "vqgan.pth")
    resnet = {name: x for name, x in openai.items() if not name.startswith("visual.conv1")}
    with pytest.raises(UserError, match="no image tower of a vision transformer"):
        clip.read(resnet, "RN50.pt")


def test_live_against_transformers(tmp_path):
    """Another random model, saved by the library that is installed, in both of its formats."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    text = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    vision = text | dict(image_size=8, patch_size=4)
    text |= dict(vocab_size=30, max_position_embeddings=8, eos_token_id=29, bos_token_id=28)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    torch.save(model.state_dict(), tmp_path / "clip.bin")
    ids = np.array([[28, 3, 7, 29, 0, 0, 0, 0], [28, 29, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = model.text_model(torch.tensor(ids)).last_hidden_state.numpy()
    config, params = clip.load(tmp_path / "clip")
    np.testing.assert_allclose(clip_model.bind(config, params).text(ids), expected, atol=5e-6)
    found = clip.open_weights(tmp_path / "clip.bin")
    again = clip.read(found, "clip.bin", text_heads=2, image_heads=2)[1]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
