"""What tests/data/test_kills.py kills: python killed.py TASK FOLDER [NUM_STEPS]."""

import functools
import sys

import flax.struct
import jax
import jax.numpy as jnp

from configs import tiny
from vqd_jax import config as config_lib
from vqd_jax import modes
from vqd_jax.data import batches, codes, sets
from vqd_jax.data import encode as encode_lib
from vqd_jax.models import autoencoder
from vqd_jax.parallel import sharding
from vqd_jax.training import loop
from vqd_jax.training.task import Task

BATCH = 45  # Does not divide the 3155 records: epochs end inside batches.


def configured(folder):
    config = tiny.get_config()
    config.data.dir = f"{folder}/data"
    return config


def prepare(folder):
    modes.prepare(configured(folder))


def encode(folder):
    config = configured(folder)
    sizes = config_lib.autoencoder_config(config)
    params = jax.jit(functools.partial(autoencoder.init_params, sizes))(jax.random.key(0))
    builder = sets.load(config.data.name, config.data.dir)
    content = encode_lib.content(config)
    where = f"{folder}/codes"
    encode_lib.make(config, where, builder, "train", params, content, records_per_shard=64)


class Seen(flax.struct.PyTreeNode):
    """How often each record was trained on, and sums that any change of a batch changes."""

    step: jax.Array
    counts: jax.Array
    order: jax.Array
    content: jax.Array


def look(state, batch):
    places = jnp.arange(1, BATCH + 1, dtype=jnp.uint32)
    order = state.order * 31 + (batch["id"].astype(jnp.uint32) * places).sum(dtype=jnp.uint32)
    content = batch["codes"].sum() + 7 * batch["text_ids"].sum()
    content = state.content * 31 + content.astype(jnp.uint32)
    counts = state.counts.at[batch["id"]].add(1)
    metrics = {"loss": jnp.float32(0), "gradient_norm": jnp.float32(0)}
    return Seen(state.step + 1, counts, order, content), metrics


class Look(Task):
    name, prefix = "training", "train"

    def __init__(self, batches):
        self.batches = batches

    def create_state(self):
        zero = jnp.zeros((), jnp.uint32)
        return Seen(jnp.zeros((), jnp.int32), jnp.zeros(3155, jnp.int32), zero, zero)

    def train_step(self, state, batch, placement):
        return look(state, batch)


def train(folder, num_steps):
    config = configured(folder)
    mesh = sharding.make_mesh(config)
    source = codes.open_split(f"{folder}/codes/train")
    task = Look(batches.code_dataset(source, BATCH, 3, 0.1, with_ids=True))
    numbers = {"log_every": 1, "eval_every": 1000, "save_every": 10, "keep_checkpoints": 2}
    schedule = loop.Schedule(num_steps=int(num_steps), batch_size=BATCH, **numbers)
    loop.fit(task, schedule, loop.Place(f"{folder}/run", f"{folder}/run/checkpoints", mesh, config))


if __name__ == "__main__":
    {"prepare": prepare, "encode": encode, "train": train}[sys.argv[1]](*sys.argv[2:])
