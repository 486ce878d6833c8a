"""What is compared with what: one protocol for each data set. A figure carries its protocol's name.

Letters: P prompts, N generated pictures, R real pictures.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vqd_jax.data import sets
from vqd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which pictures are drawn, and which real ones they are compared with.

    Attributes:
      name: it stands beside every figure.
      num_generated: N; 0 is one for each prompt.
      prompts: split whose captions or labels are the prompts; "" is the one to evaluate on.
      reference: split of the real pictures; "" is that of the prompts.
      captions: "one", a random caption of each picture; "all"; or "classes", each label.
      paired: the reference is the pictures of the prompts alone.
      num_reference: the real pictures are repeated to this many; 0 takes each once.
      statement: what a report says of it.
    """

    name: str
    num_generated: int
    prompts: str
    reference: str
    captions: str
    paired: bool
    num_reference: int
    statement: str


# VQ-Diffusion's and DALL-E's: captions and pictures of val2014.
COCO = Protocol(
    "coco", 30_000, "validation", "validation", "one", True, 0,
    "one random caption of each of 30,000 random pictures of val2014, against these pictures",
)  # fmt: skip
# As VQ-Diffusion's authors said: 30,000 against test pictures that are repeated to 30,000.
CUB = Protocol(
    "cub", 30_000, "test", "test", "all", False, 30_000,
    "all captions of the test pictures, repeated to 30,000, against the test pictures, repeated to "
    "30,000",
)  # fmt: skip
IMAGENET = Protocol(
    "imagenet", 50_000, "train", "train", "classes", False, 0,
    "50 pictures of each class, against all training pictures",
)  # fmt: skip
EMOJI = Protocol(
    "emoji", 10_000, "train", "train", "one", False, 0,
    "a random caption of each training picture, repeated to 10,000, against all training pictures",
)  # fmt: skip
SHAPES = Protocol(
    "shapes", 2_000, "validation", "train", "all", False, 0,
    "the four captions of each of 500 validation pictures, against all training pictures",
)  # fmt: skip
HELD_OUT = Protocol(
    "held_out", 0, "", "", "one", False, 0,
    "a random caption or the label of each held-out picture, against these pictures",
)  # fmt: skip
_OF_SET = {
    "coco_text": COCO,
    "cub_text": CUB,
    "imagenet_class": IMAGENET,
    "emoji_text": EMOJI,
    "shapes_text": SHAPES,
}
PROTOCOLS = {p.name: p for p in (*_OF_SET.values(), HELD_OUT)}


def find(name: str, data_set: str) -> Protocol:
    """The protocol of a name, or, if that is "", of a data set.

    Raises:
      UserError: there is none of this name, or it belongs to another data set.
    """
    base = data_set.partition("/")[0]
    if not name:
        return _OF_SET.get(base, HELD_OUT)
    if name not in PROTOCOLS:
        raise UserError(
            f"config.evaluation.protocol={name!r}: must be one of {', '.join(PROTOCOLS)}"
        )
    protocol = PROTOCOLS[name]
    if protocol in _OF_SET.values() and _OF_SET.get(base) is not protocol:
        raise UserError(f"config.evaluation.protocol={name!r} is not one of the data set {base}")
    return protocol


@dataclasses.dataclass(frozen=True)
class Plan:
    """A protocol, applied to a prepared data set.

    Attributes:
      protocol: of which.
      prompts: P texts; picture k is of prompt k mod P.
      records: the place in ``prompt_split`` of each prompt's picture, int64 [P]; -1 is none.
      num_generated: N.
      prompt_split, reference_split: their names.
      reference: places of the real pictures, int64 [R].
      weights: how often each real picture counts, int64 [R].
    """

    protocol: Protocol
    prompts: list[str]
    records: np.ndarray
    num_generated: int
    prompt_split: str
    reference_split: str
    reference: np.ndarray
    weights: np.ndarray

    @property
    def name(self) -> str:
        """That of the protocol, and what was changed in it."""
        usual = self.protocol.num_generated or len(self.prompts)
        if self.num_generated == usual:
            return self.protocol.name
        return f"{self.protocol.name}, {self.num_generated:,} of {usual:,} pictures"


def plan(
    protocol: Protocol,
    builder: Any,
    records: Sequence[dict],
    *,
    condition: str,
    num_classes: int = 0,
    num_generated: int = 0,
) -> Plan:
    """The prompts and the real pictures of a protocol; the same at every call.

    Args:
      protocol: which.
      builder: the prepared data set.
      records: of the split of the prompts, without pixels; see ``split_of``.
      condition: "text", "class" or "none", what the model is given.
      num_classes: of a class-conditional model.
      num_generated: N; 0 is the protocol's.

    Raises:
      UserError: a model of this condition has no such prompts.
    """
    prompt_split = split_of(protocol.prompts, builder)
    reference_split = split_of(protocol.reference or prompt_split, builder)
    random = np.random.default_rng(0)
    order = random.permutation(len(records))
    if protocol.paired and protocol.num_generated:
        order = order[: protocol.num_generated]
    prompts, places = _prompts(protocol, records, order, random, condition, num_classes)
    usual = protocol.num_generated or len(prompts)
    size = builder.info.splits[reference_split].num_examples
    reference = np.sort(order) if protocol.paired else np.arange(size)
    weights = np.ones(len(reference), np.int64)
    if protocol.num_reference > len(reference):
        times, more = divmod(protocol.num_reference, len(reference))
        weights = times + (np.arange(len(reference)) < more).astype(np.int64)
    return Plan(
        protocol, prompts, places, num_generated or usual, prompt_split, reference_split,
        reference, weights,
    )  # fmt: skip


def split_of(name: str, builder: Any) -> str:
    """A split's name, or that to evaluate on if it is "" or the set has no such split."""
    return name if name in builder.info.splits else sets.evaluation_split(builder)


def _prompts(protocol, records, order, random, condition, num_classes):
    if condition == "none":
        return [""], np.full(1, -1)
    if condition == "class":
        if protocol.captions == "classes":
            return [str(label) for label in range(num_classes)], np.full(num_classes, -1)
        return [str(int(records[int(i)]["label"])) for i in order], order
    prompts, places = [], []
    for place in order.tolist():
        captions = records[place].get("captions")
        if captions is None:
            raise UserError(
                f"the data set has no captions, and a model of text needs them: the protocol "
                f"{protocol.name} cannot be followed"
            )
        if protocol.captions == "one":
            captions = [captions[int(random.integers(len(captions)))]]
        prompts += captions
        places += [place] * len(captions)
    return prompts, np.array(places)
