"""Time and memory of an evaluation: features of synthetic pictures, and their distances.

python benchmarks/evaluation_cost.py --counts=10000 --net=efficientnet-224
python benchmarks/evaluation_cost.py --counts=1000,100000 --net=random-16 --metrics=frechet,kid

A picture is made when it is read. Every count is measured in a process of its own, against 3,155
real pictures, as many as the emoji set has. The peak is that of the whole process, JAX included.
"""

import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from vqd_jax.errors import UserError
from vqd_jax.evaluation import distances, features, measures
from vqd_jax.evaluation.pictures import Extractor

_COUNTS = flags.DEFINE_list("counts", ["1000", "10000"], "Numbers of generated pictures.")
_NET = flags.DEFINE_string("net", "efficientnet-224", "Network, and the side that it sees.")
_SIDE = flags.DEFINE_integer("side", 32, "Side of a picture in pixels.")
_METRICS = flags.DEFINE_list("metrics", ["frechet", "kid", "neighbours", "copies"], "Distances.")
_ONE = flags.DEFINE_bool("one", False, "Measure the first count in this process.")

_NUM_REAL = 3155


class Synthetic:
    """Blurred noise; a picture is decided by its number."""

    def __init__(self, count, first):
        self._count, self._first = count, first
        self.identity = {"synthetic": first}

    def __len__(self):
        return self._count

    def read(self, places):
        made = []
        for place in places:
            rng = np.random.default_rng(self._first + place)
            coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
            times = _SIDE.value // 8
            made.append(coarse.repeat(times, axis=0).repeat(times, axis=1))
        return np.stack(made)


def net_of(name):
    kind, _, side = name.partition("-")
    make = {"random": features.random_net, "efficientnet": features.efficientnet_lite0,
            "mobilenet": features.mobilenet_v2}  # fmt: skip
    if kind not in make or not side.isdigit():
        raise UserError(f"--net={name}: give {', '.join(make)} with a side, as random-16")
    return make[kind](size=int(side))


def measure(count):
    """Prints seconds of features and of distances, and the peak of memory."""
    net = net_of(_NET.value)
    with tempfile.TemporaryDirectory() as folder:
        start, extractor = time.perf_counter(), Extractor(net, folder)
        real = extractor.stored(Synthetic(_NUM_REAL, 10**9), "real")
        made = extractor.stored(Synthetic(count, 0), "generated")
        seen = time.perf_counter()
        found = measures.statistics(real)
        reference = distances.Reference(found.mean, found.covariance)
        training = real if "copies" in _METRICS.value else None
        of = measures.Real(real, reference, training, None)
        measures.of_features(made, of, _METRICS.value)
        end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"{count:>8,} pictures, {net.name}: features {seen - start:6.1f} s, distances "
        f"{end - seen:6.1f} s, peak {peak:7,.0f} MiB",
        flush=True,
    )


def main(argv):
    if _ONE.value:
        measure(int(_COUNTS.value[0]))
        return
    for count in _COUNTS.value:
        again = [sys.executable, *argv[:1], "--one", f"--counts={count}", f"--net={_NET.value}"]
        again += [f"--side={_SIDE.value}", f"--metrics={','.join(_METRICS.value)}"]
        subprocess.run(again, check=True)


if __name__ == "__main__":
    app.run(main)
