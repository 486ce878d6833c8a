# ruff: noqa: E402
"""One process of a run on virtual CPU devices, for the tests: worker.py DEVICES WORKDIR OPTIONS.

OPTIONS is JSON: ``config`` (flattened fields), ``kill_at``, ``fail_at`` or ``signal_at``
(a batch at which process 1 ends itself, raises, or is told to stop), or ``codes``, a folder of
cached codes to read instead of made-up batches.
"""

import json
import math
import os
import signal
import sys
import time

import jax
import numpy as np

NUM_DEVICES, WORKDIR, OPTIONS = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")

from configs import tiny
from vqd_jax import checkpoint
from vqd_jax import config as config_lib
from vqd_jax.data import batches
from vqd_jax.data import codes as codes_lib
from vqd_jax.diffusion import sampler
from vqd_jax.models import conditioned
from vqd_jax.parallel import processes, sharding
from vqd_jax.training import loop, stage_two


class Stream:
    """Batches that are a function of their number; this process's rows of them."""

    def __init__(self, config, mesh):
        self._config, self._number = config, 0
        self._rows = sharding.local_rows(mesh, config.training.batch_size)

    def __iter__(self):
        return self

    def __next__(self):
        config = self._config
        rng = np.random.default_rng(self._number)
        self._number += 1
        if jax.process_index() == 1 and self._number == OPTIONS.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if jax.process_index() == 1 and self._number == OPTIONS.get("fail_at"):
            raise ValueError("a broken record")
        if jax.process_index() == 1 and self._number == OPTIONS.get("signal_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        if self._number >= OPTIONS.get("signal_at", math.inf):
            # The signal is looked for once a second; a run that takes less to its end is not ended.
            time.sleep(0.5)
        size = config.training.batch_size
        codes = rng.integers(0, config.autoencoder.num_codes, (size, 16), np.int32)
        ids = rng.integers(0, 49408, (size, config.text_encoder.context_length), np.int32)
        return {"codes": codes[self._rows], "text_ids": ids[self._rows]}

    def get_state(self):
        return {"batches": self._number}

    def set_state(self, state):
        self._number = state["batches"]


class Task(stage_two.DenoiserTask):
    """Stage two; weights to begin from may come from the host, once."""

    def begin(self, state):
        with jax.transfer_guard("allow"):
            return super().begin(state)


def stream(config, mesh):
    if "codes" not in OPTIONS:
        return Stream(config, mesh)
    c = config.training
    size = c.batch_size // jax.process_count()
    source = codes_lib.open_split(OPTIONS["codes"])
    return batches.code_dataset([source], size, config.seed, c.null_text_rate)


def sample(config, mesh, params):
    """Codes of 16 images of the averaged parameters, whole on every process."""
    model_config = config_lib.model_config(config)
    schedule = config_lib.noise_schedule(config)

    def run(params, key_data, ids):
        model = conditioned.bind(model_config, params, placement=sharding.placement(mesh))
        keys = jax.random.wrap_key_data(key_data)
        settings = sampler.Settings(num_steps=5)

        def predict(tokens, time):
            return model.log_x0(tokens, time, ids)

        return sampler.sample(keys, predict, (len(ids), 16), schedule, settings).codes

    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(5), 16)))
    ids = np.arange(16 * 16, dtype=np.int32).reshape(16, 16)
    rows = sharding.put_rows((keys, ids), mesh)
    made = jax.jit(run, out_shardings=sharding.batch_sharding(mesh))(params, *rows)
    return sharding.fetch(made).tolist()


def main():
    config = tiny.get_config()
    config.update_from_flattened_dict(OPTIONS.get("config", {}))
    mesh = sharding.make_mesh(config)
    c = config.training
    sharding.require_divisible("training.batch_size", c.batch_size, mesh, c.gradient_accumulation)
    with jax.transfer_guard("disallow"):
        state = loop.fit(
            Task(config, stream(config, mesh)),
            loop.Schedule.of(config, keep_checkpoints=3),
            loop.Place(WORKDIR, str(checkpoint.folder(config, WORKDIR)), mesh, config),
        )
    codes = sample(config, mesh, jax.jit(stage_two.complete)(state, state.ema_params))
    if processes.is_writer():
        with open(f"{WORKDIR}/codes.json", "w", encoding="utf-8") as file:
            json.dump(codes, file)


if __name__ == "__main__":
    with processes.session("JAX_COORDINATOR_ADDRESS" in os.environ):
        try:
            main()
        except loop.Terminated as stopped:
            print(stopped)
            sys.exit(143)
