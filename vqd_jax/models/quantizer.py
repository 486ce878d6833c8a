"""Vector quantisation: latents -> codes, codebooks learnt as a moving average, and code remaps.

A moving average replaces the gradient of the codebook: every code follows the mean of the encoder
outputs that chose it (van den Oord et al., "Neural Discrete Representation Learning", 2017,
appendix A.1). Codes that no output chooses are re-seeded from encoder outputs of the batch, so that
all K stay in use.

A Gumbel quantiser learns by gradients alone: a softened draw of the codes takes the place of the
nearest one (Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017).

No array of all latents and all codes, [M, K], is larger than 64 MiB for a nearest quantiser: beyond
that, the codes are taken in blocks. A Gumbel quantiser has several such arrays, which its gradient
needs: 4 M K bytes each, 64 MiB for 2 pictures of 32 x 32 tokens and 8192 codes.

A remap leaves out codes of a large codebook that a data set never uses: the denoiser then predicts
K of the F codes. Published models have one.

Letters: M latent vectors of a batch, K codes, E codebook dimension, F entries of the codebook, if a
remap keeps K of them.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Of an array of latents and codes, bytes.
_LARGEST_ARRAY = 64 * 2**20


@flax.struct.dataclass
class CodebookState:
    """A codebook and the running sums whose quotient it is.

    Attributes:
      codebook: float32 [K, E], the code vectors.
      cluster_size: float32 [K], moving average of the number of latents that choose each code.
      cluster_sum: float32 [K, E], moving average of the sum of those latents.
    """

    codebook: jax.Array
    cluster_size: jax.Array
    cluster_sum: jax.Array


def init_codebook(key: jax.Array, num_codes: int, codebook_dim: int) -> CodebookState:
    """A standard normal codebook that has never been used.

    All usage counts are zero, so the first ``update_codebook`` with revival replaces the whole
    codebook: a code that many latents chose becomes their mean, and every other code a latent.

    Args:
      key: PRNG key.
      num_codes: K.
      codebook_dim: E.

    Returns:
      ``CodebookState``.
    """
    codebook = jax.random.normal(key, (num_codes, codebook_dim), jnp.float32)
    return CodebookState(codebook, jnp.zeros(num_codes), jnp.zeros((num_codes, codebook_dim)))


def squared_distances(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Squared Euclidean distance from every latent to every code.

    Args:
      z: [M, E] latents.
      codebook: [K, E].

    Returns:
      float32 [M, K]: |z|^2 - 2 z.e + |e|^2, in full float32 on every device.
    """
    z = z.astype(jnp.float32)
    codebook = codebook.astype(jnp.float32)
    products = jnp.matmul(z, codebook.T, precision=jax.lax.Precision.HIGHEST)
    z_norms = jnp.sum(z**2, axis=1)[:, None]
    return z_norms - 2.0 * products + jnp.sum(codebook**2, axis=1)[None, :]


def _block_size(num_latents: int, num_codes: int) -> int:
    """How many codes are taken at once; all of them where that is within the limit."""
    # Products with fewer columns are slow. With several devices, each has a part of the latents.
    return min(num_codes, max(128, _LARGEST_ARRAY // (4 * num_latents)))


def _blocks(codebook: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Codes [K, E] in blocks [K / size, size, E], and the first index of each; zeros fill up."""
    num_codes, codebook_dim = codebook.shape
    count = -(-num_codes // size)
    padded = jnp.pad(codebook, ((0, count * size - num_codes), (0, 0)))
    return padded.reshape(count, size, codebook_dim), jnp.arange(count, dtype=jnp.int32) * size


def nearest_codes(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """The index of the closest code; the smaller index where two are equally close.

    Args:
      z: [..., E] latents.
      codebook: [K, E].

    Returns:
      int32 [...].
    """
    chex.assert_rank(codebook, 2)
    chex.assert_equal_shape_suffix([z, codebook], 1)
    flat, num_codes = z.reshape(-1, z.shape[-1]), codebook.shape[0]
    size = _block_size(flat.shape[0], num_codes)
    if size == num_codes:
        codes = jnp.argmin(squared_distances(flat, codebook), axis=1).astype(jnp.int32)
        return codes.reshape(z.shape[:-1])

    def closer(best, block):
        vectors, start = block
        distances = squared_distances(flat, vectors)
        indices = start + jnp.arange(size, dtype=jnp.int32)
        distances = jnp.where((indices < num_codes)[None], distances, jnp.inf)
        place = jnp.argmin(distances, axis=1)
        distance = jnp.take_along_axis(distances, place[:, None], axis=1)[:, 0]
        # Where two are equally close, the earlier one stays.
        is_closer = distance < best[0]
        codes = jnp.where(is_closer, start + place.astype(jnp.int32), best[1])
        return (jnp.where(is_closer, distance, best[0]), codes), None

    none = jnp.full_like(flat[:, 0], jnp.inf, jnp.float32), jnp.zeros_like(flat[:, 0], jnp.int32)
    (_, codes), _ = jax.lax.scan(closer, none, _blocks(codebook, size))
    return codes.reshape(z.shape[:-1])


def draw_codes(logits: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Codes of a Gumbel quantiser.

    The published code always draws, also outside of training, so published models saw drawn codes.

    Args:
      logits: float [..., K].
      key: PRNG key; a code is then drawn from softmax(logits). None takes the most likely code.

    Returns:
      int32 [...].
    """
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # With the default noise, a code whose logit is 16 below the best one never wins.
    return jax.random.categorical(key, logits, mode="high").astype(jnp.int32)


def gumbel_quantize(
    logits: jax.Array,
    codebook: jax.Array,
    key: jax.Array,
    *,
    temperature: jax.Array | float,
    straight_through: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A softened draw of the codes, for training a Gumbel quantiser.

    With Gumbel noise g and temperature t, y = softmax((logits + g) / t) and z = y codebook. The
    code is that of the largest y, which is a draw from softmax(logits) at any temperature.

    Args:
      logits: float [..., K], from the projection of the latents.
      codebook: [K, E]; gradients flow into it.
      key: PRNG key of the noise.
      temperature: t > 0; see ``gumbel_temperature``.
      straight_through: z is the code vector itself; the gradient stays that of the softened draw.

    Returns:
      z, the dtype of the codebook, [..., E]; KL(softmax(logits) | uniform), float32 scalar, nats,
      the mean over all latents (its published weight in the loss is 5e-4); codes, int32 [...].
    """
    chex.assert_equal(logits.shape[-1], codebook.shape[0])
    logits = logits.astype(jnp.float32)
    noise = jax.random.gumbel(key, logits.shape, mode="high")
    soft = jax.nn.softmax((logits + noise) / temperature, axis=-1)
    codes = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
    weights = soft
    if straight_through:
        hard = jax.nn.one_hot(codes, logits.shape[-1], dtype=jnp.float32)
        weights = soft + jax.lax.stop_gradient(hard - soft)
    log_share = jax.nn.log_softmax(logits, axis=-1)
    kl = jnp.mean(jnp.sum(jnp.exp(log_share) * log_share, axis=-1)) + jnp.log(logits.shape[-1])
    return weights.astype(codebook.dtype) @ codebook, kl, codes


def gumbel_temperature(
    step: jax.Array, num_steps: int, start: float = 1.0, end: float = 1 / 16
) -> jax.Array:
    """The temperature of a step: from ``start`` to ``end`` in half a cosine; float32 scalar.

    Args:
      step: int32 scalar, the steps taken.
      num_steps: of the descent; from then on it is ``end``.
      start: at step 0.
      end: the published models were trained down to 1/16.
    """
    share = jnp.clip(step / num_steps, 0.0, 1.0)
    return (end + 0.5 * (start - end) * (1.0 + jnp.cos(jnp.pi * share))).astype(jnp.float32)


def lookup(codes: jax.Array, codebook: jax.Array) -> jax.Array:
    """The code vectors of ``codes``.

    Args:
      codes: integers [...], 0 <= code < K. Other values are clamped into the range.
      codebook: [K, E].

    Returns:
      [..., E], the dtype of the codebook.
    """
    return jnp.take(codebook, codes, axis=0, mode="clip")


def update_codebook(
    state: CodebookState,
    z: jax.Array,
    codes: jax.Array,
    *,
    key: jax.Array,
    decay: float = 0.99,
    epsilon: float = 1e-5,
    revival_threshold: float = 0.0,
) -> CodebookState:
    """One step of the moving-average codebook, with revival of unused codes.

    With n_k latents of sum s_k assigned to code k:

        size_k <- decay size_k + (1 - decay) n_k          sum_k <- decay sum_k + (1 - decay) s_k
        codebook_k = sum_k / ((size_k + epsilon) / (S + K epsilon) S),    S = sum of all size_k

    (Laplace smoothing: a code without latents does not divide by zero.) A code whose size is
    below ``revival_threshold`` of an even share M / K then becomes one of the batch's latents.
    Latents are drawn without replacement, with probability proportional to their squared distance
    from their code, so new codes go where the codebook is poor. Each starts with an even share; if
    no latent chooses it, it is replaced again after log(revival_threshold) / log(decay) steps.

    Args:
      state: ``CodebookState``.
      z: [..., E] latents of the batch; no gradient flows into the codebook.
      codes: int32 [...], the code each latent chose.
      key: PRNG key for the choice of latents at revival.
      decay: of the moving averages, 0 <= decay < 1.
      epsilon: of the smoothing, as a number of latents.
      revival_threshold: share of an even usage below which a code is dead; 0 revives nothing.

    Returns:
      The new ``CodebookState``.
    """
    num_codes, codebook_dim = state.codebook.shape
    chex.assert_shape(z, (*codes.shape, codebook_dim))
    z = jax.lax.stop_gradient(z.astype(jnp.float32)).reshape(-1, codebook_dim)
    codes = codes.reshape(-1)

    counts, batch_sum = _sums(z, codes, num_codes)
    size = decay * state.cluster_size + (1.0 - decay) * counts
    total = decay * state.cluster_sum + (1.0 - decay) * batch_sum
    mass = jnp.sum(size)
    smoothed = (size + epsilon) / (mass + num_codes * epsilon) * mass
    updated = CodebookState(total / smoothed[:, None], size, total)
    if revival_threshold <= 0.0:
        return updated
    error = jnp.sum((z - lookup(codes, state.codebook)) ** 2, axis=1)
    return _revive(updated, z, error, key, revival_threshold)


def _sums(z: jax.Array, codes: jax.Array, num_codes: int) -> tuple[jax.Array, jax.Array]:
    """How many latents [M, E] chose each code, float32 [K], and their sums, float32 [K, E].

    A product with one-hot rows adds in a fixed order; a scatter-add on a GPU does not.
    """

    def of_block(start):
        chosen = jax.nn.one_hot(codes - start, size, dtype=jnp.float32)
        sums = jnp.matmul(chosen.T, z, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(chosen, axis=0), sums

    size = _block_size(codes.size, num_codes)
    if size == num_codes:
        return of_block(0)
    starts = jnp.arange(-(-num_codes // size), dtype=jnp.int32) * size
    counts, sums = jax.lax.map(of_block, starts)
    return counts.reshape(-1)[:num_codes], sums.reshape(-1, z.shape[1])[:num_codes]


def _revive(
    state: CodebookState, z: jax.Array, error: jax.Array, key: jax.Array, threshold: float
) -> CodebookState:
    """Re-seeds dead codes from latents z [M, E], drawn in proportion to ``error`` [M]."""
    even_share = z.shape[0] / state.codebook.shape[0]
    dead = state.cluster_size < threshold * even_share
    # Gumbel top-k: every prefix of the order by log(error) + Gumbel noise is a draw without
    # replacement.
    noise = jax.random.gumbel(key, error.shape)
    order = jnp.argsort(-(jnp.log(error + 1e-12) + noise))
    rank = jnp.cumsum(dead) - 1
    seeds = z[order[rank % z.shape[0]]]
    return CodebookState(
        codebook=jnp.where(dead[:, None], seeds, state.codebook),
        cluster_size=jnp.where(dead, even_share, state.cluster_size),
        cluster_sum=jnp.where(dead[:, None], seeds * even_share, state.cluster_sum),
    )


def code_usage(codes: jax.Array, num_codes: int) -> tuple[jax.Array, jax.Array]:
    """How evenly a set of codes uses the codebook.

    Args:
      codes: int32 [...].
      num_codes: K.

    Returns:
      Two float32 scalars. The perplexity is exp of the entropy of the code frequencies: 1 for a
      single code, K where all are equally frequent. The second is how many of the K codes occur.
    """
    counts = jnp.bincount(codes.reshape(-1), length=num_codes)
    share = counts / codes.size
    entropy = -jnp.sum(jnp.where(counts > 0, share * jnp.log(jnp.maximum(share, 1e-12)), 0.0))
    return jnp.exp(entropy), jnp.sum(counts > 0).astype(jnp.float32)


def build_remap(usage_counts: np.ndarray) -> np.ndarray:
    """The remap of a codebook that a data set uses in part, by the published rule.

    Used codes become 1, 2, ... in their order, all others 0. If all are used, every code keeps its
    id.

    Args:
      usage_counts: [F], how often each code occurs.

    Returns:
      int32 [F]: code of the codebook -> code id.
    """
    used = np.asarray(usage_counts) > 0
    if used.all():
        return np.arange(used.size, dtype=np.int32)
    return np.where(used, np.cumsum(used), 0).astype(np.int32)


def num_remapped(full_to_code: np.ndarray) -> int:
    """K, the number of code ids of a remap [F].

    Raises:
      ValueError: it is no vector of integers, or an id between 0 and the largest is missing; the
        message tells which.
    """
    full_to_code = np.asarray(full_to_code)
    if full_to_code.ndim != 1 or not np.issubdtype(full_to_code.dtype, np.integer):
        raise ValueError(f"it is {full_to_code.dtype} {full_to_code.shape}, not a vector of ids")
    present = np.unique(full_to_code)
    missing = np.flatnonzero(present != np.arange(present.size))
    if missing.size:
        raise ValueError(f"no full code has the id {missing[0]}, but one has {present[missing[0]]}")
    return int(present.size)


def code_to_full(full_to_code: jax.Array, num_codes: int) -> jax.Array:
    """The way back through a remap int32 [F]: for every code id, the first code that has it.

    Returns:
      int32 [K].
    """
    size = full_to_code.shape[0]
    return (
        jnp.full(num_codes, size, jnp.int32).at[full_to_code].min(jnp.arange(size, dtype=jnp.int32))
    )


def first_codes(size: int, num_codes: int) -> jax.Array:
    """The remap int32 [F] that keeps the first K codes, for weights that are yet to be loaded."""
    ids = jnp.arange(size, dtype=jnp.int32)
    return jnp.where(ids < num_codes, ids, 0)


class Buffer(nnx.Variable):
    """An array that belongs to a model and that nothing trains."""


class Codebook(nnx.Module):
    """The code vectors, ``embedding`` [F, E]; a Gumbel quantiser has a projection to F logits."""

    def __init__(self, size: int, width: int, *, gumbel: bool, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (size, width)))
        self.proj = nnx.Conv(width, size, (1, 1), rngs=rngs) if gumbel else None

    def codes(self, z: jax.Array, key: jax.Array | None) -> jax.Array:
        """Latents [B, h, w, E] -> int32 [B, h, w] in 0..F-1; ``key`` as in ``draw_codes``."""
        if self.proj is None:
            return nearest_codes(z, self.embedding[...])
        return draw_codes(self.proj(z), key)


class Remap(nnx.Module):
    """Which codes are left of the codebook: ``full_to_code`` int32 [F] in 0..K-1."""

    def __init__(self, size: int, num_codes: int):
        self.num_codes = num_codes
        self.full_to_code = Buffer(first_codes(size, num_codes))

    def to_codes(self, full: jax.Array) -> jax.Array:
        """Codes int32 [...] in 0..F-1 -> 0..K-1."""
        return self.full_to_code[...][full]

    def to_full(self, codes: jax.Array) -> jax.Array:
        """Codes int32 [...] in 0..K-1 -> 0..F-1."""
        inverse = code_to_full(self.full_to_code[...], self.num_codes)
        return jnp.take(inverse, codes, mode="clip")
