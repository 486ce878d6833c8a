"""Few steps: a student whose own pictures a teacher judges, beside the pairs that it learns from.

A student of ``distil.py`` learns from pairs and knows no better than the chain that drew them. Here
it draws, too: discrete moment matching, D-MMD (arXiv:2603.20155). Noise is put on what the student
drew. The teacher says what it takes the clean codes for, without guidance or truncation, and an
auxiliary network, which learns along, says what they are for the student. Where the two differ, the
student moves towards the teacher. The losses are ``objective.matched``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.diffusion import objective, sampler
from vqd_jax.models import conditioned
from vqd_jax.models.attention import ONE_DEVICE, Placement
from vqd_jax.parallel import sharding
from vqd_jax.training import stage_two
from vqd_jax.training import task as task_lib
from vqd_jax.training.stage_two import CONDITION_KEYS, DenoiserTask, TrainState


class MatchedState(TrainState):
    """The state of a student, and of the two networks beside it.

    Attributes:
      auxiliary: of the auxiliary network; its averages are not used.
      teacher: parameters that nothing changes.
    """

    auxiliary: TrainState = None
    teacher: Any = None


def train_step(
    state: MatchedState,
    batch: dict[str, jax.Array],
    *,
    config: ConfigDict,
    placement: Placement = ONE_DEVICE,
) -> tuple[MatchedState, dict[str, jax.Array]]:
    """One step of the student and of the auxiliary network.

    Args:
      state: of the step before.
      batch: ``codes`` and ``first`` int32 [B, N], and the condition; see ``distil.draw_pairs``.
      config: the resolved config.
      placement: of the networks on several devices.

    Returns:
      The next state and float32 scalars: ``loss`` of the student, which is ``pairs`` and
      ``config.distil.moment_weight`` times ``moments``; ``auxiliary_loss``; ``gradient_norm`` and
      ``auxiliary_gradient_norm`` before clipping; ``learning_rate``.
    """
    schedule = config_lib.noise_schedule(config)
    times = sampler.step_times(config.distil.num_steps, schedule)[:-1]
    sizes = config_lib.model_config(config)

    def losses(learning, key, batch):
        condition = batch.get(CONDITION_KEYS[config.denoiser.condition])
        networks = (
            conditioned.bind(sizes, params, placement=placement).predictor(condition)
            for params in (*learning, state.teacher)
        )
        ends = batch["codes"], batch["first"]
        found = objective.matched(key, *networks, *ends, schedule, times)
        of_student, of_auxiliary, of_pairs = found
        loss = of_pairs + config.distil.moment_weight * of_student
        # Neither loss has a gradient in the other's network, so that of the sum is both of them.
        return loss + of_auxiliary, (
            {"loss": loss, "moments": of_student, "pairs": of_pairs},
            {"loss": of_auxiliary},
        )

    def gradients(_, key, batch):
        learning = state.params, state.auxiliary.params
        (_, found), made = jax.value_and_grad(losses, has_aux=True)(learning, key, batch)
        return made, None, found

    key = jax.random.fold_in(state.key, state.step)
    parts = config.training.gradient_accumulation
    made, _, found = task_lib.accumulate(gradients, None, key, batch, parts)
    statistics = state.time_statistics
    following, metrics = stage_two.updated(state, made[0], statistics, found[0], config)
    auxiliary, of_auxiliary = stage_two.updated(
        state.auxiliary, made[1], statistics, found[1], config
    )
    kept = {f"auxiliary_{name}": of_auxiliary[name] for name in ("loss", "gradient_norm")}
    return following.replace(auxiliary=auxiliary), metrics | kept


class MatchedTask(DenoiserTask):
    """A denoiser that a teacher judges; its batches are those of ``distil.StudentTask``.

    Args:
      teacher: nested dict of the teacher's parameters.
    """

    name, prefix = "distillation", "train"

    def __init__(self, config, dataset=None, evaluation=None, teacher=None):
        super().__init__(config, dataset, evaluation)
        self._teacher = teacher

    def create_state(self):
        state = stage_two.create_state(self._config)
        fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
        # Copies: a donated state must not hold one buffer twice.
        auxiliary, teacher = (jax.tree.map(jnp.copy, x) for x in (state, state.params))
        return MatchedState(**fields, auxiliary=auxiliary, teacher=teacher)

    def train_step(self, state, batch, placement):
        return train_step(state, batch, config=self._config, placement=placement)

    def begin(self, state):
        def placed(old):
            # A copy for each: a donated state must not hold one buffer twice.
            return sharding.put_like(old, jax.tree.map(np.array, self._teacher))

        auxiliary = state.auxiliary.replace(
            params=placed(state.auxiliary.params), ema_params=placed(state.auxiliary.ema_params)
        )
        return super().begin(state).replace(auxiliary=auxiliary, teacher=placed(state.teacher))
