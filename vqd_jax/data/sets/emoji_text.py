"""Noto Emoji with English captions: 3,524 pictures of 64x64 pixels that come with this project."""

import json
import zipfile
from collections.abc import Iterator

import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from vqd_jax.data import images

_ASSETS = epath.resource_path("vqd_jax.data") / "assets"


class EmojiText(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `emoji_text`.

    Features: `image` uint8 [64, 64, 3]; `captions`, 1 to 4 texts; `concept` and `category`, texts;
    `skin_tone`, a text: "" for none, two tones joined by "+"; `file`, the code points as a name.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    pkg_dir_path = _ASSETS / "emoji_text"

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            license=(
                "Pictures: Apache License 2.0 (Google), modified: composited on white, palette "
                "reduced. Captions: Unicode licence (CLDR short names) and MIT (emoji-datasource, "
                "Cal Henderson). Full texts and notice lie beside the packaged archive as "
                "noto_emoji_64.*."
            ),
            homepage="https://github.com/googlefonts/noto-emoji",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "concept": tfds.features.Text(),
                    "category": tfds.features.Text(),
                    "skin_tone": tfds.features.Text(),
                    "file": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # The archive is part of the package.
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        with (_ASSETS / "noto_emoji_64.zip").open("rb") as file, zipfile.ZipFile(file) as pictures:
            for line in pictures.read("captions.jsonl").decode("utf-8").splitlines():
                row = json.loads(line)
                if row["split"] != split:
                    continue
                name = row["file"].removeprefix("images/").removesuffix(".webp")
                yield (
                    name,
                    {
                        "image": Image.fromarray(images.decode(pictures.read(row["file"]))),
                        "captions": row["captions"],
                        "concept": row["concept"],
                        "category": row["category"],
                        "skin_tone": row["skin_tone"] or "",
                        "file": name,
                    },
                )
