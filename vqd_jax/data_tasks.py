"""The tasks of the command line that concern data: prepare, encode, inspect."""

from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax import pictures
from vqd_jax.data import batches, codes, report
from vqd_jax.training import cache, stage_one, stage_two


def prepare(config: ConfigDict) -> None:
    """Makes the prepared data set of the config, or finds it made."""
    builder = cache.data_set(config)
    sizes = ", ".join(f"{name} {s.num_examples:,}" for name, s in builder.info.splits.items())
    logging.info("%s in %s: %s", builder.info.full_name, builder.data_path, sizes)


def encode(config: ConfigDict, workdir: str) -> None:
    """Caches the codes of every split, in ``config.data.codes`` or ``workdir/codes``.

    The autoencoder is that of the workdir, or ``config.autoencoder.path``, or is trained. Every
    process takes its share of the shards; an interrupted encoding goes on where it was.
    """
    stage_one.check(config, workdir)
    with stage_two.claim_workdir(config, workdir):
        builder = cache.data_set(config)
        params = stage_one.prepare(config, workdir, builder)
        for split in builder.info.splits:
            cache.make(config, cache.directory(config, workdir), builder, split, params)


def inspect(config: ConfigDict, workdir: str, *, num_samples: int = 32) -> None:
    """Writes ``training_stream.png`` and ``statistics.md`` into ``workdir/inspect``.

    The sheet has the first records of the training stream, crop beside reconstruction where the
    workdir (or ``config.autoencoder.path``) has an autoencoder, from the cache where there is one.

    Args:
      config: the resolved config.
      workdir: of a run, or a new folder.
      num_samples: records on the sheet.
    """
    folder = Path(workdir) / "inspect"
    folder.mkdir(parents=True, exist_ok=True)
    builder = cache.data_set(config)
    content = cache.content(config)
    samples = _samples(config, workdir, builder, content, num_samples)
    if samples:
        sheet = folder / "training_stream.png"
        pictures.save(str(sheet), report.contact_sheet(samples))
        logging.info("the training stream: %s", sheet)
    found = {
        split: report.statistics(
            batches.records(builder, split, decode=False), content, description=f"reading {split}"
        )
        for split in builder.info.splits
    }
    page = folder / "statistics.md"
    text = report.page(builder.info.full_name, found, content)
    scratch = page.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(page)
    logging.info("what is in it: %s", page)


def _samples(config, workdir, builder, content, count) -> list[report.Sample]:
    source = batches.records(builder, cache.TRAIN, decode=False)
    path = stage_one.find(config, workdir)
    params = stage_one.load(config, path) if path else None
    codec = cache.Codec(config_lib.autoencoder_config(config), params) if path else None
    crop, num_crops = cache.crop(config, cache.TRAIN), cache.num_crops(config, cache.TRAIN)
    stream = {
        "count": count,
        "seed": config.seed,
        "null_text_rate": config.training.null_text_rate,
    }
    directory = cache.directory(config, workdir)
    if codec is not None and (Path(directory) / cache.TRAIN / codes.MANIFEST).exists():
        stored = cache.open_split(config, directory, cache.TRAIN, params)
        return report.cached_samples(stored, source, codec, crop, content, **stream)
    return report.source_samples(source, codec, crop, num_crops, content, **stream)
