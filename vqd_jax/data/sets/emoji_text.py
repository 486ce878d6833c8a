"""Noto Emoji with English captions: 3,524 pictures of 64x64 pixels, packaged with this project."""

import importlib.resources
import io
import json
import zipfile
from collections.abc import Iterator

import tensorflow_datasets as tfds
from PIL import Image

_ARCHIVE = "assets/noto_emoji_64.zip"

_DESCRIPTION = """\
Pictures of Google's Noto Emoji (v2.048, region flags left out), 64x64 pixels on a white background,
each with one to four lower-case English captions, the most natural first. Pictures that differ only
in skin tone, gender or direction share a `concept`, and a concept lies in one split only: 3,155
pictures train, 176 validate, 193 test. Most pictures (2,261) are people and hands, so sample by
concept where balance matters.
"""

_CITATION = """\
@misc{notoemoji,
  title = {Noto Emoji},
  author = {{Google}},
  note = {Version 2.048, as distributed in emoji-datasource-google 16.0.0 by Cal Henderson;
          captions from Unicode CLDR short names (emoji-test.txt 15.0) and emoji-datasource},
  howpublished = {\\url{https://github.com/googlefonts/noto-emoji}},
}
"""

_LICENSE = (
    "Pictures: Apache License 2.0 (Google), modified: composited on white, palette reduced. "
    "Captions: Unicode licence (CLDR short names) and MIT (emoji-datasource, Cal Henderson). "
    "Full texts and notice lie beside the packaged archive as noto_emoji_64.*."
)


class EmojiText(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `emoji_text`.

    Features: `image` uint8 [64, 64, 3]; `captions` 1 to 4 texts; `concept`, `category` texts;
    `skin_tone` text, "" for none, two tones joined by "+"; `file` the picture's name (code points).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            citation=_CITATION,
            license=_LICENSE,
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
        archive = importlib.resources.files("vqd_jax.data").joinpath(_ARCHIVE)
        with archive.open("rb") as file, zipfile.ZipFile(file) as pictures:
            for line in pictures.read("captions.jsonl").decode("utf-8").splitlines():
                row = json.loads(line)
                if row["split"] != split:
                    continue
                name = row["file"].removeprefix("images/").removesuffix(".webp")
                yield (
                    name,
                    {
                        "image": Image.open(io.BytesIO(pictures.read(row["file"]))).convert("RGB"),
                        "captions": row["captions"],
                        "concept": row["concept"],
                        "category": row["category"],
                        "skin_tone": row["skin_tone"] or "",
                        "file": name,
                    },
                )
