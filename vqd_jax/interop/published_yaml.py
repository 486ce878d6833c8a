"""The ``config.yaml`` that the published code needs beside a ``.pth``: what no tensor tells."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from absl import logging

from vqd_jax.errors import UserError


class Described(NamedTuple):
    """What a config says.

    Attributes:
      num_heads: of the denoiser; None if it does not say.
      image_size: side of a picture in pixels, if the tokenizer's own config tells it; else None.
      remap: file of the code remap, beside the config; None if there is none.
      wants_remap: name of the remap that the config asks for; ''.
    """

    num_heads: int | None = None
    image_size: int | None = None
    remap: Path | None = None
    wants_remap: str = ""


class _Loader(yaml.SafeLoader):
    """Knows tuples, which the published configs hold, and nothing that could run code."""


_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple",
    lambda loader, node: tuple(loader.construct_sequence(node, deep=True)),
)


def beside(source: str) -> Described:
    """What the config beside a checkpoint says: ``NAME.yaml``, or else ``config.yaml``.

    Raises:
      UserError: there is one, and it cannot be read.
    """
    path = Path(source)
    stem = path.name.removesuffix("_aa").rsplit(".", 1)[0]
    names = (f"{stem}.yaml", "config.yaml", "configs/config.yaml", "../configs/config.yaml")
    for name in names:
        if (path.parent / name).is_file():
            found = _read(path.parent / name)
            logging.info("%s describes %s: %s", path.parent / name, path.name, found)
            return found
    return Described()


def _read(path: Path) -> Described:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} beside the checkpoint cannot be read: {error}") from error
    transformer = _find(loaded, "transformer_config")
    codec = _find(loaded, "content_codec_config")
    heads = _find(transformer, "n_head")
    remap = _find(codec, "mapping_path")
    wants = bool(_find(codec, "quantize_number")) and remap not in (None, "None", "")
    return Described(
        num_heads=heads if isinstance(heads, int) and heads > 0 else None,
        image_size=_image_size(path.parent, _find(codec, "config_path")),
        remap=_existing(path.parent, remap) if wants else None,
        wants_remap=str(remap) if wants else "",
    )


def _find(nested: Any, key: str) -> Any:
    """The first value of a key at any depth of dicts; None."""
    if not isinstance(nested, dict):
        return None
    if key in nested:
        return nested[key]
    found = (_find(value, key) for value in nested.values())
    return next((value for value in found if value is not None), None)


def _existing(folder: Path, name: Any) -> Path | None:
    """A file that a config names by a path of its authors' machine."""
    if not isinstance(name, str):
        return None
    places = (folder / name, folder / Path(name).name)
    return next((place for place in places if place.is_file()), None)


def _image_size(folder: Path, name: Any) -> int | None:
    if (path := _existing(folder, name)) is None:
        return None
    try:
        resolution = _find(yaml.load(path.read_text(encoding="utf-8"), _Loader), "resolution")
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} beside the checkpoint cannot be read: {error}") from error
    if isinstance(resolution, list | tuple) and resolution:
        resolution = resolution[0]
    return resolution if isinstance(resolution, int) else None
