"""Training objective and likelihood (VQ-Diffusion, section 4.1 and algorithm 1).

The variational bound of an image is a sum over t = 1..T of KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t))
(at t = 1 that is -log p0[x_0], since the posterior at time 0 is p0 itself). One t is drawn for each
image, and its term is divided by the probability p_t of drawing it. The x_0 term, -log p0[x_0] of
every token (equation 9 of the paper), is added with a weight that falls with t.

Letters: B batch, N image tokens, K codes, T steps.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from vqd_jax.diffusion import chunks, transition
from vqd_jax.diffusion.schedule import Schedule

PredictX0 = Callable[[jax.Array, jax.Array], jax.Array]

# How strongly one visit moves the running mean of squared losses, and how many visits every time
# needs before the means are used (both as in the published code).
HISTORY_RATE = 0.1
MIN_VISITS = 10


class TimeStatistics(struct.PyTreeNode):
    """What importance sampling of t has learnt of each time 1..T (entry t-1).

    Attributes:
      squared_loss: float32 [T], running mean of the squared bound term of an image, nats^2.
      visits: float32 [T], how many images were drawn at that time.
    """

    squared_loss: jax.Array
    visits: jax.Array


def init_time_statistics(num_steps: int) -> TimeStatistics:
    """No visit yet: times are drawn uniformly."""
    return TimeStatistics(jnp.zeros(num_steps), jnp.zeros(num_steps))


def time_probabilities(statistics: TimeStatistics) -> jax.Array:
    """float32 [T], the probability p_t of drawing each time (entry t-1).

    Proportional to the root of the mean squared loss; time 1 borrows the value of time 2. Uniform
    until every time was visited more than MIN_VISITS times.
    """
    num_steps = statistics.visits.shape[0]
    weight = jnp.sqrt(statistics.squared_loss + 1e-10) + 1e-4
    weight = weight.at[0].set(weight[min(1, num_steps - 1)])
    uniform = jnp.full(num_steps, 1.0 / num_steps)
    known = jnp.all(statistics.visits > MIN_VISITS)
    return jnp.where(known, weight / weight.sum(), uniform)


def sample_times(key: jax.Array, probabilities: jax.Array, batch: int) -> jax.Array:
    """int32 [B] of times in 1..T, each with the given marginal probability.

    The draws are stratified: one uniform offset, B equally spaced points of the inverse cumulative
    distribution. That keeps every marginal and lowers the variance of the batch mean. Their order
    is random, because mixed data sets have fixed rows in a batch and each of them must meet every
    time.
    """
    points = (jnp.arange(batch) + jax.random.uniform(key)) / batch
    cumulative = jnp.cumsum(probabilities)
    index = jnp.searchsorted(cumulative / cumulative[-1], points, side="right")
    times = jnp.minimum(index, probabilities.shape[0] - 1).astype(jnp.int32) + 1
    return jax.random.permutation(jax.random.fold_in(key, 1), times)


def update_time_statistics(
    statistics: TimeStatistics, times: jax.Array, losses: jax.Array
) -> TimeStatistics:
    """Statistics after the images of a batch, with bound terms ``losses`` [B] at ``times`` [B].

    Images that share a time count once, with the mean of their squared losses: the result does not
    depend on their order.
    """
    num_steps = statistics.visits.shape[0]
    count = jax.ops.segment_sum(jnp.ones_like(losses), times - 1, num_steps)
    squared = jax.ops.segment_sum(losses**2, times - 1, num_steps) / jnp.maximum(count, 1.0)
    moved = (1 - HISTORY_RATE) * statistics.squared_loss + HISTORY_RATE * squared
    return TimeStatistics(
        squared_loss=jnp.where(count > 0, moved, statistics.squared_loss),
        visits=statistics.visits + count,
    )


@jax.custom_vjp
def pick(log_p: jax.Array, index: jax.Array) -> jax.Array:
    """log_p[index], float32 [] of [K], with a gradient that is a comparison and no scatter."""
    return log_p[index]


def _pick_forward(log_p, index):
    return log_p[index], (log_p, index)


def _pick_backward(residuals, gradient):
    log_p, index = residuals
    return jnp.where(jnp.arange(log_p.shape[0]) == index, gradient, 0.0), None


pick.defvjp(_pick_forward, _pick_backward)


def token_bound(
    log_x0: jax.Array, x0: jax.Array, x_t: jax.Array, t: jax.Array, schedule: Schedule
) -> jax.Array:
    """KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)) of one token, nats; exact for every schedule.

    Args:
      log_x0: float32 [K], predicted log-probabilities of the clean code, normalised.
      x0: int32 [], the clean code.
      x_t: int32 [], the token at time t; K is the mask token.
      t: int32 [], time in 1..T.
    """
    num_codes = schedule.num_codes
    b = transition.bridge(t - 1, t, schedule)
    masked = x_t == num_codes
    x = jnp.where(masked, 0, x_t)
    log_px, log_p0 = pick(log_x0, x), pick(log_x0, x0)
    same = x == x0

    jump = jnp.where(masked, b.unmask, b.unreplace)
    model_noise = jnp.where(masked, 1.0, transition.noise_share(log_px, b.noise_at_t))
    true_noise = jnp.where(masked | ~same, 1.0, b.noise_at_t)
    model_uniform = b.uniform / num_codes * model_noise
    true_uniform = b.uniform / num_codes * true_noise

    # Every code that is neither x_0 nor the one shown: q is the same for all of them, so only the
    # sum of log p(j) = log model_uniform + log(1 + ratio p0_j) is needed, over all codes (which is
    # quick) less the one or two. Their part vanishes with the replace mass of the schedule.
    ratio = b.clean / jnp.where(model_uniform > 0, model_uniform, 1.0)

    def over_uniform(log_p):
        return jnp.log(1 + ratio * jnp.exp(log_p))

    over_rest = over_uniform(log_x0).sum() - over_uniform(log_p0)
    over_rest -= jnp.where(masked | same, 0.0, over_uniform(log_px))
    num_rest = num_codes - jnp.where(masked | same, 1, 2)
    change = transition.safe_log(true_uniform) - transition.safe_log(model_uniform)
    rest = jump * true_uniform
    kl_rest = jnp.where(rest > 0, rest * (num_rest * change - over_rest), 0.0)

    # The clean code where it is not the one shown.
    log_model_x0 = jnp.logaddexp(
        transition.safe_log(b.clean) + log_p0, transition.safe_log(model_uniform)
    )
    true_x0 = b.clean + true_uniform
    kl_x0 = jump * true_x0 * (transition.safe_log(true_x0) - log_model_x0)
    kl_x0 = jnp.where((jump * true_x0 > 0) & (masked | ~same), kl_x0, 0.0)

    # The code shown: p0 is 1 (same) or 0 there under the truth.
    true_log_px = jnp.where(same, 0.0, transition.LOG_ZERO)
    log_true_x = transition.log_stay(true_log_px, b, num_codes)
    kl_x = jnp.exp(log_true_x) * (log_true_x - transition.log_stay(log_px, b, num_codes))
    kl_x = jnp.where(masked, 0.0, kl_x)
    # Each part may round below zero, the divergence cannot.
    return jnp.maximum(kl_rest + kl_x0 + kl_x, 0.0)


def _token_terms(logits, x0, x_t, t, schedule):
    """``token_bound`` and -log p0[x0] of one token; logits [K]."""
    log_x0 = logits - jax.nn.logsumexp(logits)
    return token_bound(log_x0, x0, x_t, t, schedule), -pick(log_x0, x0)


def _batch_terms(logits, x0, x_t, t, schedule):
    over_tokens = jax.vmap(_token_terms, in_axes=(0, 0, 0, None, None))
    return jax.vmap(over_tokens, in_axes=(0, 0, 0, 0, None))(logits, x0, x_t, t, schedule)


@jax.custom_vjp
def terms(
    logits: jax.Array, x0: jax.Array, x_t: jax.Array, t: jax.Array, schedule: Schedule
) -> tuple[jax.Array, jax.Array]:
    """``token_bound`` and the cross-entropy -log p0[x0] of every token, nats.

    Computed in chunks of tokens, forward and backward, so that all that is stored of the logits'
    size is their gradient.

    Args:
      logits: float32 [B, N, K], of the clean codes; log p0 will do.
      x0, x_t: int32 [B, N], clean codes and tokens at time t.
      t: int32 [B], times in 1..T.
      schedule: the noise schedule; neither it nor the tokens have a gradient.

    Returns:
      Two of float32 [B, N].
    """
    of_chunk = functools.partial(_batch_terms, t=t, schedule=schedule)
    return chunks.over_tokens(of_chunk, logits, x0, x_t, axis=1)


def _terms_forward(logits, x0, x_t, t, schedule):
    return terms(logits, x0, x_t, t, schedule), (logits, x0, x_t, t, schedule)


def _terms_backward(residuals, gradients):
    logits, x0, x_t, t, schedule = residuals

    def of_chunk(logits, x0, x_t, *gradients):
        _, pull_back = jax.vjp(lambda x: _batch_terms(x, x0, x_t, t, schedule), logits)
        return pull_back(gradients)[0]

    gradient = chunks.over_tokens(of_chunk, logits, x0, x_t, *gradients, axis=1)
    return gradient, None, None, None, None


terms.defvjp(_terms_forward, _terms_backward)


def noise(
    key: jax.Array, x0: jax.Array, t: jax.Array, schedule: Schedule, shared: bool = False
) -> jax.Array:
    """Draws x_t of a batch: int32 [B, N] from codes [B, N] and times [B].

    If it is ``shared``, every image has the same noise.
    """
    keys = jax.random.split(key, x0.shape[1:] if shared else x0.shape)
    keys = jnp.broadcast_to(keys, x0.shape)
    over_tokens = jax.vmap(transition.q_sample, in_axes=(0, 0, None, None))
    return jax.vmap(over_tokens, in_axes=(0, 0, 0, None))(keys, x0, t, schedule)


def variational_bound(
    key: jax.Array,
    predict_log_x0: PredictX0,
    x0: jax.Array,
    schedule: Schedule,
    statistics: TimeStatistics,
    *,
    auxiliary_weight: float,
    mask_weight: tuple[float, float] = (1.0, 1.0),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One-sample estimate of the training loss, in nats a token.

    Args:
      key: PRNG key; decides the times and the noise.
      predict_log_x0: (tokens int32 [B, N], times int32 [B]) -> float32 [B, N, K], log p0 or any
        logits of it.
      x0: int32 [B, N], clean codes.
      schedule: the noise schedule.
      statistics: decide how the times are drawn; returned updated.
      auxiliary_weight: lambda of the x_0 term; it is multiplied by 2 - (t-1)/T.
      mask_weight: weight of masked and of visible tokens.

    Returns:
      loss, float32 []; and a dict with ``statistics`` (updated), ``bound`` and ``auxiliary``
      (the two terms without lambda, nats a token), ``accuracy`` of the most likely codes.
    """
    chex.assert_rank(x0, 2)
    batch, num_tokens = x0.shape
    key_time, key_noise = jax.random.split(key)
    p = time_probabilities(statistics)
    t = sample_times(key_time, p, batch)
    x_t = noise(key_noise, x0, t, schedule)
    logits = predict_log_x0(x_t, t).astype(jnp.float32)
    chex.assert_shape(logits, (batch, num_tokens, schedule.num_codes))

    weight = jnp.where(x_t == schedule.num_codes, mask_weight[0], mask_weight[1])
    # At t = 1 the term is the likelihood of the data itself, which the published loss never weighs.
    weight = jnp.where((t == 1)[:, None], 1.0, weight)
    bound, cross_entropy = terms(logits, x0, x_t, t, schedule)
    main = (weight * bound).sum(axis=1)
    auxiliary = (weight * cross_entropy).sum(axis=1)

    right = jnp.take_along_axis(logits, x0[..., None], axis=-1)[..., 0]
    factor = 2.0 - (t - 1) / schedule.num_steps
    scale = 1.0 / (p[t - 1] * batch * num_tokens)
    loss = jnp.sum(scale * (main + auxiliary_weight * factor * auxiliary))
    return loss, {
        "statistics": update_time_statistics(statistics, t, jax.lax.stop_gradient(main)),
        "bound": jnp.sum(scale * main),
        "auxiliary": auxiliary.sum() / (batch * num_tokens),
        "accuracy": jnp.mean(right >= logits.max(axis=-1)),
    }


def coupled_noise(
    key: jax.Array, x0: jax.Array, first: jax.Array, t: jax.Array, schedule: Schedule
) -> jax.Array:
    """x_t between two ends: int32 [B, N] of codes ``x0`` and of the tokens ``first`` of time T.

    A token is the clean one with the keep probability of time t [B], else that of time T.
    """
    keep = jnp.asarray(schedule.keep)[t][:, None]
    return jnp.where(jax.random.bernoulli(key, keep, x0.shape), x0, first)


def rectified(
    key: jax.Array,
    predict_log_x0: PredictX0,
    x0: jax.Array,
    first: jax.Array,
    schedule: Schedule,
    times: np.ndarray,
) -> tuple[jax.Array, jax.Array]:
    """The loss of a student of few steps, nats a token (ReDi, arXiv:2507.15897, section 3).

    It is the cross-entropy of the clean codes, given tokens between them and the tokens that the
    same chain began with, at the times at which the student calls the network.

    Args:
      key: PRNG key; decides the times and which tokens are clean.
      predict_log_x0: of ``variational_bound``.
      x0: int32 [B, N], codes that a teacher made.
      first: int32 [B, N], the tokens at time T that it made them of.
      schedule: the noise schedule.
      times: int32 [S], different times in 1..T, such as ``sampler.step_times(S, schedule)[:-1]``.

    Returns:
      loss, float32 [], and the accuracy of the most likely codes.
    """
    key_time, key_noise = jax.random.split(key)
    p = jnp.zeros(schedule.num_steps).at[times - 1].set(1 / len(times))
    t = sample_times(key_time, p, x0.shape[0])
    x_t = coupled_noise(key_noise, x0, first, t, schedule)
    logits = predict_log_x0(x_t, t).astype(jnp.float32)
    # Of the two terms this is the one that does not depend on the noise.
    cross_entropy = terms(logits, x0, x_t, t, schedule)[1]
    right = jnp.take_along_axis(logits, x0[..., None], axis=-1)[..., 0]
    return cross_entropy.mean(), jnp.mean(right >= logits.max(axis=-1))


def matched(
    key: jax.Array,
    student: PredictX0,
    auxiliary: PredictX0,
    teacher: PredictX0,
    x0: jax.Array,
    first: jax.Array,
    schedule: Schedule,
    times: np.ndarray,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The losses of matching moments, nats a token (D-MMD, arXiv:2603.20155, equation 11).

    A student is right if its pictures x with noise on them, x_s, say of each code what the
    teacher's do: the law of a code given x_s is the same for both. For the student an auxiliary
    network learns it. With p of the student at x_t, x drawn from p, x_s of x, q of the teacher and
    r of the auxiliary network, both at x_s:

      student:    E_p[log r - log q] = CE(p, q) - CE(p, r), in which p alone has a gradient;
      auxiliary:  CE(x, r) + CE(q, r), in which r alone has one.

    The second term of the auxiliary network keeps it half way between the two, where
    log r - log q is at least -log 2. The cross-entropy of pairs at the same x_t costs nothing more.

    Args:
      key: PRNG key; decides the times, the noise and x.
      student, auxiliary, teacher: each as ``predict_log_x0`` of ``variational_bound``.
      x0, first, schedule: of ``rectified``.
      times: likewise, and decreasing. The time of x_s lies between a call and the next one.

    Returns:
      The losses of the student and of the auxiliary network, and that of ``rectified``; float32 []
      each.
    """
    key_call, key_clean, key_draw, key_between, key_noise = jax.random.split(key, 5)
    times = jnp.asarray(times, jnp.int32)
    call = jax.random.randint(key_call, x0.shape[:1], 0, len(times))
    t, after = times[call], jnp.append(times[1:], 1)[call]
    x_t = coupled_noise(key_clean, x0, first, t, schedule)
    log_p = jax.nn.log_softmax(student(x_t, t).astype(jnp.float32))
    drawn = jax.random.categorical(key_draw, log_p).astype(jnp.int32)
    s = jax.random.randint(key_between, t.shape, after, t + 1)
    x_s = noise(key_noise, drawn, s, schedule)
    log_r = jax.nn.log_softmax(auxiliary(x_s, s).astype(jnp.float32))
    log_q = jax.lax.stop_gradient(jax.nn.log_softmax(teacher(x_s, s).astype(jnp.float32)))
    of_student = (jnp.exp(log_p) * jax.lax.stop_gradient(log_r - log_q)).sum(-1)
    of_drawn = jnp.take_along_axis(log_r, drawn[..., None], axis=-1)[..., 0]
    of_auxiliary = -of_drawn - (jnp.exp(log_q) * log_r).sum(-1)
    of_pairs = -jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
    return of_student.mean(), of_auxiliary.mean(), of_pairs.mean()


def likelihood(
    key: jax.Array,
    predict_log_x0: PredictX0,
    x0: jax.Array,
    schedule: Schedule,
    num_draws: int,
    shared_noise: bool = False,
) -> jax.Array:
    """Bound on -log2 p(x0) in bits a token, without its prior term: float32 [B].

    The bound is a sum over t. Its largest term by far, in a network that has not yet learnt to copy
    visible tokens, is that at t = 1, which is always computed. The others are estimated from
    ``num_draws - 1`` times (at least one), stratified over 2..T and the same for every image of the
    call. With num_draws = T every time is visited once. Two calls with the same key meet the same
    noise, so their difference is a paired one. With ``shared_noise`` all images of a call meet the
    same noise, and the value of an image does not depend on the others.

    The prior term KL(q(x_T|x_0) || p(x_T)) depends on the schedule alone. For chains that begin
    from p(x_T) (``transition.draw_prior``) it is 1e-4 bits a token with the released schedule and
    2e-6 with the paper's, at T=100 and K=2887. A chain that begins all masked has no bound if the
    schedule leaves codes visible at T: the term is infinite.
    """
    num_steps = schedule.num_steps
    key_time, key_noise = jax.random.split(key)
    others = min(max(num_draws - 1, 1), num_steps - 1)
    index = (jnp.arange(others) + jax.random.uniform(key_time)) * (num_steps - 1) / max(others, 1)
    # Rounding may carry the last point to the end of its stratum.
    index = jnp.minimum(jnp.floor(index), num_steps - 2).astype(jnp.int32)
    times = jnp.concatenate([jnp.ones(1, jnp.int32), index + 2])
    weights = jnp.ones(others + 1).at[1:].set((num_steps - 1) / max(others, 1))

    def one_draw(total, draw):
        t, weight, draw_key = draw
        t = jnp.full(x0.shape[0], t)
        x_t = noise(draw_key, x0, t, schedule, shared_noise)
        logits = predict_log_x0(x_t, t).astype(jnp.float32)
        return total + weight * terms(logits, x0, x_t, t, schedule)[0].mean(axis=1), None

    keys = jax.random.split(key_noise, others + 1)
    total, _ = jax.lax.scan(one_draw, jnp.zeros(x0.shape[0]), (times, weights, keys))
    return total / jnp.log(2.0)
