"""CLIP's text tokenizer, byte-level BPE over 49,408 ids; and what text encoders make of its ids.

Letters: B batch, L text tokens (context length), D width of text features.

A caption becomes ``[start, bytes merged by rank ..., end, 0, 0, ...]``. Id 0 is the padding and
also the token "!", as in the published system; everything after the last end mark is padding.
"""

import functools
import gzip
import html
import importlib.resources
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ftfy
import jax
import numpy as np
from absl import logging
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from vqd_jax.errors import UserError

VOCAB_SIZE = 49408
PAD_ID = 0

_MERGES_FILE = "assets/bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 48894
Merges = list[tuple[str, str]]
_MARKS = ("<|startoftext|>", "<|endoftext|>")
_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def _byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes, in the order of the vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@functools.lru_cache(maxsize=1)
def _published() -> tuple[dict[str, int], Merges]:
    """CLIP's vocabulary and merges, from the packaged file."""
    packed = importlib.resources.files("vqd_jax.data").joinpath(_MERGES_FILE).read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 1 + _NUM_MERGES]
    merges = [tuple(line.split()) for line in lines]
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), *_MARKS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != VOCAB_SIZE:
        raise ValueError(
            f"{_MERGES_FILE}: {len(vocabulary)} different tokens instead of {VOCAB_SIZE}; "
            "the file is damaged, reinstall vqd_jax"
        )
    return vocabulary, merges


@functools.lru_cache(maxsize=1)
def _published_encoder() -> Tokenizer:
    """Made once in a process, which takes about 0.2 s."""
    return _byte_pair_encoder(*_published())


def _byte_pair_encoder(vocabulary: dict[str, int], merges: Merges) -> Tokenizer:
    encoder = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.decoder = decoders.ByteLevel()
    return encoder


class TextFeatures(NamedTuple):
    """What a text encoder makes of ids, whichever encoder it is.

    Whoever has an encoder that is not trained (``interop.pretrained.text_features``) gives one of
    these to ``encode``, which caches its features; a denoiser then takes them from the batch
    instead of computing them.

    Attributes:
      compute: ids int32 [B, L] -> features, floats [B, L, D].
      width: D.
      fingerprint: tells one text encoder from another; see ``files.fingerprint``.
    """

    compute: Callable[[np.ndarray], jax.Array]
    width: int
    fingerprint: str = ""


def clean(caption: str) -> str:
    """Lower case, text repaired by ftfy, HTML entities resolved, white space collapsed."""
    text = ftfy.fix_text(caption.lower())
    text = html.unescape(html.unescape(text)).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


class ClipTokenizer:
    """Captions to rows of L ids, equal to those of the published tokenizer.

    The ``tokenizers`` library splits captions and merges bytes. Marks are added here: the library's
    own template would also see a mark that follows other signs, where the published code sees none.

    Args:
      context_length: L, which counts the two marks; at least 2.
      vocabulary, merges: of another byte-level BPE of CLIP's kind, whose last two ids are the start
        mark and the end mark; None is CLIP's own.

    Attributes:
      context_length: L.
      vocab_size: number of ids.
      start_id, end_id: of the marks.

    Raises:
      ValueError: the context length is below 2.
    """

    def __init__(
        self,
        context_length: int = 77,
        vocabulary: dict[str, int] | None = None,
        merges: Merges | None = None,
    ):
        if context_length < 2:
            raise ValueError(
                f"context_length is {context_length}; a row needs 2 ids for its start and end mark"
            )
        self.context_length = context_length
        if vocabulary is None:
            self._vocabulary, self._merges = _published()
            self._encoder = _published_encoder()
        else:
            self._vocabulary, self._merges = vocabulary, merges
            self._encoder = _byte_pair_encoder(vocabulary, merges)
        self.vocab_size = len(self._vocabulary)
        self._marks = {mark: self._vocabulary[mark] for mark in _MARKS}
        self.start_id, self.end_id = self._marks.values()

    @classmethod
    def from_folder(cls, directory: str | Path, context_length: int = 77) -> "ClipTokenizer":
        """The tokenizer in ``vocab.json`` and ``merges.txt``, as Hugging Face lays it out.

        Raises:
          UserError: a file is missing or damaged, or the tokenizer is of another kind.
        """
        try:
            text = (Path(directory) / "vocab.json").read_text(encoding="utf-8")
            lines = (Path(directory) / "merges.txt").read_text(encoding="utf-8").splitlines()
            vocabulary = {str(token): int(i) for token, i in json.loads(text).items()}
            merges = [tuple(x.split()) for x in lines if x and not x.startswith("#version")]
            if sorted(vocabulary.values()) != list(range(len(vocabulary))):
                raise ValueError("the ids have gaps")
            if [vocabulary[mark] for mark in _MARKS] != [len(vocabulary) - 2, len(vocabulary) - 1]:
                raise ValueError("the marks are not the last two ids")
            return cls(context_length, vocabulary, merges)
        # The library raises plain exceptions, such as that of a merge that the vocabulary lacks.
        except Exception as error:
            raise UserError(f"{directory} holds no tokenizer of CLIP's kind: {error}") from error

    def files(self, directory: str) -> dict[str, str]:
        """What ``from_folder`` reads: {"<directory>/vocab.json": text, ...}."""
        merges = ["#version: 0.2", *(" ".join(pair) for pair in self._merges)]
        return {
            f"{directory}/vocab.json": json.dumps(self._vocabulary, ensure_ascii=False) + "\n",
            f"{directory}/merges.txt": "\n".join(merges) + "\n",
        }

    def _ids(self, caption: str) -> list[int]:
        ids = [self.start_id]
        for piece, _ in self._encoder.pre_tokenizer.pre_tokenize_str(clean(caption)):
            # The published code lets the marks be written in a caption, as words of their own.
            if piece in self._marks:
                ids.append(self._marks[piece])
            else:
                ids.extend(token.id for token in self._encoder.model.tokenize(piece))
        ids.append(self.end_id)
        return ids

    def num_ids(self, caption: str) -> int:
        """The number of ids of a whole caption, its two marks included."""
        return len(self._ids(caption))

    def encode(self, caption: str, warn: bool = True) -> np.ndarray:
        """Encodes one caption.

        Args:
          caption: any text; "" gives ``[start, end, 0, ...]``.
          warn: log a warning if the caption is cut.

        Returns:
          int32 [L]. A caption of more than L ids keeps the first L - 1 and the end mark.
        """
        return self.encode_batch([caption], warn)[0]

    def encode_batch(self, captions: list[str], warn: bool = True) -> np.ndarray:
        """Encodes B captions; see `encode`. Returns int32 [B, L]."""
        length = self.context_length
        rows = np.full((len(captions), length), PAD_ID, np.int32)
        for row, caption in zip(rows, captions, strict=True):
            ids = self._ids(caption)
            if len(ids) > length:
                if warn:
                    told = "caption of %d ids is cut to the limit of %d: %r..."
                    logging.warning(told, len(ids), length, caption[:60])
                ids = [*ids[: length - 1], self.end_id]
            row[: len(ids)] = ids
        return rows

    def decode(self, ids) -> str:
        """The cleaned text of a row of ids.

        Args:
          ids: integers [<= L], as `encode` gives them. The start mark, the last end mark and all
            that follows it are left out.

        Returns:
          The text, with a space after every token that ends a word ("bird's" gives "bird 's").

        Raises:
          ValueError: an id outside 0..vocab_size-1.
        """
        ids = [int(i) for i in ids]
        bad = [i for i in ids if not 0 <= i < self.vocab_size]
        if bad:
            raise ValueError(f"id {bad[0]} is outside 0..{self.vocab_size - 1}")
        if self.end_id in ids:
            ids = ids[: len(ids) - 1 - ids[::-1].index(self.end_id)]
        if ids and ids[0] == self.start_id:
            ids = ids[1:]
        marks = {i: f"{mark}</w>" for mark, i in self._marks.items()}
        words = "".join(marks.get(i) or self._encoder.id_to_token(i) for i in ids).split("</w>")
        return " ".join(self._encoder.decoder.decode([word]) for word in words).strip()
