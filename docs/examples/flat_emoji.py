"""Pictures of another style, to fine-tune on: Fluent Emoji (Microsoft, MIT) from an npm package.

npm pack @iconify-json/fluent-emoji-flat@1.2.6 && pip install resvg-py
python docs/examples/flat_emoji.py iconify-json-fluent-emoji-flat-1.2.6.tgz PICTURES

Writes 200 pictures of 64x64 pixels to PICTURES/train and 50 others to PICTURES/validation, with a
metadata.jsonl in each: a folder for `--config.data.name=image_text_folder`. The concepts are drawn
at random among those of the packaged emoji that come without a skin tone, and every caption names
the style: "red apple, flat style".
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from vqd_jax.data import batches, sets

_SIDE, _TRAIN, _VALIDATION = 64, 200, 50


def drawn(icon: dict, width: int, height: int) -> Image.Image:
    """An icon on white."""
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        f"{icon['body']}</svg>"
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * _SIDE, height=4 * _SIDE))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB").resize((_SIDE, _SIDE), Image.BOX)


def main(package: str, target: str) -> None:
    with tarfile.open(package) as tar:
        icons = json.load(tar.extractfile("package/icons.json"))
    builder = sets.load("emoji_text")
    known = {r["captions"][0] for r in batches.records(builder, "train") if not r["skin_tone"]}
    named = {name.replace("-", " "): icon for name, icon in icons["icons"].items()}
    both = sorted(known & named.keys())
    chosen = np.random.default_rng(0).permutation(both)[: _TRAIN + _VALIDATION]
    for split, captions in (("train", chosen[:_TRAIN]), ("validation", chosen[_TRAIN:])):
        folder = Path(target) / split
        folder.mkdir(parents=True)
        lines = []
        for number, caption in enumerate(captions):
            icon = named[caption]
            sizes = [icon.get(side, icons.get(side, 32)) for side in ("width", "height")]
            drawn(icon, *sizes).save(folder / f"{number:03d}.png")
            lines.append({"file_name": f"{number:03d}.png", "text": f"{caption}, flat style"})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metadata.jsonl").write_text(text)
    print(f"{target}: {_TRAIN} and {_VALIDATION} of {len(both)} shared concepts")


if __name__ == "__main__":
    main(*sys.argv[1:])
