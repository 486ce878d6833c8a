"""Tables and sizes of denoisers: in the published layout and in that of diffusers.

Published names are those below ``transformer.transformer.`` in the state dict of a released model.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

from vqd_jax.errors import UserError
from vqd_jax.interop import tables
from vqd_jax.interop.tables import Row
from vqd_jax.models import functional
from vqd_jax.models.denoiser import Denoiser, DenoiserConfig

# Buffers of the published cross-attention, whose causal mask was never applied.
IGNORED = (r"blocks\.\d+\.attn\d?\.mask",)

# The projections of an attention.
_PUBLISHED = "query key value proj"
_DIFFUSERS = "to_q to_k to_v to_out.0"

abstract_params = functools.partial(functional.abstract, Denoiser)


def published_rows(config: DenoiserConfig) -> list[Row]:
    """The table of the published names."""
    attention = "attn1" if config.condition == "text" else "attn"
    rows = tables.modules(
        ("code_embedding", "content_emb.emb", "embedding"),
        ("row_embedding", "content_emb.height_emb", "embedding"),
        ("column_embedding", "content_emb.width_emb", "embedding"),
        ("norm_out", "to_logits.0", "norm"),
        ("to_logits", "to_logits.1", "linear"),
        ("blocks.norm_self.embedding", "blocks.{i}.ln1.emb", "embedding"),
        ("blocks.norm_self.linear", "blocks.{i}.ln1.linear", "linear"),
        *tables.attention("blocks.self_attention", f"blocks.{{i}}.{attention}", _PUBLISHED),
    )
    if config.condition == "text":
        rows += tables.modules(
            ("blocks.norm_cross.embedding", "blocks.{i}.ln1_1.emb", "embedding"),
            ("blocks.norm_cross.linear", "blocks.{i}.ln1_1.linear", "linear"),
            *tables.attention("blocks.cross_attention", "blocks.{i}.attn2", _PUBLISHED),
        )
    if config.condition == "class":
        rows += tables.modules(
            ("blocks.norm_mlp.embedding", "blocks.{i}.ln2.emb", "embedding"),
            ("blocks.norm_mlp.linear", "blocks.{i}.ln2.linear", "linear"),
        )
    else:
        rows += tables.modules(("blocks.norm_mlp", "blocks.{i}.ln2", "norm"))
    if config.mlp == "conv":
        return rows + tables.modules(
            ("blocks.mlp_in", "blocks.{i}.mlp.conv1", "conv"),
            ("blocks.mlp_out", "blocks.{i}.mlp.conv2", "conv"),
        )
    return rows + tables.modules(
        ("blocks.mlp_in", "blocks.{i}.mlp.0", "linear"),
        ("blocks.mlp_out", "blocks.{i}.mlp.2", "linear"),
    )


def diffusers_rows(config: DenoiserConfig) -> list[Row]:
    """The table of diffusers' ``Transformer2DModel`` with vectorised input.

    Raises:
      UserError: diffusers has no such denoiser.
    """
    if config.condition != "text" or config.mlp != "fc":
        raise UserError(
            f"diffusers has no denoiser with condition {config.condition!r} and MLP "
            f"{config.mlp!r}; only text-conditional ones with an 'fc' MLP"
        )
    block = "transformer_blocks.{i}"
    return tables.modules(
        ("code_embedding", "latent_image_embedding.emb", "embedding"),
        ("row_embedding", "latent_image_embedding.height_emb", "embedding"),
        ("column_embedding", "latent_image_embedding.width_emb", "embedding"),
        ("norm_out", "norm_out", "norm"),
        ("to_logits", "out", "linear"),
        ("blocks.norm_self.embedding", f"{block}.norm1.emb", "embedding"),
        ("blocks.norm_self.linear", f"{block}.norm1.linear", "linear"),
        *tables.attention("blocks.self_attention", f"{block}.attn1", _DIFFUSERS),
        ("blocks.norm_cross.embedding", f"{block}.norm2.emb", "embedding"),
        ("blocks.norm_cross.linear", f"{block}.norm2.linear", "linear"),
        *tables.attention("blocks.cross_attention", f"{block}.attn2", _DIFFUSERS),
        ("blocks.norm_mlp", f"{block}.norm3", "norm"),
        ("blocks.mlp_in", f"{block}.ff.net.0.proj", "linear"),
        ("blocks.mlp_out", f"{block}.ff.net.2", "linear"),
    )


def published_config(
    tensors: Mapping[str, Any],
    *,
    num_heads: int,
    image_grid: int,
    null_label: int,
    learned_null: bool,
    source: str,
) -> DenoiserConfig:
    """Sizes of a published denoiser, from the shapes of its tensors.

    Args:
      tensors: by published name.
      num_heads: H, which no shape tells; 16 in all released models.
      image_grid: side of the token grid of the image tokenizer, for files that do not tell it.
      null_label: label of the null class; a class table with a row for it has a learned null.
      learned_null: whether a text model has learned features of the empty caption.
      source: for messages.

    Raises:
      UserError: a tensor that every denoiser has is missing.
    """
    shape = functools.partial(_shape, tensors, source)
    codes, width = shape("to_logits.1.weight")
    rows, _ = shape("content_emb.height_emb.weight")
    columns, _ = shape("content_emb.width_emb.weight")
    num_steps, _ = shape("blocks.0.ln1.emb.weight")
    layers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    has_text = "blocks.0.attn2.key.weight" in tensors
    condition = "class" if "blocks.0.ln2.emb.weight" in tensors else "none"
    classes = shape("blocks.0.ln2.emb.weight")[0] if condition == "class" else 0
    is_conv = "blocks.0.mlp.conv1.weight" in tensors
    hidden = shape("blocks.0.mlp.conv1.weight" if is_conv else "blocks.0.mlp.0.weight")[0]
    side = text_grid(tensors) or image_grid
    learned_row = classes == null_label + 1
    sizes = dict(
        num_codes=codes,
        grid=(side, side),
        num_steps=num_steps,
        width=width,
        num_layers=len(layers),
        num_heads=num_heads,
        condition="text" if has_text else condition,
        text_width=shape("blocks.0.attn2.key.weight")[1] if has_text else 0,
        num_classes=classes - learned_row,
        learned_null=learned_null or learned_row,
        mlp="conv" if is_conv else "fc",
        mlp_ratio=hidden // width,
        position_table=None if (rows, columns) == (side, side) else (rows, columns),
    )
    try:
        return DenoiserConfig(**sizes)
    except ValueError as error:
        hint = "; give its number of heads with --num_heads" if width % num_heads else ""
        raise UserError(f"{source}: {error}{hint}") from error


def num_codes(tensors: Mapping[str, Any], source: str) -> int:
    """K of a published denoiser."""
    return _shape(tensors, source, "to_logits.1.weight")[0]


def text_grid(tensors: Mapping[str, Any]) -> int | None:
    """Side of the token grid of a published text model; None for the others, which do not tell."""
    mask = tensors.get("blocks.0.attn2.mask")
    return None if mask is None else math.isqrt(mask.shape[-1])


def _shape(tensors: Mapping[str, Any], source: str, name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(f"{source} has no denoiser that this program knows: it lacks {name}")
    return tuple(tensors[name].shape)


def diffusers_config(component: Mapping[str, Any], source: str) -> DenoiserConfig:
    """Sizes of a diffusers ``Transformer2DModel``, from its ``config.json``.

    Raises:
      UserError: it is not the transformer of VQ-Diffusion.
    """
    try:
        heads, head_width = component["num_attention_heads"], component["attention_head_dim"]
        if component["activation_fn"] != "geglu-approximate" or not component["attention_bias"]:
            raise UserError(f"{source} is a transformer of another model than VQ-Diffusion")
        side = component["sample_size"]
        return DenoiserConfig(
            num_codes=component["num_vector_embeds"] - 1,
            grid=(side, side),
            num_steps=component["num_embeds_ada_norm"],
            width=heads * head_width,
            num_layers=component["num_layers"],
            num_heads=heads,
            text_width=component["cross_attention_dim"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{source} is not the transformer of VQ-Diffusion: {error} is missing or not a number"
        ) from error
