"""An autoregressive model of the same size beside ours: quality, and seconds a picture.

python benchmarks/autoregressive.py --workdir=DIR
python benchmarks/autoregressive.py --workdir=DIR --time --size=shapes

Both models have the same width, depth, heads, text encoder, codes, batches and steps of training,
and learn in the same loop. The autoregressive one is causal, in raster order, and has no time, so
the parameters of the time's norms are in its MLPs: the sizes agree within 5 %. It samples with a
key-value cache, one scan over the tokens, under the same guidance and truncation. A training or a
measurement that is finished is a file in DIR and is not done again. KID needs the extra ``eval``.

With ``--time`` both have random weights, and take turns in one process; nothing is trained.
``autoregressive_chips.py`` times them on paper, for a chip that is not there.

Letters: B batch, R rows of the network (2B with guidance), N image tokens, L text positions,
D width, H heads, K codes.
"""

import dataclasses
import functools
import importlib
import math
import time
from typing import Any, NamedTuple

import attribute_accuracy
import jax
import jax.numpy as jnp
import mask_and_replace
import numpy as np
import optax
import study
from flax import nnx, struct

from vqd_jax import config as config_lib
from vqd_jax import generation
from vqd_jax.data import batches
from vqd_jax.data import codes as codes_lib
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.diffusion import draws, sampler, shaping
from vqd_jax.evaluation import likelihood
from vqd_jax.interop import pretrained
from vqd_jax.models import attention, conditioned, functional, linear
from vqd_jax.models.denoiser import DenoiserConfig, normal
from vqd_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from vqd_jax.parallel import rows, sharding
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import loop, optimizer
from vqd_jax.training.task import Task

# Ours is asked with these numbers of network calls.
STEPS = (10, 25, 100)


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """Sizes of an autoregressive model.

    Attributes:
      text_encoder: of the text encoder, which is ours.
      denoiser: of our denoiser; width, layers, heads, codes and grid are taken from it.
      hidden: width of the MLPs.
    """

    text_encoder: TextEncoderConfig
    denoiser: DenoiserConfig
    hidden: int


def size_of(abstract: Any) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))


def beside(sizes: conditioned.ConditionedDenoiserConfig) -> CausalConfig:
    """The autoregressive model that has as many parameters as ours, text encoders apart."""
    d = sizes.denoiser
    small = CausalConfig(sizes.text_encoder, d, 8)
    ours = size_of(conditioned.abstract_params(sizes)["denoiser"])
    without = size_of(functional.abstract(Causal, small)) - size_of(
        functional.abstract(TextEncoder, sizes.text_encoder)
    )
    # A hidden unit has D weights and a bias on its way in and D weights on its way out.
    more = round((ours - without) / (d.num_layers * (2 * d.width + 1)))
    return dataclasses.replace(small, hidden=8 * round((8 + more) / 8))


class CausalBlock(nnx.Module):
    """Causal self-attention, attention to the text, and an MLP, each normalised before."""

    def __init__(self, config: CausalConfig, *, rngs: nnx.Rngs):
        d, dtype = config.denoiser, attention.float_dtype(config.denoiser.dtype)
        layer = linear.layer(dtype, d.product_dtype)
        make_linear = functools.partial(layer, kernel_init=normal(d))
        attend = functools.partial(
            attention.Attention, d.width, num_heads=d.num_heads, make_linear=make_linear, rngs=rngs
        )
        norm = functools.partial(nnx.LayerNorm, d.width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.norm_self, self.norm_cross, self.norm_mlp = norm(), norm(), norm()
        self.self_attention = attend(d.width)
        self.cross_attention = attend(d.text_width)
        self.mlp_in = make_linear(d.width, config.hidden, rngs=rngs)
        self.mlp_out = make_linear(config.hidden, d.width, rngs=rngs)

    def __call__(self, h: jax.Array, context) -> jax.Array:
        """All positions at once: [R, N, D] and keys and values [R, L, H, D/H] -> [R, N, D]."""
        h = h + self.self_attention(self.norm_self(h), causal=True)
        h = h + self.cross_attention(self.norm_cross(h), context)
        return h + self._mlp(h)

    def step(self, h: jax.Array, cache, context, at: jax.Array):
        """One position: [R, D] and caches [R, H, N, D/H] -> [R, D] and the caches with it."""
        x, attend = self.norm_self(h), self.self_attention
        new = [y.swapaxes(1, 2) for y in attend.keys_values(x[:, None])]
        cache = [
            jax.lax.dynamic_update_slice_in_dim(old, y, at, 2)
            for old, y in zip(cache, new, strict=True)
        ]
        h = h + _attend_once(attend, x, cache, jnp.arange(cache[0].shape[2]) <= at)
        h = h + _attend_once(self.cross_attention, self.norm_cross(h), context, None)
        return h + self._mlp(h), cache

    def _mlp(self, h):
        return self.mlp_out(attention.quick_gelu(self.mlp_in(self.norm_mlp(h))))


def _attend_once(module, x, keys_values, seen):
    """``module`` for one query a row: [R, D] and [R, H, M, D/H] -> [R, D]; ``seen`` bool [M]."""
    keys, values = keys_values
    q = attention.split_heads(module.query(x), module.num_heads)
    scores = jnp.einsum("rhd,rhmd->rhm", q, keys, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if seen is not None:
        scores = jnp.where(seen[None, None], scores, -1e30)
    mixed = jnp.einsum("rhm,rhmd->rhd", jax.nn.softmax(scores).astype(values.dtype), values)
    return module.proj(attention.merge_heads(mixed))


class Given(NamedTuple):
    """What sampling computes once.

    Attributes:
      layers: the blocks.
      context: keys and values of the text for each of them, [R, H, L, D/H].
      positions: [N, D].
    """

    layers: list
    context: list
    positions: jax.Array


class Causal(nnx.Module):
    """Codes before a token, and the text -> logits of its code.

    Args:
      config: sizes.
      rngs: with a ``params`` stream.
    """

    def __init__(self, config: CausalConfig, *, rngs: nnx.Rngs):
        self.config, d = config, config.denoiser
        dtype = attention.float_dtype(d.dtype)
        self.text_encoder = TextEncoder(config.text_encoder, rngs=rngs)
        embed = functools.partial(
            nnx.Embed, features=d.width, embedding_init=normal(d), dtype=dtype, rngs=rngs
        )
        # The id K stands before the first code.
        self.code_embedding = embed(d.num_codes + 1)
        self.row_embedding, self.column_embedding = embed(d.grid[0]), embed(d.grid[1])
        self.blocks = attention.stack_layers(
            lambda rngs: CausalBlock(config, rngs=rngs), d.num_layers, rngs
        )
        self.norm_out = nnx.LayerNorm(d.width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        layer = linear.layer(dtype, d.product_dtype)
        self.to_logits = layer(d.width, d.num_codes, kernel_init=normal(d), rngs=rngs)

    def positions(self) -> jax.Array:
        """[N, D]: row plus column embedding of the token that is predicted."""
        down, right = (e.embedding[...] for e in (self.row_embedding, self.column_embedding))
        table = down[:, None] + right[None]
        return table.reshape(-1, table.shape[-1]).astype(self.norm_out.dtype)

    def __call__(self, codes: jax.Array, text_ids: jax.Array) -> jax.Array:
        """Logits float32 [B, N, K] of all codes int32 [B, N], each from those before it."""
        before = jnp.pad(
            codes[:, :-1], ((0, 0), (1, 0)), constant_values=self.config.denoiser.num_codes
        )
        h = self.code_embedding(before) + self.positions()[None]
        h = attention.scan_layers(self.blocks, h, self._context(text_ids))
        return self.to_logits(self.norm_out(h)).astype(jnp.float32)

    def _context(self, text_ids):
        features = self.text_encoder(text_ids)
        return attention.map_layers(self.blocks, lambda b: b.cross_attention.keys_values(features))

    def given(self, text_ids: jax.Array) -> Given:
        """What ``step`` needs of texts int32 [R, L]. A scan over layers would copy the caches."""
        graphdef, params = nnx.split(self.blocks)
        count = range(self.config.denoiser.num_layers)
        context = jax.tree.map(lambda x: x.swapaxes(2, 3), self._context(text_ids))
        layers, contexts = (
            [jax.tree.map(lambda x, n=n: x[n], tree) for n in count] for tree in (params, context)
        )
        return Given([nnx.merge(graphdef, x) for x in layers], contexts, self.positions())

    def empty_cache(self, num_rows: int) -> list:
        """Keys and values of every layer, [R, H, N, D/H] each."""
        d = self.config.denoiser
        shape = (num_rows, d.num_heads, math.prod(d.grid), d.width // d.num_heads)
        return [[jnp.zeros(shape, attention.float_dtype(d.dtype))] * 2] * d.num_layers

    def step(self, given: Given, cache: list, before: jax.Array, at: jax.Array):
        """Logits float32 [R, K] of the token ``at`` [], and the cache with it.

        Args:
          given: of the texts.
          cache: of all tokens before.
          before: int32 [R], the code before it, or K.
        """
        h = self.code_embedding(before) + given.positions[at][None]
        kept = []
        for layer, held, context in zip(given.layers, cache, given.context, strict=True):
            h, held = layer.step(h, held, context, at)
            kept.append(held)
        return self.to_logits(self.norm_out(h)).astype(jnp.float32), kept


def sample(params, keys, text_ids, null_ids, scale, rate, *, config: CausalConfig) -> jax.Array:
    """Codes int32 [B, N], one after the other in one scan; jittable.

    Args:
      params: of ``Causal``.
      keys: PRNG keys [B].
      text_ids, null_ids: int32 [B, L] and [1, L], captions and the empty one.
      scale: of the guidance, float32 []; None is one row a picture and no guidance.
      rate: of the truncation, float32 []; None keeps every code.
      config: sizes.
    """
    model, d = functional.bind(Causal, config, params), config.denoiser
    if scale is not None:
        text_ids = sampler.pairs(text_ids, jnp.broadcast_to(null_ids, text_ids.shape))
    given, num_tokens = model.given(text_ids), math.prod(d.grid)
    words = jax.vmap(lambda k: jax.random.bits(k, (num_tokens, draws.num_words(d.num_codes))))(keys)

    def step(carry, at):
        before, cache = carry
        number, words = at
        rows_before = before if scale is None else jnp.repeat(before, 2)
        logits, cache = model.step(given, cache, rows_before, number)
        if scale is None:
            log_p = jax.nn.log_softmax(logits)
        else:
            log_p = shaping.guide(logits[::2], logits[1::2], scale)
        log_p = log_p if rate is None else shaping.truncate(log_p, rate)
        code = jax.vmap(draws.code)(words, log_p)
        return (code, cache), code

    first = jnp.full(len(keys), d.num_codes), model.empty_cache(len(text_ids))
    steps = jnp.arange(num_tokens), words.swapaxes(0, 1)
    return jax.lax.scan(step, first, steps)[1].T


def nats(model: Causal, codes: jax.Array, text_ids: jax.Array) -> jax.Array:
    """-log p of every code, float32 [B, N]."""
    logits = model(codes, text_ids)
    return optax.softmax_cross_entropy_with_integer_labels(logits, codes)


class State(struct.PyTreeNode):
    """What a step reads or changes; see ``stage_two.TrainState``."""

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: optax.OptState


class CausalTask(Task):
    """The training of the autoregressive model, by the recipe of a config.

    Args:
      config: the resolved config.
      dataset: batches of ``codes`` and ``text_ids``.
    """

    name, prefix = "autoregression", "train"

    def __init__(self, config, dataset):
        self.batches, self._config = dataset, config
        self._sizes = beside(config_lib.model_config(config))
        self._optimizer, _ = optimizer.make(config.training)

    def create_state(self):
        params = functional.init(Causal, self._sizes, jax.random.key(self._config.seed))
        # A copy: a donated state must not hold one buffer twice.
        copy = jax.tree.map(jnp.copy, params)
        return State(jnp.zeros((), jnp.int32), params, copy, self._optimizer.init(params))

    def train_step(self, state, batch, placement):
        def loss_fn(params):
            model = functional.bind(Causal, self._sizes, params)
            return nats(model, batch["codes"], batch["text_ids"]).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = self._optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = self._config.training.ema_decay
        averages = optimizer.averaged(state.ema_params, params, decay, state.step)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        return State(state.step + 1, params, averages, opt_state), metrics


def trained(config, workdir) -> Any:
    """The averaged parameters at the end of the training, or of what is left of it."""
    source = codes_lib.open_split(f"{config.data.codes}/train")
    c, mesh = config.training, sharding.make_mesh(config)
    dataset = batches.code_dataset([source], c.batch_size, config.seed, c.null_text_rate)
    place = loop.Place(str(workdir), str(workdir / "checkpoints"), mesh, config)
    return loop.fit(CausalTask(config, dataset), loop.Schedule.of(config), place).ema_params


def bits(params, config, split: str) -> float:
    """-log2 p a token, exactly, of the pictures that our bound is measured on."""
    source = codes_lib.open_split(f"{config.data.codes}/{split}")
    chosen = likelihood.chosen(source, config.evaluation.num_images, "text")
    sizes = beside(config_lib.model_config(config))

    @jax.jit
    def of_batch(codes, texts):
        return nats(functional.bind(Causal, sizes, params), codes, texts).mean(1) / jnp.log(2.0)

    found = [np.asarray(of_batch(*some))[:count] for some, count in rows.batches(chosen, 64)]
    return float(np.concatenate(found).mean())


def draw_and_judge(params, config, count: int) -> dict[str, float]:
    """``mask_and_replace.draw_and_judge`` of the autoregressive model."""
    prompts = attribute_accuracy.asked(count)[0]
    tokenizer, s = ClipTokenizer(config.text_encoder.context_length), config.sampling
    draw = jax.jit(functools.partial(sample, config=beside(config_lib.model_config(config))))
    # The same keys as ours has, and the same meaning of 1.
    pairs = np.stack([np.arange(count), np.zeros(count, int)], 1).astype(np.uint32)
    keys = generation.image_keys(np.zeros(count, np.uint32), pairs)
    scale = None if s.guidance_scale == 1 else jnp.float32(s.guidance_scale)
    rate = None if s.truncation >= 1 else jnp.float32(s.truncation)
    codes = draw(
        params, keys, tokenizer.encode_batch(prompts), tokenizer.encode_batch([""]), scale, rate
    )
    codec = pretrained.load_autoencoder(
        config, pretrained.autoencoder_folder(config.autoencoder.path)
    )
    pixels = VQDiffusion(config, None, codec).decode_codes(np.asarray(codes), batch_size=64)
    return mask_and_replace.judged(pixels)


def measure(config, flags) -> None:
    """Trains and measures what is left to do, ours and the other in turn."""
    # Where its weights are missing, the study ends before it has trained.
    mask_and_replace.net()
    for seed in range(flags.seeds):
        of_run = config.copy_and_resolve_references()
        of_run.seed = seed
        theirs, ours = (flags.workdir / f"{kind}_seed_{seed}" for kind in ("causal", "ours"))

        def learn(config=of_run, workdir=theirs):
            params = trained(config, workdir)
            return {f"{s} bits": bits(params, config, s) for s in ("train", "validation")}

        def draw(config=of_run, workdir=theirs):
            return draw_and_judge(trained(config, workdir), config, flags.pictures)

        study.once(theirs / "trained.json", learn)
        study.once(theirs / "drawn.json", draw)
        study.once(ours / "trained.json", functools.partial(mask_and_replace.train, of_run, ours))
        model = VQDiffusion.from_workdir(str(ours))
        for steps in STEPS:
            arguments = model, of_run.sampling.rule, steps, flags.pictures
            compute = functools.partial(mask_and_replace.draw_and_judge, *arguments)
            study.once(ours / f"drawn_{steps}.json", compute)


def report(flags) -> None:
    """Prints the table of what is there."""
    names = ("all", "colour", "shape", "size", "position", "count")
    lines = []
    for kind, file, calls in [("causal", "drawn", "N")] + [
        ("ours", f"drawn_{s}", s) for s in STEPS
    ]:
        folders = [flags.workdir / f"{kind}_seed_{seed}" for seed in range(flags.seeds)]
        folders = [f for f in folders if (f / f"{file}.json").exists()]
        drawn, learnt = (
            [study.files.read_json(f / f"{name}.json", "remove it") for f in folders]
            for name in (file, "trained")
        )
        cells = [study.over_seeds([d[name] for d in drawn], percent=True) for name in names]
        cells.append(study.over_seeds([d["kid"] for d in drawn if "kid" in d]))
        found = study.over_seeds([x["validation bits"] for x in learnt])
        lines.append([kind, calls, len(drawn), found, *cells])
    columns = ["model", "network calls", "seeds", "bits a token, validation (ours: at most)"]
    study.print_table("Right (%)", [*columns, *names, "KID"], lines)
    study.print_cost(flags.workdir, "trained", "drawn")


def programs(config, side: int, batch: int, calls: tuple[int, ...]) -> dict[str, tuple[Any, tuple]]:
    """Samplers of both models for a grid of ``side`` rows: name -> (jitted function, arguments).

    Of ours there is one for each number of ``calls``. The parameters are not made: they are a
    function without arguments that makes random ones.
    """
    sizes, s = config_lib.model_config(config), config.sampling
    # The published tables are larger than the grid; here each token has its own.
    grid = dataclasses.replace(sizes.denoiser, grid=(side, side), position_table=None)
    sizes = dataclasses.replace(sizes, denoiser=grid)
    causal = beside(sizes)
    keys = jax.random.split(jax.random.key(1), batch)
    tokenizer = ClipTokenizer(sizes.text_encoder.context_length)
    texts = [tokenizer.encode_batch(x) for x in (["a large blue star"] * batch, [""])]
    shaped = jnp.float32(s.guidance_scale), jnp.float32(min(s.truncation, 0.9))
    noise = config_lib.noise_schedule(config)
    theirs = functools.partial(functional.init, Causal, causal, jax.random.key(0))
    ours = functools.partial(conditioned.init_params, sizes, jax.random.key(0))
    autoregress = jax.jit(functools.partial(sample, config=causal))
    made = {"autoregressive": (autoregress, (theirs, keys, *texts, *shaped))}
    draw = jax.jit(functools.partial(generation.draw, model_config=sizes, schedule=noise))
    for steps in calls:
        settings = sampler.Settings(num_steps=steps, guidance=shaped[0], truncation=shaped[1])
        made[f"ours, {steps} calls"] = draw, (ours, keys, *texts, settings)
    return made


def seconds(config, side: int, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds a picture of each program with random weights, the programs in turn."""
    num_steps = config.diffusion.num_steps
    made = programs(config, side, batch, tuple(n for n in STEPS if n <= num_steps))
    params = {make: jax.jit(make)() for _, (make, *_) in made.values()}
    times = {name: [] for name in made}
    for number in range(rounds + 1):
        for name, (program, (make, *arguments)) in made.items():
            start = time.perf_counter()
            jax.block_until_ready(program(params[make], *arguments))
            # The first round compiles.
            times[name] += [time.perf_counter() - start] if number else []
    return {name: float(np.median(x)) / batch for name, x in times.items()}


def print_seconds(flags) -> None:
    """Prints the table of seconds a picture."""
    config, lines = importlib.import_module(f"configs.{flags.size}").get_config(), []
    for side in (math.isqrt(n) for n in flags.tokens):
        for batch in flags.batch:
            found = seconds(config, side, batch, flags.rounds)
            first = found["autoregressive"]
            cells = [f"{x:.3f} ({first / x:.2f} times)" for x in found.values()]
            lines.append([side**2, batch, *cells])
            print(lines[-1], flush=True)
    title = f"Seconds a picture at the size of configs/{flags.size}.py, with guidance"
    title += f" ({jax.devices()[0].device_kind})"
    study.print_table(title, ["N", "batch", *found], lines)


def main() -> None:
    parser = study.parser(__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true", help="seconds a picture, random weights")
    parser.add_argument("--size", default="shapes", help="a file of configs/")
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256], help="squares")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    if flags.time:
        print_seconds(flags)
        return
    if not flags.report:
        measure(study.begin(flags), flags)
    report(flags)


if __name__ == "__main__":
    main()
