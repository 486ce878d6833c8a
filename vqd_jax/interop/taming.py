"""Image tokenizers from published files: taming transformers, VQ-Diffusion's own, diffusers.

The modules of ``models.autoencoder`` have the names of taming's weights, so its table follows from
the paths of our parameters. The other layouts rename them.
"""

import dataclasses
import functools
import importlib.resources
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vqd_jax import files
from vqd_jax.errors import UserError
from vqd_jax.interop import tables, torch_file
from vqd_jax.interop.tables import Row
from vqd_jax.interop.tensors import Tensor
from vqd_jax.models import autoencoder, quantizer
from vqd_jax.models.autoencoder import AutoencoderConfig, abstract_params

DEFAULT_IMAGE_SIZE = 256  # pixels, of all published tokenizers
# State of the training: losses with their networks, and the two sums whose quotient is a
# moving-average codebook.
IGNORED = (r"loss\..*", r"quantize\.(cluster_size|embedding_avg)")
# FFHQ's tokenizer was published inside an autoregressive transformer, under this name.
_INSIDE_TRANSFORMER = "first_stage_model."
_ENCODER_SIDE = ("encoder.", "quant_conv.", "quantize.")


def is_autoencoder(loaded: Any) -> bool:
    """Whether ``torch_file.load`` returned an image tokenizer that ``read`` knows."""
    found = _state_dict(loaded)
    return "encoder.conv_in.weight" in found and "quant_conv.weight" in found


def read(
    loaded: Any,
    source: str,
    *,
    image_size: int = DEFAULT_IMAGE_SIZE,
    num_codes: int | None = None,
    remap: np.ndarray | None = None,
) -> tuple[AutoencoderConfig, Any]:
    """A tokenizer on its own: taming's ``.ckpt`` or ``.pth``, ``ithq_vqvae.pth``.

    Args:
      loaded: what ``torch_file.load`` returned.
      source: path of the file, for messages.
      image_size: S, which no tensor tells.
      num_codes: number of codes of its denoiser; None is the whole codebook, or what ``remap``
        leaves of it.
      remap: integers [codes of the codebook] -> code id; None takes a published one if
        ``num_codes`` asks for it.

    Returns:
      The sizes, and parameters for ``autoencoder.bind``: NumPy arrays in float32.

    Raises:
      UserError: a tensor is missing, left over, of another shape or not finite, or the remap does
        not fit.
    """
    found = _state_dict(loaded)
    config = _infer(found, source, image_size)
    params, used = tables.read(rows(config, found), found, abstract_params(config), source)
    tables.require_all_used(found, used, IGNORED, source)
    return _remapped(config, params, source, num_codes, remap)


def read_released(
    found: Mapping[str, Any],
    source: str,
    *,
    image_size: int = DEFAULT_IMAGE_SIZE,
    num_codes: int | None = None,
    remap: np.ndarray | None = None,
) -> tuple[AutoencoderConfig, Any, set[str]]:
    """The tokenizer in a released VQ-Diffusion checkpoint.

    Args:
      found: tensors named without ``content_codec.``: ``enc.encoder.conv_in.weight``, ...
      source, image_size, num_codes, remap: see ``read``.

    Returns:
      The sizes, the parameters, and the names that were used or are second names of used ones.

    Raises:
      UserError: see ``read``; but the caller judges tensors that are left over.
    """
    joined = {**tables.under(found, "dec."), **tables.under(found, "enc.")}
    config = _infer(joined, source, image_size)
    table = [row._replace(theirs=_released_name(row.theirs)) for row in rows(config, joined)]
    params, used = tables.read(table, found, abstract_params(config), source)
    used |= {name for name in found if re.fullmatch(r"(enc|dec)\.quantize\..*", name)}
    return *_remapped(config, params, source, num_codes, remap), used


def read_diffusers(
    found: Mapping[str, Any], described: Mapping[str, Any], source: str, *, grid_size: int
) -> tuple[AutoencoderConfig, Any, set[str]]:
    """The ``VQModel`` of a diffusers pipeline.

    Args:
      found: its tensors by name, of older or newer releases.
      described: its ``config.json``.
      source: path of its folder, for messages.
      grid_size: tokens along one side, of its denoiser.

    Returns:
      The sizes, the parameters, and the names used.

    Raises:
      UserError: a tensor is missing, of another shape or not finite, or the config asks for
        something that this network does not have.
    """
    config = _from_diffusers_config(described, source, grid_size)
    old = any(name.endswith("mid_block.attentions.0.query.weight") for name in found)
    table = diffusers_rows(config, old_names=old)
    params, used = tables.read(table, found, abstract_params(config), source)
    return config, params, used


def rows(config: AutoencoderConfig, found: Mapping[str, Any] | None = None) -> list[Row]:
    """The table of taming's layout.

    Args:
      config: sizes; a remap has no place in the layout and is left out.
      found: the tensors of the source, if there is one: a moving-average codebook has another name.
    """
    codebook = (
        "quantize.embed.weight" if config.quantizer == "gumbel" else "quantize.embedding.weight"
    )
    if found is not None and "quantize.embedding" in found:
        codebook = "quantize.embedding"
    table = []
    for path, leaf in files.flatten(abstract_params(without_remap(config))).items():
        name = re.sub(r"\.(kernel|scale)$", ".weight", path)
        if path == "quantize.embedding":
            name = codebook
        table.append(Row(path, name, "conv" if len(leaf.shape) == 4 else "same"))
    return table


def released_rows(config: AutoencoderConfig) -> list[Row]:
    """The table of released VQ-Diffusion checkpoints, named without ``content_codec.``.

    The files hold the codebook a second time, under ``dec.quantize``.
    """
    return [row._replace(theirs=_released_name(row.theirs)) for row in rows(config)]


def diffusers_rows(config: AutoencoderConfig, *, old_names: bool = False) -> list[Row]:
    """The table of diffusers' ``VQModel``.

    Args:
      config: sizes, of the quantizer "nearest" and without a remap (see ``for_diffusers``).
      old_names: attention as older releases name it: query, key, value, proj_attn.
    """
    rename = functools.partial(
        _diffusers_name, levels=len(config.channel_multipliers), old_names=old_names
    )
    table = []
    for row in rows(config):
        # Their attention projections are matrices, ours 1x1 convolutions.
        attends = re.search(r"\.attn(\.\d+|_1)\.(q|k|v|proj_out)\.weight$", row.theirs)
        layout = "linear_as_conv" if attends else row.layout
        table.append(Row(row.ours, rename(row.theirs), layout))
    return table


def diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
    """The ``config.json`` of a diffusers ``VQModel`` of these sizes.

    Raises:
      UserError: their network cannot have these sizes.
    """
    first, *_ = config.channel_multipliers
    if config.quantizer != "nearest" or config.codebook_size is not None:
        raise UserError("diffusers has no Gumbel quantizer and no code remap")
    if first != 1:
        raise UserError(
            f"channel_multipliers={config.channel_multipliers}: diffusers' first level has "
            f"{config.channels} channels, so the first multiplier must be 1"
        )
    attends = [
        config.image_size >> level in config.attention_resolutions
        for level in range(len(config.channel_multipliers))
    ]
    return {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": [config.channels * m for m in config.channel_multipliers],
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attends],
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "norm_type": "group",
        "num_vq_embeddings": config.num_codes,
        "out_channels": 3,
        "sample_size": config.image_size,
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attends)],
        "vq_embed_dim": config.codebook_dim,
    }


def for_diffusers(config: AutoencoderConfig, params: Any) -> tuple[AutoencoderConfig, Any]:
    """The nearest-code tokenizer of K codes that decodes as this one does.

    A remap becomes a smaller codebook, and a Gumbel quantizer is left out. Codes then become the
    same pictures as before, but pictures may become other codes.
    """
    codebook = np.asarray(params["quantize"]["embedding"])
    if config.codebook_size is not None:
        full_to_code = np.asarray(params["remap"]["full_to_code"])
        codebook = codebook[np.asarray(quantizer.code_to_full(full_to_code, config.num_codes))]
    kept = {name: value for name, value in params.items() if name != "remap"}
    config = dataclasses.replace(config, quantizer="nearest", codebook_size=None)
    return config, kept | {"quantize": {"embedding": codebook}}


def downsampling(found: Mapping[str, Any]) -> int:
    """Pixels that a token covers along one side, from tensors in taming's layout."""
    return 2 ** (_count(found, "encoder.down") - 1)


def config_from_dict(described: Mapping[str, Any], source: str) -> AutoencoderConfig:
    """The sizes in the ``config.json`` of a model folder of an autoencoder.

    Raises:
      UserError: a key is unknown or missing, or a value impossible.
    """
    return _config(f"{source}/config.json is not that of an autoencoder", **described)


def published_remap(codebook_size: int, num_codes: int) -> np.ndarray | None:
    """The published remap between these numbers of codes, if there is one.

    Returns:
      int32 [codebook_size], or None.
    """
    name = f"{codebook_size}_to_{num_codes}"
    file = importlib.resources.files("vqd_jax.data") / "assets" / "code_remaps.npz"
    with file.open("rb") as stream, np.load(stream) as remaps:
        return remaps[name] if name in remaps else None


def without_remap(config: AutoencoderConfig) -> AutoencoderConfig:
    """The sizes of the network without its remap."""
    if config.codebook_size is None:
        return config
    return dataclasses.replace(config, num_codes=config.codebook_size, codebook_size=None)


def _remapped(
    config: AutoencoderConfig,
    params: Any,
    source: str,
    num_codes: int | None,
    remap: np.ndarray | None,
) -> tuple[AutoencoderConfig, Any]:
    size = config.num_codes
    if remap is None:
        if num_codes in (None, size):
            return config, params
        remap = published_remap(size, num_codes)
        if remap is None:
            raise UserError(
                f"{source} has {size} codes and the denoiser {num_codes}; give the file with the "
                "remap that it was trained with"
            )
    try:
        config, params = autoencoder.with_remap(config, params, remap)
    except ValueError as error:
        raise UserError(f"the code remap does not fit {source}: {error}") from error
    if num_codes not in (None, config.num_codes):
        raise UserError(
            f"the code remap leaves {config.num_codes} codes, but the denoiser has {num_codes}"
        )
    return config, params


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    """The tokenizer's tensors, wherever they are in the file."""
    found = torch_file.named_tensors(loaded)
    return tables.under(found, _INSIDE_TRANSFORMER) or found


def _infer(found: Mapping[str, Any], source: str, image_size: int) -> AutoencoderConfig:
    """The sizes that the shapes tell, in taming's layout."""

    def shape(name):
        return found[name].shape

    try:
        channels = shape("encoder.conv_in.weight")[0]
        levels = range(_count(found, "encoder.down"))
        widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in levels]
        gumbel = "quantize.proj.weight" in found
        names = ("quantize.embed.weight", "quantize.embedding.weight", "quantize.embedding")
        codebook = next((shape(name) for name in names if name in found), None)
        if codebook is None:
            raise KeyError(" or ".join(names))
        sizes = dict(
            latent_channels=shape("encoder.conv_out.weight")[0],
            codebook_dim=shape("quant_conv.weight")[0],
            num_res_blocks=_count(found, "encoder.down.0.block"),
        )
    except KeyError as error:
        raise UserError(f"{source} is no image tokenizer: it lacks {error.args[0]}") from error
    uneven = [width for width in widths if width % channels]
    if uneven:
        raise UserError(f"{source}: a level of {uneven[0]} channels is no multiple of {channels}")
    attends = [level for level in levels if f"encoder.down.{level}.attn.0.norm.weight" in found]
    return _config(
        f"{source} has sizes that do not go together",
        image_size=image_size,
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        attention_resolutions=tuple(image_size >> level for level in attends),
        num_codes=codebook[0],
        quantizer="gumbel" if gumbel else "nearest",
        **sizes,
    )


def _from_diffusers_config(
    described: Mapping[str, Any], source: str, grid_size: int
) -> AutoencoderConfig:
    wanted = {
        "act_fn": "silu", "norm_type": "group", "in_channels": 3, "out_channels": 3,
        "mid_block_add_attention": True, "lookup_from_codebook": False,
    }  # fmt: skip
    for name, value in wanted.items():
        if described.get(name, value) != value:
            raise UserError(f"{source}: {name} is {described[name]}, only {value} is possible")
    try:
        widths = described["block_out_channels"]
        image_size = grid_size * 2 ** (len(widths) - 1)
        attends = ["Attn" in name for name in described["down_block_types"]]
        if attends[::-1] != ["Attn" in name for name in described["up_block_types"]]:
            raise UserError(f"{source}: the decoder attends at other levels than the encoder")
        if any(width % widths[0] for width in widths):
            raise UserError(f"{source}: block_out_channels={widths}: no multiples of the first")
        return _config(
            f"{source} has sizes that do not go together",
            image_size=image_size,
            channels=widths[0],
            channel_multipliers=tuple(width // widths[0] for width in widths),
            num_res_blocks=described["layers_per_block"],
            attention_resolutions=tuple(
                image_size >> level for level, attend in enumerate(attends) if attend
            ),
            latent_channels=described["latent_channels"],
            codebook_dim=described.get("vq_embed_dim") or described["latent_channels"],
            num_codes=described["num_vq_embeddings"],
            norm_groups=described.get("norm_num_groups", 32),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{source}/config.json is not that of a VQModel: {error!r}") from error


def _config(complaint: str, **sizes: Any) -> AutoencoderConfig:
    try:
        return AutoencoderConfig(**sizes)
    except (TypeError, ValueError) as error:
        raise UserError(f"{complaint}: {error}") from error


def _count(found: Mapping[str, Any], prefix: str) -> int:
    """Members 0, 1, 2, ... of a list of modules."""
    return len({name.split(".")[0] for name in tables.under(found, prefix + ".")})


def _released_name(name: str) -> str:
    return ("enc." if name.startswith(_ENCODER_SIDE) else "dec.") + name


def _diffusers_name(name: str, *, levels: int, old_names: bool) -> str:
    new = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    old = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
    projections = old if old_names else new

    def attention(match):
        return f".attn{match[1]}.{projections[match[2]]}."

    def up(match):
        return f"decoder.up_blocks.{levels - 1 - int(match[1])}."

    renamings: list[tuple[str, str | Callable]] = [
        (r"\.attn(\.\d+|_1)\.norm\.", r".attn\1.group_norm."),
        (r"\.attn(\.\d+|_1)\.(q|k|v|proj_out)\.", attention),
        (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
        (r"^decoder\.up\.(\d+)\.", up),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.block\.(\d+)\.", r".resnets.\1."),
        (r"\.attn\.(\d+)\.", r".attentions.\1."),
        (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
        (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    ]
    for pattern, replacement in renamings:
        name = re.sub(pattern, replacement, name)
    return name
