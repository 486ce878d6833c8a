"""Loss and sampling step beside the published formulation, on the same inputs, in one process.

    pip install -e '.[benchmark]'
    python benchmarks/kernels.py [--network]

The published formulation is written here in PyTorch from its description: every distribution is a
[B, K+1, N] tensor of logarithms, tokens are logarithms of one-hot vectors, and a draw is Gumbel-max
over all of them. Times are the smallest of a few runs after one that is not counted; memory is the
largest resident set above the one before the run. ``--network`` adds one call of the denoiser of
the published size (19 layers, width 1024), which takes minutes on a CPU.

Letters: B images, N tokens, K codes, T steps.
"""

import argparse
import contextlib
import functools
import math
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from vqd_jax.diffusion import objective, rules, sampler, schedule
from vqd_jax.models import denoiser

FLOOR, LOWEST = math.log(1e-30), -70.0


class Published:
    """The published formulation; classes second, time index t means t+1 steps of noise."""

    def __init__(self, num_steps: int, num_codes: int):
        s = schedule.released(num_steps, num_codes)
        keep, mask = (np.asarray(table, np.float64) for table in (s.keep, s.mask))
        uniform = np.asarray(s.replace, np.float64)
        step_keep = keep[1:] / keep[:-1]
        step_mask = 1 - (1 - mask[1:]) / (1 - mask[:-1])
        step_uniform = np.maximum(1 - step_keep - step_mask, 1e-12) / num_codes
        with np.errstate(divide="ignore"):
            log = lambda x: torch.tensor(np.log(x), dtype=torch.float32)  # noqa: E731
            # Index -1, clean data, sits at the end.
            roll = lambda x: log(np.append(x[1:], x[:1]))  # noqa: E731
            self.cumulative = roll(keep), roll(uniform), roll(mask), roll(1 - mask)
            self.one_step = log(step_keep), log(step_uniform), log(step_mask), log(1 - step_mask)
        self.num_codes, self.num_steps = num_codes, num_steps

    def log_onehot(self, tokens):
        onehot = torch.nn.functional.one_hot(tokens, self.num_codes + 1).permute(0, 2, 1)
        return torch.log(onehot.float().clamp(min=1e-30))

    def predict_start(self, logits):
        log_p0 = torch.nn.functional.log_softmax(logits.double(), dim=1).float()
        mask_row = torch.full_like(log_p0[:, :1], LOWEST)
        return torch.cat([log_p0, mask_row], dim=1).clamp(LOWEST, 0)

    def forward_law(self, log_p, t, tables):
        keep, uniform, mask, visible = (table[t][:, None, None] for table in tables)
        codes = torch.logaddexp(log_p[:, :-1] + keep, uniform)
        return torch.cat([codes, torch.logaddexp(log_p[:, -1:] + visible, mask)], dim=1)

    def posterior(self, log_p0, log_x_t, t):
        masked = (log_x_t.argmax(1) == self.num_codes)[:, None]
        likelihood = self.forward_law(log_x_t, t, self.cumulative)[:, :-1]
        at_mask = self.cumulative[2][t][:, None, None].expand_as(likelihood)
        likelihood = torch.where(masked, at_mask, likelihood)
        step = self.forward_law(log_x_t, t, self.one_step)
        to_mask = self.one_step[2][t][:, None, None].expand_as(step[:, :-1])
        to_mask = torch.cat([to_mask, torch.zeros_like(step[:, :1])], dim=1)
        floor = torch.full_like(step[:, :1], FLOOR)
        step = torch.where(masked, to_mask, torch.cat([step[:, :-1], floor], dim=1))
        q = torch.cat([log_p0[:, :-1] - likelihood, floor], dim=1)
        total = torch.logsumexp(q, dim=1, keepdim=True)
        return (self.forward_law(q - total, t - 1, self.cumulative) + step + total).clamp(LOWEST, 0)

    def draw(self, log_p):
        noise = -torch.log(-torch.log(torch.rand_like(log_p) + 1e-30) + 1e-30)
        return self.log_onehot((noise + log_p).argmax(1))

    def loss(self, logits, x0, t, log_x_t=None):
        """Loss with uniform times, auxiliary weight 5e-4 and its adaptive factor; nats a token."""
        log_x0 = self.log_onehot(x0)
        if log_x_t is None:
            log_x_t = self.draw(self.forward_law(log_x0, t, self.cumulative))
        log_p0 = self.predict_start(logits)
        model = self.posterior(log_p0, log_x_t, t)
        true = self.posterior(log_x0, log_x_t, t)
        kl = (true.exp() * (true - model)).sum(1).sum(1)
        nll = -(log_x0.exp() * model).sum(1).sum(1)
        auxiliary = (log_x0[:, :-1].exp() * (log_x0[:, :-1] - log_p0[:, :-1])).sum(1).sum(1)
        first = t == 0
        auxiliary = torch.where(first, nll, auxiliary) * (2 - t / self.num_steps) * 5e-4
        total = (torch.where(first, nll, kl) + auxiliary) * self.num_steps
        return total.sum() / x0.numel()

    def loss_and_gradient(self, logits, x0, t, log_x_t=None):
        logits = logits.detach().requires_grad_()
        loss = self.loss(logits, x0, t, log_x_t)
        loss.backward()
        return loss.detach(), logits.grad

    @torch.no_grad()
    def step(self, logits, log_x_t, t, null=None, scale=1.0, rate=None):
        log_p0 = self.predict_start(logits)
        if null is not None:
            log_null = self.predict_start(null)[:, :-1]
            guided = log_null + scale * (log_p0[:, :-1] - log_null)
            guided = guided - torch.logsumexp(guided, dim=1, keepdim=True)
            log_p0 = torch.cat([guided.clamp(LOWEST, 0), log_p0[:, -1:]], dim=1)
        if rate is not None:
            ranked, order = torch.sort(log_p0, 1, descending=True)
            above = torch.cumsum(ranked.exp(), dim=1) < rate
            above = torch.cat([torch.ones_like(above[:, :1]), above[:, :-1]], dim=1)
            kept = above.gather(1, order.argsort(1))
            log_p0 = torch.where(kept, log_p0, torch.full_like(log_p0, LOWEST))
        return self.draw(self.posterior(log_p0, log_x_t, t))


@functools.partial(jax.jit, static_argnames="noise_schedule_size")
def our_loss_and_gradient(logits, x0, key, noise_schedule_size):
    noise_schedule = schedule.released(*noise_schedule_size)

    def loss(logits):
        return objective.variational_bound(
            key, lambda tokens, t: logits, x0, noise_schedule,
            objective.init_time_statistics(noise_schedule.num_steps), auxiliary_weight=5e-4,
        )[0]  # fmt: skip

    return jax.value_and_grad(loss)(logits)


@jax.jit
def our_step(keys, answers, tokens, t, noise_schedule, settings, scale=None):
    log_x0 = sampler.shape_x0(answers, settings, scale)
    at = rules.Step(s=t - 1, t=t, start=t, num_masked=t)
    rule = jax.vmap(settings.rule, in_axes=(0, 0, 0, None, None))
    return rule(keys, log_x0, tokens, at, noise_schedule)


@contextlib.contextmanager
def peak_memory(result):
    """Appends the largest resident set over the one at the start, in bytes."""
    page, done, seen = os.sysconf("SC_PAGE_SIZE"), threading.Event(), []

    def resident():
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * page

    def watch():
        while not done.wait(0.001):
            seen.append(resident())

    start, watcher = resident(), threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        result.append(max([start, *seen]) - start)


def measure(function, runs):
    """(seconds, bytes) of a call that blocks until it is done."""
    function()
    seconds, memory = [], []
    for _ in range(runs):
        with peak_memory(memory):
            start = time.perf_counter()
            kept = function()
            seconds.append(time.perf_counter() - start)
        del kept
    return min(seconds), max(memory)


def inputs(batch, num_tokens, num_codes):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((2, batch, num_tokens, num_codes), np.float32)
    x0 = rng.integers(0, num_codes, (batch, num_tokens))
    return logits[0], logits[1], x0, np.where(rng.random(x0.shape) < 0.5, num_codes, x0)


def ours(batch, num_tokens, num_codes, num_steps, runs):
    """name -> (seconds, bytes)."""
    logits, null, x0, tokens = (jnp.asarray(x) for x in inputs(batch, num_tokens, num_codes))
    noise_schedule = schedule.released(num_steps, num_codes)
    key = jax.random.key(0)
    keys = jax.random.split(key, batch)
    both = sampler.pairs(logits, null)

    def step(answers, settings, scale=None):
        t = num_steps // 2
        return our_step(keys, answers, tokens, t, noise_schedule, settings, scale)

    calls = {
        "loss and gradient": functools.partial(
            our_loss_and_gradient, logits, x0, key, (num_steps, num_codes)
        ),
        "step": functools.partial(step, logits, sampler.Settings()),
        "step, guided, truncated": functools.partial(
            step, both, sampler.Settings(truncation=0.86), 3.0
        ),
    }
    return {
        name: measure(lambda call=call: jax.block_until_ready(call()), runs)
        for name, call in calls.items()
    }


def published(batch, num_tokens, num_codes, num_steps, runs):
    """name -> (seconds, bytes)."""
    logits, null, x0, tokens = inputs(batch, num_tokens, num_codes)
    first = lambda x: torch.tensor(x.transpose(0, 2, 1).copy())  # noqa: E731
    logits, null, x0, tokens = first(logits), first(null), torch.tensor(x0), torch.tensor(tokens)
    code = Published(num_steps, num_codes)
    log_x_t = code.log_onehot(tokens)
    t = torch.linspace(0, num_steps - 1, batch).long()
    middle = torch.full((batch,), num_steps // 2 - 1)
    step = functools.partial(code.step, logits, log_x_t, middle)
    calls = {
        "loss and gradient": functools.partial(code.loss_and_gradient, logits, x0, t),
        "step": step,
        "step, guided, truncated": functools.partial(step, null=null, scale=3.0, rate=0.86),
    }
    return {name: measure(call, runs) for name, call in calls.items()}


def agreement(num_steps):
    """Largest relative difference of the two losses on one noised batch, and of gradients."""
    batch, num_tokens, num_codes = 4, 64, 2887
    logits, _, x0, tokens = inputs(batch, num_tokens, num_codes)
    t = np.linspace(1, num_steps, batch).astype(int)
    noise_schedule = schedule.released(num_steps, num_codes)

    def loss(logits):
        main, auxiliary = objective.terms(logits, x0, tokens, t, noise_schedule)
        factor = 5e-4 * (2 - (t - 1) / num_steps)[:, None]
        return jnp.sum(main + factor * auxiliary) * num_steps / x0.size

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    code = Published(num_steps, num_codes)
    theirs, slope = code.loss_and_gradient(
        torch.tensor(logits.transpose(0, 2, 1).copy()), torch.tensor(x0), torch.tensor(t - 1),
        code.log_onehot(torch.tensor(tokens)),
    )  # fmt: skip
    slope = slope.numpy().transpose(0, 2, 1)
    return (
        abs(float(value) / float(theirs) - 1),
        np.abs(np.asarray(gradient) - slope).max() / np.abs(slope).max(),
    )


def network_seconds(batch, runs):
    """Seconds of one call of the denoiser of the published size, float32."""
    config = denoiser.DenoiserConfig(
        num_codes=2887, grid=(32, 32), num_steps=100, width=1024, num_layers=19, num_heads=16,
        text_width=512,
    )  # fmt: skip
    graphdef, state = nnx.split(nnx.eval_shape(lambda: denoiser.Denoiser(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda p: jnp.full(p.shape, 0.01, p.dtype), state)
    tokens, t = jnp.zeros((batch, 1024), jnp.int32), jnp.full(batch, 50)
    text = jnp.ones((batch, 77, 512))
    run = jax.jit(lambda params, *x: nnx.merge(graphdef, params)(*x))
    return measure(lambda: jax.block_until_ready(run(params, tokens, t, text)), runs)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", action="store_true", help="time the full denoiser, too")
    parser.add_argument("--runs", type=int, default=5)
    flags = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    batch, num_tokens, num_codes, num_steps = 4, 1024, 2887, 100

    print(f"{os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}")
    loss, gradient = agreement(num_steps)
    print(f"agreement: loss {loss:.1e} relative, gradient {gradient:.1e} of its largest\n")
    print(f"B={batch} N={num_tokens} K={num_codes}")
    theirs = published(batch, num_tokens, num_codes, num_steps, flags.runs)
    mine = ours(batch, num_tokens, num_codes, num_steps, flags.runs)
    print(f"{'':26}{'published':>20}{'ours':>20}{'faster':>9}{'memory':>9}")
    for name, (seconds, size) in mine.items():
        their_seconds, their_size = theirs[name]
        print(
            f"{name:26}{their_seconds:9.3f} s {their_size / 2**20:5.0f} MiB"
            f"{seconds:9.3f} s {size / 2**20:5.0f} MiB"
            f"{their_seconds / seconds:8.1f}x{size / their_size:9.2f}"
        )
    if flags.network:
        seconds = network_seconds(batch, 1)
        share = mine["step"][0] / (seconds + mine["step"][0])
        print(
            f"\none call of the denoiser {seconds:.1f} s; the rest of a step is {share:.2%} of it"
        )

    print("\ngrowth, nanoseconds a logit:")
    for n, k in [(1024, 1024), (1024, 4096), (1024, 16384), (256, 4096), (4096, 4096)]:
        times = ours(1, n, k, num_steps, flags.runs)
        row = "  ".join(f"{name} {s / (n * k) * 1e9:5.1f}" for name, (s, _) in times.items())
        print(f"B=1 N={n:5} K={k:6}  {row}")


if __name__ == "__main__":
    main()
