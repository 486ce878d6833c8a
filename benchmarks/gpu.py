"""Training and sampling on one GPU, beside PyTorch with the published formulation.

python benchmarks/gpu.py --json=gpu.json
python benchmarks/gpu.py --sizes=tiny --steps=3          # a rehearsal on a CPU

Needs jax with CUDA and flax; PyTorch where it is to be compared (else --no-torch). Nothing of the
data chain is imported: no grain, no tensorflow-datasets, no ml_collections. Text features are
given, as those of a frozen text encoder are.

It prints, for every size: train-step time and model FLOPs utilisation (the FLOPs of the formulas,
forward and twice that backward, rematerialisation not counted, over a measured matrix-multiply
ceiling), images a second of the guided sampler, the share of both that is not the network, the same
of PyTorch (bfloat16, torch.compile, SDPA), and how far bfloat16 is from float32. Times are medians
of runs after one that is not counted.

Letters: B batch, N tokens, L text positions, D width, K codes, T steps.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vqd_jax.diffusion import objective, sampler, schedule
from vqd_jax.models.denoiser import Denoiser, DenoiserConfig
from vqd_jax.training import optimizer

TEXT_LENGTH = 77
GUIDANCE, TRUNCATION = 5.0, 0.86


@dataclasses.dataclass(frozen=True)
class Size:
    """A denoiser and the batches that it is measured with."""

    layers: int
    width: int
    heads: int
    ratio: int
    codes: int
    side: int
    conv: bool
    train_batch: int
    sample_batch: int
    text_width: int = 512
    steps: int = 100

    @property
    def tokens(self) -> int:
        return self.side**2


SIZES = {
    "tiny": Size(2, 32, 2, 2, 63, 4, True, 4, 2, text_width=16, steps=10),
    "S": Size(18, 192, 16, 2, 2887, 32, True, 32, 32),
    "B": Size(19, 1024, 16, 4, 2887, 32, False, 32, 32),
    "Large": Size(36, 1408, 16, 4, 4096, 32, False, 16, 16),
}


def config_of(size: Size, dtype: str) -> DenoiserConfig:
    return DenoiserConfig(
        num_codes=size.codes, grid=(size.side, size.side), num_steps=size.steps, width=size.width,
        num_layers=size.layers, num_heads=size.heads, text_width=size.text_width,
        mlp="conv" if size.conv else "fc", mlp_ratio=size.ratio, dtype=dtype,
        # As docs/performance.md advises for a GPU.
        scan_unroll=size.layers,
    )  # fmt: skip


def forward_flops(size: Size) -> int:
    """FLOPs of one image through the network, two a multiply and add; matrix products only."""
    n, d, text = size.tokens, size.width, size.text_width
    self_attention = 4 * n * d * d + 2 * n * n * d
    cross_attention = 2 * n * d * d + 2 * TEXT_LENGTH * text * d + 2 * n * TEXT_LENGTH * d
    mlp = (9 if size.conv else 1) * 2 * n * d * d * size.ratio
    modulations = 2 * d * 2 * d
    return 2 * (
        size.layers * (self_attention + cross_attention + mlp + modulations) + n * d * size.codes
    )


def seconds(call, runs: int) -> float:
    """Median time of a call that blocks."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_ceiling(runs: int, side: int) -> float:
    """FLOP/s of bfloat16 products of square matrices, ten in a row."""
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)

    @jax.jit
    def chain(x):
        return jax.lax.fori_loop(0, 10, lambda _, x: (x @ a) * (1 / side), x)

    return 20 * side**3 / seconds(lambda: jax.block_until_ready(chain(a)), runs)


class Ours:
    """Train step and sampler on one device."""

    def __init__(self, size: Size, dtype: str):
        self.size, self.config = size, config_of(size, dtype)
        self.schedule = schedule.released(size.steps, size.codes)
        self.graphdef = nnx.graphdef(
            nnx.eval_shape(lambda: Denoiser(self.config, rngs=nnx.Rngs(0)))
        )
        rate = optimizer.learning_rate(2e-4, 10, 1000, 0.1)
        adamw = optax.adamw(rate, b1=0.9, b2=0.96, weight_decay=0.045)
        self.transform = optimizer.clipped(adamw, 0.5)
        rng = np.random.default_rng(0)
        batch = max(size.train_batch, size.sample_batch)
        self.codes = jnp.asarray(rng.integers(0, size.codes, (batch, size.tokens)), jnp.int32)
        self.text = jnp.asarray(
            rng.standard_normal((batch, TEXT_LENGTH, size.text_width)), jnp.float32
        )

    def init_params(self):
        make = lambda: nnx.to_pure_dict(  # noqa: E731
            nnx.state(Denoiser(self.config, rngs=nnx.Rngs(0)), nnx.Param)
        )
        return jax.jit(make)()

    def loss(self, params, key, codes, text):
        model = nnx.merge(self.graphdef, params)
        return objective.variational_bound(
            key, lambda tokens, t: model(tokens, t, text), codes, self.schedule,
            objective.init_time_statistics(self.size.steps), auxiliary_weight=5e-4,
        )[0]  # fmt: skip

    def train_seconds(self, runs: int) -> float:
        """One step: loss, gradients, AdamW, average."""
        codes, text = (x[: self.size.train_batch] for x in (self.codes, self.text))
        params = self.init_params()
        state = params, jax.tree.map(jnp.copy, params), self.transform.init(params)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, key):
            params, average, moments = state
            gradients = jax.grad(self.loss)(params, key, codes, text)
            updates, moments = self.transform.update(gradients, moments, params)
            params = optax.apply_updates(params, updates)
            average = jax.tree.map(lambda e, p: e + 0.01 * (p - e), average, params)
            return params, average, moments

        def call():
            nonlocal state
            state = jax.block_until_ready(step(state, jax.random.key(1)))

        return seconds(call, runs)

    def objective_seconds(self, runs: int) -> float:
        """What a train step does beside the network: noise, bound, gradient of the logits."""
        shape = (self.size.train_batch, self.size.tokens, self.size.codes)
        logits = jax.random.normal(jax.random.key(2), shape)
        codes = self.codes[: self.size.train_batch]

        @jax.jit
        def call(logits):
            def loss(logits):
                return objective.variational_bound(
                    jax.random.key(3), lambda tokens, t: logits, codes, self.schedule,
                    objective.init_time_statistics(self.size.steps), auxiliary_weight=5e-4,
                )[0]  # fmt: skip

            return jax.value_and_grad(loss)(logits)

        return seconds(lambda: jax.block_until_ready(call(logits)), runs)

    def sample_seconds(self, runs: int, num_steps: int, network: bool) -> float:
        """Guided, truncated sampling of a batch; without the network, logits are a constant."""
        batch, size = self.size.sample_batch, self.size
        settings = sampler.Settings(num_steps=num_steps, guidance=GUIDANCE, truncation=TRUNCATION)
        text = sampler.pairs(self.text[:batch], jnp.zeros_like(self.text[:batch]))
        keys = jax.random.split(jax.random.key(4), batch)
        params = self.init_params()
        shape = (2 * batch, size.tokens, size.codes)
        logits = jax.random.normal(jax.random.key(5), () if network else shape)

        @jax.jit
        def call(params, keys, text, logits):
            model = nnx.merge(self.graphdef, params)
            predict = lambda tokens, t: logits  # noqa: E731
            if network:
                context = model.context(text)
                table = model.modulations(jnp.arange(1, size.steps + 1))
                predict = lambda tokens, t: model.denoise(  # noqa: E731
                    tokens, table[:, t - 1], context
                )
            shape = (batch, size.tokens)
            return sampler.sample(keys, predict, shape, self.schedule, settings).codes

        return seconds(lambda: jax.block_until_ready(call(params, keys, text, logits)), runs)

    def numerics(self) -> dict[str, float]:
        """How far this dtype is from float32: of one loss, and of its gradient, relative."""
        params, key, batch = self.init_params(), jax.random.key(6), 2
        exact = Ours(self.size, "float32")

        def value(model):
            call = jax.jit(jax.value_and_grad(model.loss))
            return call(params, key, self.codes[:batch], self.text[:batch])

        (loss, gradient), (true_loss, true_gradient) = value(self), value(exact)
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, true_gradient))
        return {
            "loss": abs(float(loss) / float(true_loss) - 1),
            "gradient": float(difference / optax.tree.norm(true_gradient)),
        }


class Theirs:
    """The published formulation in PyTorch: bfloat16 autocast, torch.compile, SDPA."""

    def __init__(self, size: Size, compiled: bool):
        import torch
        from kernels import Published
        from torch_denoiser import Denoiser as TorchDenoiser

        self.torch, self.size = torch, size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_default_device(self.device)
        torch.manual_seed(0)
        self.model = TorchDenoiser(size)
        self.network = torch.compile(self.model) if compiled else self.model
        self.code = Published(size.steps, size.codes)
        batch = max(size.train_batch, size.sample_batch)
        self.codes = torch.randint(0, size.codes, (batch, size.tokens))
        self.text = torch.randn(batch, TEXT_LENGTH, size.text_width)

    def _seconds(self, call, runs):
        def finished():
            call()
            if self.device == "cuda":
                self.torch.cuda.synchronize()

        return seconds(finished, runs)

    def _autocast(self):
        return self.torch.autocast(self.device, dtype=self.torch.bfloat16)

    def train_seconds(self, runs: int) -> float:
        torch, batch = self.torch, self.size.train_batch
        codes, text = self.codes[:batch], self.text[:batch]
        parameters = list(self.model.parameters())
        average = [p.detach().clone() for p in parameters]
        adam = torch.optim.AdamW(
            parameters, lr=2e-4, betas=(0.9, 0.96), weight_decay=0.045,
            fused=self.device == "cuda",
        )  # fmt: skip

        def step():
            t = torch.randint(0, self.size.steps, (batch,))
            log_x0 = self.code.log_onehot(codes)
            noised = self.code.draw(self.code.forward_law(log_x0, t, self.code.cumulative))
            with self._autocast():
                logits = self.network(noised.argmax(1), t, text)
            self.code.loss(logits, codes, t, noised).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            adam.step()
            adam.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 0.01)

        return self._seconds(step, runs)

    def sample_seconds(self, runs: int, num_steps: int) -> float:
        torch, batch = self.torch, self.size.sample_batch
        text = torch.cat([self.text[:batch], torch.zeros_like(self.text[:batch])])

        @torch.no_grad()
        def sample():
            start = torch.full((batch, self.size.tokens), self.size.codes)
            noised = self.code.log_onehot(start)
            for time_index in range(num_steps - 1, -1, -1):
                t = torch.full((batch,), time_index)
                with self._autocast():
                    both = self.network(noised.argmax(1).repeat(2, 1), t.repeat(2), text)
                logits, null = both.chunk(2)
                noised = self.code.step(logits, noised, t, null, GUIDANCE, TRUNCATION)
            return noised

        return self._seconds(sample, runs)


def measure(name: str, flags, ceiling: float) -> dict:
    """Everything of one size."""
    size = SIZES[name]
    ours = Ours(size, "bfloat16")
    num_steps = min(flags.steps, size.steps)
    runs = flags.runs
    train = ours.train_seconds(runs)
    sample = ours.sample_seconds(runs, num_steps, network=True)
    result = {
        "size": name,
        "train_seconds": train,
        "train_images_per_second": size.train_batch / train,
        "train_mfu": 3 * forward_flops(size) * size.train_batch / train / ceiling,
        "train_rest_share": ours.objective_seconds(runs) / train,
        "sample_images_per_second": size.sample_batch / sample,
        "sample_mfu": 2 * forward_flops(size) * size.sample_batch * num_steps / sample / ceiling,
        "sample_rest_share": ours.sample_seconds(runs, num_steps, network=False) / sample,
        "sample_steps": num_steps,
        "bfloat16_against_float32": ours.numerics(),
    }
    if flags.torch:
        theirs = Theirs(size, flags.compile)
        result["torch_train_images_per_second"] = size.train_batch / theirs.train_seconds(runs)
        torch_sample = theirs.sample_seconds(runs, num_steps)
        result["torch_sample_images_per_second"] = size.sample_batch / torch_sample
    return result


def row(result: dict) -> str:
    """One line of the table."""
    text = (
        "{size:6} train {train_images_per_second:8.1f} images/s, MFU {train_mfu:6.1%}, rest "
        "{train_rest_share:6.1%}; sample {sample_images_per_second:8.2f} images/s "
        "({sample_steps} steps), rest {sample_rest_share:6.1%}"
    ).format(**result)
    if "torch_train_images_per_second" in result:
        text += "; over PyTorch: train {:.2f}x, sample {:.2f}x".format(
            result["train_images_per_second"] / result["torch_train_images_per_second"],
            result["sample_images_per_second"] / result["torch_sample_images_per_second"],
        )
    numerics = result["bfloat16_against_float32"]
    return text + "; bfloat16: loss {loss:.1e}, gradient {gradient:.1e}".format(**numerics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="S,B,Large")
    parser.add_argument("--steps", type=int, default=100, help="network calls of the sampler")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--matmul", type=int, default=0, help="side; 8192 on a GPU, 512 elsewhere")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", help="file to write")
    flags = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    ceiling = matmul_ceiling(flags.runs, flags.matmul or (8192 if gpu else 512))
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "matmul_tflops": ceiling / 1e12,
        "results": [],
    }
    print(
        "{device}, jax {jax}, {date}; bfloat16 products {matmul_tflops:.2f} TFLOP/s".format(
            **report
        )
    )
    for name in flags.sizes.split(","):
        report["results"].append(measure(name, flags, ceiling))
        print(row(report["results"][-1]), flush=True)
        # After every size: a later one may not fit.
        if flags.json:
            Path(flags.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
