"""The trained weights that a config or a workdir names: for training, encoding and sampling.

Letters: B batch, L text tokens, D text width.
"""

import dataclasses
import functools
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.data.text import ClipTokenizer, TextFeatures
from vqd_jax.errors import UserError
from vqd_jax.interop import folder
from vqd_jax.models import adapters, autoencoder, conditioned, text_encoder
from vqd_jax.parallel import sharding

# Features of the empty caption may first be learnt in fine-tuning (Improved VQ-Diffusion, 3.1).
_MAY_BE_NEW = ("null_text",)


# What ``config.json`` of a folder of adapters says of itself.
ADAPTERS_KIND = "vqd_jax_adapters"
# Models that come with this package.
PACKAGED = ("emoji",)


def located(directory: str) -> str:
    """The folder of a model: that of a packaged one for its name, unless there is such a folder.

    ~ and $VARIABLES are replaced.
    """
    directory = files.expanded(directory)
    if directory in PACKAGED and not (Path(directory) / "config.json").exists():
        return str(Path(str(resources.files("vqd_jax") / "assets")) / directory)
    return directory


def beside(directory: str) -> Path:
    """Where what a model makes goes: its folder, or of a packaged one the working directory."""
    found = located(directory)
    return Path(found if found == files.expanded(directory) else ".")


def model_folder(workdir: str) -> str:
    """Where a workdir keeps its autoencoder."""
    return str(Path(workdir) / "autoencoder" / "model")


def find_autoencoder(config: ConfigDict, workdir: str) -> str | None:
    """The model folder of the run's autoencoder; None if it must be trained.

    It is the workdir's own or else that in ``config.autoencoder.path``, which may be another
    workdir.
    """
    own, given = model_folder(workdir), config.autoencoder.path
    if (Path(own) / "config.json").exists():
        return own
    return autoencoder_folder(given) if given else None


def autoencoder_folder(directory: str) -> str:
    """The model folder of an autoencoder: a workdir's, or ``directory`` itself."""
    directory = located(directory)
    return model_folder(directory) if (Path(directory) / "autoencoder").exists() else directory


def load_initial_autoencoder(config: ConfigDict) -> Any:
    """The parameters that stage one begins from, of ``config.autoencoder.init_from``.

    A remap is left out: all entries of the codebook learn.

    Raises:
      UserError: see ``load_autoencoder``.
    """
    given = autoencoder_folder(config.autoencoder.init_from)
    stored = folder.load_config(given)
    stored = stored.get("autoencoder", stored)
    if not stored.get("codebook_size"):
        return load_autoencoder(config, given)
    wanted = config.copy_and_resolve_references()
    wanted.autoencoder.num_codes = stored["num_codes"]
    wanted.autoencoder.codebook_size = config.autoencoder.num_codes
    found = load_autoencoder(wanted, given)
    del found["remap"]
    return found


def load_autoencoder(config: ConfigDict, directory: str) -> Any:
    """Parameters of the autoencoder in a model folder: a nested dict of NumPy arrays.

    Raises:
      UserError: it cannot be read, or has other sizes than ``config.autoencoder`` says.
    """
    wanted = config_lib.autoencoder_config(config)
    found, part = folder.load_config(directory), ""
    if found.get("kind") == config_lib.MODEL_KIND:
        whole = config_lib.load(str(Path(directory) / "config.json"))
        found, part = dataclasses.asdict(config_lib.autoencoder_config(whole)), "autoencoder"
    # Earlier folders lack these fields, which had one possible value.
    found = {"quantizer": "nearest", "codebook_size": None} | found
    for field, value in dataclasses.asdict(wanted).items():
        stored = found.get(field)
        # JSON has no tuples.
        if value != (tuple(stored) if isinstance(stored, list) else stored):
            key = "data.image_size" if field == "image_size" else f"autoencoder.{field}"
            raise UserError(
                f"the autoencoder in {directory} has {field}={stored}, but config.{key}={value}; "
                "set the config to what the autoencoder has"
            )
    return folder.load_params(directory, autoencoder.abstract_params(wanted), part)


def load_text_encoder(config: ConfigDict) -> Any:
    """Parameters of the text encoder in ``config.text_encoder.path``: a nested dict.

    Raises:
      UserError: it cannot be read, or has other sizes than the config says.
    """
    directory = located(config.text_encoder.path)
    kind = folder.load_config(directory).get("kind")
    parts = {"clip": "text", config_lib.MODEL_KIND: "text_encoder"}
    if kind not in parts:
        raise UserError(
            f"config.text_encoder.path={directory}: neither a converted CLIP nor a model with a "
            "text encoder"
        )
    abstract = text_encoder.abstract_params(config_lib.model_config(config).text_encoder)
    return folder.load_params(directory, abstract, parts[kind])


def text_features(config: ConfigDict) -> TextFeatures | None:
    """What computes the features that are cached beside the codes; None if none are.

    Raises:
      UserError: see ``load_text_encoder``.
    """
    if not config.data.cache_text_features:
        return None
    # Features that are kept must not depend on the processor.
    exact = {"dtype": "float32", "product_dtype": "float32"}
    sizes = dataclasses.replace(config_lib.model_config(config).text_encoder, **exact)
    params = load_text_encoder(config)
    compute = jax.jit(lambda params, ids: text_encoder.bind(sizes, params)(ids))
    return TextFeatures(functools.partial(compute, params), sizes.width, files.fingerprint(params))


def load_averaged(config: ConfigDict, workdir: str) -> Any:
    """The averaged parameters of a run's newest checkpoint, for ``models.conditioned``.

    Args:
      config: of the run.
      workdir: of the run.

    Raises:
      UserError: there is no checkpoint, or none can be read.
    """
    found = _averages(config, workdir)
    if "frozen" in found:
        return adapters.merged(found["frozen"], found["ema_params"])
    return found["ema_params"]


def _averages(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """``ema_params`` of the newest checkpoint; of a run with adapters, ``frozen`` too."""
    # Orbax takes a second to import, and a model folder needs none.
    from vqd_jax import checkpoint

    abstract = conditioned.abstract_params(config_lib.model_config(config))
    # Moments of the optimizer, and what was not averaged, stay on disk.
    wanted, c = {"ema_params": abstract}, config.training
    if c.adapter_rank:
        learnt = adapters.abstract(abstract, c.adapter_rank, c.adapter_paths)
        wanted = {"ema_params": learnt, "frozen": abstract}
    return checkpoint.load(checkpoint.folder(config, workdir), checkpoint.abstract(wanted))[1]


def save_adapters(workdir: str, target: str) -> None:
    """Writes what a run with adapters has learnt as a small folder, which names its base.

    ``load_model`` reads it where the base is to be had.

    Args:
      workdir: of the run.
      target: folder to write.

    Raises:
      UserError: the run has no adapters, or no checkpoint.
    """
    if not (Path(workdir) / "config.json").exists():
        raise UserError(f"{workdir} has no config.json: nothing was trained there")
    config = config_lib.load(str(Path(workdir) / "config.json"))
    if not config.training.adapter_rank:
        raise UserError(f"{workdir} trained all parameters: export it with --format=vqd_jax")
    found = _averages(config, workdir)
    described = {
        "kind": ADAPTERS_KIND,
        "base": config.training.init_from,
        "base_fingerprint": files.fingerprint(found["frozen"]),
        "config": config.to_dict(),
    }
    folder.save(target, described, found["ema_params"])


def _with_adapters(path: Path, dtype: str | None, place: Callable) -> "Model":
    """The model of a folder of adapters, from its base."""
    described = folder.load_config(path)
    config = config_lib.from_dict(described["config"], f"{path}/config.json")
    c, given = config.training, described["base"]
    try:
        base = load_model(given, place=place)
    except UserError as error:
        raise UserError(f"{path} holds adapters of the model {given}: {error}") from error
    if files.fingerprint(base.params) != described["base_fingerprint"]:
        raise UserError(f"{path} holds adapters of another model than {given} is now")
    learnt = adapters.abstract(base.params, c.adapter_rank, c.adapter_paths)
    found = folder.load_params(path, learnt, place=place)
    params = _in_dtype(adapters.merged(base.params, found), config, dtype)
    return Model(config, params, base.autoencoder_params, base.tokenizer)


class Model(NamedTuple):
    """All that sampling needs.

    Attributes:
      config: that the model was trained with.
      params: of ``models.conditioned``.
      autoencoder_params: of ``models.autoencoder``.
      tokenizer: of prompts; None is CLIP's.
    """

    config: ConfigDict
    params: Any
    autoencoder_params: Any
    tokenizer: ClipTokenizer | None = None


def load_run(workdir: str, dtype: str | None = None) -> Model:
    """The newest checkpoint of a training run, with averaged parameters.

    Args:
      workdir: of the run.
      dtype: see ``load_model``.

    Raises:
      UserError: nothing was trained there, or it cannot be read.
    """
    path = Path(workdir)
    if not (path / "config.json").exists():
        raise UserError(f"{path} has no config.json: nothing was trained there")
    config = config_lib.load(str(path / "config.json"))
    if not Path(model_folder(workdir)).exists():
        raise UserError(f"stage one of {path} is not finished; run the training command again")
    codec = load_autoencoder(config, model_folder(workdir))
    params = load_averaged(config, workdir)
    return Model(config, _in_dtype(params, config, dtype), codec)


def _in_dtype(params: Any, config: ConfigDict, dtype: str | None) -> Any:
    """The parameters, to be kept and to compute in another dtype, unless it is None."""
    if dtype is not None:
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype={dtype!r}: must be float32 or bfloat16")
        config.denoiser.dtype = dtype
        if dtype == "float32":
            config.denoiser.product_dtype = dtype
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    sharding.warn_of_slow_dtype(config, jax.devices()[0])
    return params


def load_model(
    directory: str,
    dtype: str | None = None,
    place: Callable[[np.ndarray], Any] = jax.device_put,
) -> Model:
    """The model in a folder that ``VQDiffusion.save_pretrained`` wrote, or in a workdir.

    Args:
      directory: the folder, or the name of a packaged model.
      dtype: "float32" or "bfloat16", in which the text encoder and the denoiser compute and keep
        their parameters; "float32" rounds no product, either. None is that of the config, with
        parameters as they are stored.
      place: called with every array of a model folder as soon as it is read.

    Raises:
      UserError: there is no model, or it is damaged or of another kind.
    """
    path = Path(located(directory))
    if (path / "model_index.json").exists():
        raise UserError(
            f"{path} is a folder of diffusers; convert it first: "
            f"--mode=convert --source={path} --target=DIR"
        )
    if not (path / "config.json").exists():
        raise UserError(f"{path} is no model folder and no workdir of a run: it has no config.json")
    kind = folder.load_config(path).get("kind")
    if kind is None:
        return load_run(str(path), dtype)
    if kind == ADAPTERS_KIND:
        return _with_adapters(path, dtype, place)
    if kind != config_lib.MODEL_KIND:
        raise UserError(
            f"{path} holds a model of kind {kind!r}; pictures need a whole one: denoiser and "
            "autoencoder"
        )
    config = config_lib.load(str(path / "config.json"))
    abstract = {
        **conditioned.abstract_params(config_lib.model_config(config)),
        "autoencoder": autoencoder.abstract_params(config_lib.autoencoder_config(config)),
    }
    params = folder.load_params(path, abstract, place=place)
    codec = params.pop("autoencoder")
    params = _in_dtype(params, config, dtype)
    tokenizer = None
    if (path / "tokenizer").is_dir():
        length = config.text_encoder.context_length
        tokenizer = ClipTokenizer.from_folder(path / "tokenizer", length)
    return Model(config, params, codec, tokenizer)


def load_initial(config: ConfigDict, abstract: Any) -> dict[str, Any]:
    """The parts of a model that are trained already when a run begins.

    They come from ``config.training.init_from``, a model folder or the workdir of another run, and
    from ``config.text_encoder.path``.

    Args:
      config: the resolved config.
      abstract: the parameters of ``models.conditioned``, or their shapes.

    Returns:
      {part: nested dict of NumPy arrays}, such as "denoiser". The run learns all other parts from
      random numbers.

    Raises:
      UserError: a folder cannot be read, or holds parameters of other sizes than the config asks.
    """
    found = {}
    if config.training.init_from:
        found = _whole_model(located(config.training.init_from), abstract)
    if config.text_encoder.path and "text_encoder" in abstract:
        found["text_encoder"] = load_text_encoder(config)
    return found


def _whole_model(directory: str, abstract: Any) -> dict[str, Any]:
    described = folder.load_config(directory)
    if described.get("kind") == config_lib.MODEL_KIND:
        found = folder.read_shards(Path(directory), "model")
    elif "training" in described:
        stored = config_lib.load(str(Path(directory) / "config.json"))
        found = files.flatten(load_averaged(stored, directory))
    else:
        raise UserError(
            f"config.training.init_from={directory}: neither the folder of a whole model nor the "
            "workdir of a run"
        )
    new = [part for part in _MAY_BE_NEW if part in abstract and part not in found]
    if new:
        logging.info("%s has no %s; it is learnt from the start", directory, ", ".join(new))
    wanted = {part: shapes for part, shapes in abstract.items() if part not in new}
    found = {name: x for name, x in found.items() if name.split(".")[0] in wanted}
    return folder.fit(found, wanted, directory)
