"""What a source holds of a model, before it becomes a model folder."""

from typing import Any, NamedTuple

import jax
import numpy as np


class Part(NamedTuple):
    """One network, or what stands beside one.

    Attributes:
      config: its sizes: ``AutoencoderConfig``, ``DenoiserConfig``, ``TextEncoderConfig``, or None.
      params: nested dict of float32 arrays, or one array.
      source: where it was found.
    """

    config: Any
    params: Any
    source: str

    @property
    def num_parameters(self) -> int:
        return sum(np.size(x) for x in jax.tree.leaves(self.params))
