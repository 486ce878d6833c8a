"""Keys of denoisers: the published names and those of diffusers.

Published names are those below ``transformer.transformer.`` in the state dict of a released model.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

from flax import nnx

from vqd_jax.errors import UserError
from vqd_jax.interop.tables import Row
from vqd_jax.models.denoiser import Denoiser, DenoiserConfig

# Buffers of the published cross-attention, whose causal mask was never applied.
IGNORED = (r"blocks\.\d+\.attn\d?\.mask",)


def published_rows(config: DenoiserConfig) -> list[Row]:
    """The table of the published names."""
    has_text = config.condition == "text"
    mlp = ("mlp.0", "mlp.2") if config.mlp == "fc" else ("mlp.conv1", "mlp.conv2")
    names = {
        "norm_self": "ln1",
        "self_attention": "attn1" if has_text else "attn",
        "norm_cross": "ln1_1",
        "cross_attention": "attn2",
        "norm_mlp": "ln2",
        "mlp_in": mlp[0],
        "mlp_out": mlp[1],
        "query": "query",
        "key": "key",
        "value": "value",
        "proj": "proj",
    }
    return _rows(config, "content_emb", "blocks.{i}", names, "to_logits.0", "to_logits.1")


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
    names = {
        "norm_self": "norm1",
        "self_attention": "attn1",
        "norm_cross": "norm2",
        "cross_attention": "attn2",
        "norm_mlp": "norm3",
        "mlp_in": "ff.net.0.proj",
        "mlp_out": "ff.net.2",
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "proj": "to_out.0",
    }
    return _rows(
        config, "latent_image_embedding", "transformer_blocks.{i}", names, "norm_out", "out"
    )


def _rows(config, embedding, block, names, norm_out, to_logits) -> list[Row]:
    rows = [
        Row("code_embedding.embedding", f"{embedding}.emb.weight"),
        Row("row_embedding.embedding", f"{embedding}.height_emb.weight"),
        Row("column_embedding.embedding", f"{embedding}.width_emb.weight"),
        *_norm("norm_out", norm_out),
        *_linear("to_logits", to_logits),
    ]

    def inside(make, *path, **options):
        ours = ".".join(("blocks", *path))
        theirs = ".".join((block, *(names[part] for part in path)))
        return make(ours, theirs, **options)

    attentions = ["self_attention"]
    adaptive = ["norm_self"]
    if config.condition == "text":
        attentions.append("cross_attention")
        adaptive.append("norm_cross")
    if config.condition == "class":
        adaptive.append("norm_mlp")
    else:
        rows += inside(_norm, "norm_mlp")
    for norm in adaptive:
        rows += inside(_adaptive, norm)
    for attention in attentions:
        for part in ("query", "key", "value", "proj"):
            rows += inside(_linear, attention, part)
    layout = "linear" if config.mlp == "fc" else "conv"
    for part in ("mlp_in", "mlp_out"):
        rows += inside(_linear, part, layout=layout)
    return rows


def _linear(ours: str, theirs: str, layout: str = "linear") -> list[Row]:
    return [
        Row(f"{ours}.kernel", f"{theirs}.weight", layout),
        Row(f"{ours}.bias", f"{theirs}.bias"),
    ]


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}.scale", f"{theirs}.weight"), Row(f"{ours}.bias", f"{theirs}.bias")]


def _adaptive(ours: str, theirs: str) -> list[Row]:
    table = Row(f"{ours}.embedding.embedding", f"{theirs}.emb.weight")
    return [table, *_linear(f"{ours}.linear", f"{theirs}.linear")]


def abstract_params(config: DenoiserConfig) -> Any:
    """Shapes of the parameters: a nested dict of ``jax.ShapeDtypeStruct``."""
    model = nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def published_config(
    tensors: Mapping[str, Any],
    *,
    num_heads: int,
    image_grid: int,
    null_label: int,
    learned_null: bool,
    source: str,
) -> DenoiserConfig:
    """Sizes of a published denoiser, read off the shapes of its tensors.

    Args:
      tensors: by published name.
      num_heads: H, which no shape tells; 16 in all released models.
      image_grid: side of the token grid by the image tokenizer; used where the file does not tell.
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
    """Side of the token grid of a published text model; no tensor of the others tells it."""
    mask = tensors.get("blocks.0.attn2.mask")
    return None if mask is None else math.isqrt(mask.shape[-1])


def _shape(tensors: Mapping[str, Any], source: str, name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(f"{source} has no denoiser that is known here: it lacks {name}")
    return tuple(tensors[name].shape)


def diffusers_config(component: Mapping[str, Any], source: str) -> DenoiserConfig:
    """Sizes of a diffusers ``Transformer2DModel``, read off its ``config.json``.

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
