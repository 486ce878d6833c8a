"""CLIP from its published files: OpenAI's archives, Hugging Face's folders, open_clip's files.

The weights must be OpenAI's in any of these formats. Other networks may have another activation,
which no tensor tells.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vqd_jax.errors import UserError
from vqd_jax.interop import folder, tables, tensors, torch_file
from vqd_jax.interop.tables import Row
from vqd_jax.models import clip, text_encoder
from vqd_jax.models.clip import ClipConfig, ImageEncoderConfig
from vqd_jax.models.text_encoder import TextEncoderConfig

# Tensors that are constants of the network: sizes, masks, positions.
IGNORED = (
    r"input_resolution|context_length|vocab_size",
    r"(.*\.)?attn_mask",
    r"(.*\.)?position_ids",
)


# Our module, its kind, its name in OpenAI's files and in those of Hugging Face: of a layer, of the
# text tower and of the image tower.
_BLOCK = (
    ("norm_attention", "norm", "ln_1", "layer_norm1"),
    ("norm_mlp", "norm", "ln_2", "layer_norm2"),
    ("mlp_in", "linear", "mlp.c_fc", "mlp.fc1"),
    ("mlp_out", "linear", "mlp.c_proj", "mlp.fc2"),
)
_TEXT = (
    ("token_embedding", "embedding", "token_embedding", "embeddings.token_embedding"),
    ("position_embedding", "array", "positional_embedding", "embeddings.position_embedding.weight"),
    ("norm_out", "norm", "ln_final", "final_layer_norm"),
)
_IMAGE = (
    ("patch_embedding", "plain_conv", "conv1", "embeddings.patch_embedding"),
    ("class_embedding", "array", "class_embedding", "embeddings.class_embedding"),
    ("position_embedding", "array", "positional_embedding", "embeddings.position_embedding.weight"),
    ("norm_in", "norm", "ln_pre", "pre_layrnorm"),  # Their spelling.
    ("norm_out", "norm", "ln_post", "post_layernorm"),
)
_OPENAI_LAYERS, _HUGGINGFACE_LAYERS = "transformer.resblocks.", "encoder.layers."
# OpenAI packs queries, keys and values.
_PACKED = [
    Row(f"attention.{ours}.{kind}", f"attn.in_proj_{theirs}", layout, (index, 3))
    for index, ours in enumerate(("query", "key", "value"))
    for kind, theirs, layout in (("kernel", "weight", "linear"), ("bias", "bias", "same"))
] + tables.modules(("attention.proj", "attn.out_proj", "linear"))
_APART = tables.modules(
    *tables.attention("attention", "self_attn", "q_proj k_proj v_proj out_proj")
)


def _rows(tower: Sequence[tuple], column: int, layers: str, attention: list[Row]) -> list[Row]:
    """The rows of a tower; their names are in this column of the tables."""
    rest, block = (
        tables.modules(*((module[0], module[column], module[1]) for module in table))
        for table in (tower, _BLOCK)
    )
    return rest + tables.prefixed(block + attention, "blocks.", layers + "{i}.")


_openai = functools.partial(_rows, column=2, layers=_OPENAI_LAYERS, attention=_PACKED)
_huggingface = functools.partial(_rows, column=3, layers=_HUGGINGFACE_LAYERS, attention=_APART)
# The text tower alone, which published VQ-Diffusion files hold too.
OPENAI_TEXT, HUGGINGFACE_TEXT = _openai(_TEXT), _huggingface(_TEXT)


class _Layout(NamedTuple):
    """How one library names the tensors; ``text`` and ``image`` are its prefixes of the towers."""

    text: str
    text_rows: list[Row]
    layers: str
    image: str
    image_rows: list[Row]
    projections: list[Row]


_OPENAI = _Layout(
    "",
    OPENAI_TEXT,
    _OPENAI_LAYERS,
    "visual.",
    _openai(_IMAGE),
    [Row("text_projection", "text_projection"), Row("image_projection", "visual.proj")],
)
# In open_clip the text tower is a module of its own.
_OPEN_CLIP = _OPENAI._replace(
    text="text.",
    projections=[Row("text_projection", "text.text_projection"), _OPENAI.projections[1]],
)
_HUGGINGFACE = _Layout(
    "text_model.",
    HUGGINGFACE_TEXT,
    _HUGGINGFACE_LAYERS,
    "vision_model.",
    _huggingface(_IMAGE),
    [
        Row("text_projection", "text_projection.weight", "linear"),
        Row("image_projection", "visual_projection.weight", "linear"),
    ],
)
# Newer releases save a text model on its own without the prefix.
_HUGGINGFACE_BARE = _HUGGINGFACE._replace(text="")
_LAYOUTS = (_OPENAI, _OPEN_CLIP, _HUGGINGFACE, _HUGGINGFACE_BARE)


def load(path: str | Path) -> tuple[ClipConfig, Any]:
    """A CLIP with both towers, from one file or folder.

    Args:
      path: OpenAI's ``ViT-B-32.pt``, a ``.pt``, ``.bin`` or ``.safetensors`` file of a state dict,
        or a Hugging Face folder.

    Returns:
      The sizes, and parameters for ``models.clip.bind``: NumPy arrays in float32.

    Raises:
      UserError: the file is missing, damaged, not a CLIP, or has tensors left over.
    """
    found = open_weights(path)
    config, params, used = read(found, str(path), **_heads(Path(path)))
    tables.require_all_used(found, used, IGNORED, str(path))
    return config, params


def open_weights(path: str | Path) -> dict[str, tensors.Tensor]:
    """The tensors by name of a file or folder that ``load`` takes; their values stay there."""
    path = Path(path)
    if path.is_dir():
        return folder.read_weights(path, "model", "pytorch_model.bin")
    if path.suffix == ".safetensors":
        return tensors.read_safetensors(path)
    return torch_file.named_tensors(torch_file.load(path))


def _heads(path: Path) -> dict[str, int]:
    """Numbers of heads, which no tensor tells, if the folder has a config with them."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        towers = {"text": config["text_config"], "image": config["vision_config"]}
        for tower in towers.values():
            require_quick_gelu(tower, path)
        return {
            f"{name}_heads": tower["num_attention_heads"]
            for name, tower in towers.items()
            if "num_attention_heads" in tower
        }
    except OSError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}/config.json is not that of a CLIP: {error!r}") from error


def require_quick_gelu(described: Mapping[str, Any], source: str | Path) -> None:
    """Raises ``UserError`` if a tower's config asks for another activation than OpenAI's."""
    if (found := described.get("hidden_act", "quick_gelu")) != "quick_gelu":
        raise UserError(f"{source} has the activation {found}, not quick_gelu")


def require_normalized(config: TextEncoderConfig) -> None:
    """Refuses a text encoder whose features another program would scale to length 1.

    Raises:
      UserError: ``text_encoder.normalize`` is off.
    """
    if not config.normalize:
        raise UserError(
            "this layout belongs to code that scales text features to length 1, and this model was "
            "trained without (config.text_encoder.normalize=False): its pictures would be wrong "
            "there; format='vqd_jax' holds it"
        )


def read_text_encoder(
    found: Mapping[str, Any], source: str, *, num_heads: int | None = None, normalize: bool = True
) -> tuple[TextEncoderConfig, Any, set[str]]:
    """The text tower of a whole CLIP, or on its own.

    Args:
      found: tensors by name, in any of the layouts.
      source: path or other name of the source, for messages.
      num_heads: None takes a head for every 64 of the width, as in all published towers.
      normalize: of the config; VQ-Diffusion normalises the features.

    Returns:
      The sizes, parameters for ``TextEncoder`` as NumPy arrays in float32, and the names used.

    Raises:
      UserError: this is not a CLIP, or a tensor is missing or of another shape.
    """
    layout = _recognise(found, source)
    config = _text_config(found, layout, num_heads, normalize)
    rows = tables.prefixed(layout.text_rows, theirs=layout.text)
    params, used = tables.read(rows, found, text_encoder.abstract_params(config), source)
    return config, params, used


def read(
    found: Mapping[str, Any],
    source: str,
    *,
    text_heads: int | None = None,
    image_heads: int | None = None,
) -> tuple[ClipConfig, Any, set[str]]:
    """Both towers, the projections and the logit scale.

    Args:
      found: tensors by name, in any of the layouts.
      source: path or other name of the source, for messages.
      text_heads, image_heads: None takes a head for every 64 of the width.

    Returns:
      The sizes, parameters for ``models.clip.bind`` as NumPy arrays in float32, the names used.

    Raises:
      UserError: this is not a CLIP, or a tensor is missing or of another shape.
    """
    layout = _recognise(found, source)
    text, image = layout.projections
    for name in (text.theirs, image.theirs):
        if name not in found:
            raise UserError(f"{source} has a text tower, but lacks {name}: it is no whole CLIP")
    config = ClipConfig(
        text=_text_config(found, layout, text_heads, normalize=False),
        image=_image_config(found, layout, image_heads, source),
        embedding_width=_width(found[text.theirs], text),
    )
    rows = [
        *tables.prefixed(layout.text_rows, "text.", layout.text),
        *tables.prefixed(layout.image_rows, "image.", layout.image),
        *layout.projections,
        Row("logit_scale", "logit_scale"),
    ]
    params, used = tables.read(rows, found, clip.abstract_params(config), source)
    return config, params, used


def _recognise(found: Mapping[str, Any], source: str) -> _Layout:
    for layout in _LAYOUTS:
        if layout.text + layout.text_rows[0].theirs in found:
            return layout
    names = ", ".join(layout.text + layout.text_rows[0].theirs for layout in _LAYOUTS)
    raise UserError(f"{source} is not a CLIP: it has none of {names}")


def _width(projection: Any, row: Row) -> int:
    return projection.shape[0 if row.layout == "linear" else 1]


def _num_layers(found: Mapping[str, Any], prefix: str) -> int:
    return len({name.split(".")[0] for name in tables.under(found, prefix)})


def _text_config(
    found: Mapping[str, Any], layout: _Layout, num_heads: int | None, normalize: bool
) -> TextEncoderConfig:
    tokens, positions = (found[layout.text + row.theirs] for row in layout.text_rows[:2])
    vocab_size, width = tokens.shape
    return TextEncoderConfig(
        vocab_size=vocab_size,
        context_length=positions.shape[0],
        width=width,
        num_layers=_num_layers(found, layout.text + layout.layers),
        num_heads=num_heads or max(1, width // 64),
        normalize=normalize,
    )


def _image_config(
    found: Mapping[str, Any], layout: _Layout, num_heads: int | None, source: str
) -> ImageEncoderConfig:
    try:
        names = [layout.image + row.theirs for row in layout.image_rows]
        width, _, patch, _ = found[names[0]].shape
        grid = math.isqrt(found[names[2]].shape[0] - 1)
    except (KeyError, ValueError) as error:
        raise UserError(f"{source} has no image tower of a vision transformer: {error}") from error
    return ImageEncoderConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        num_layers=_num_layers(found, layout.image + layout.layers),
        num_heads=num_heads or max(1, width // 64),
    )
