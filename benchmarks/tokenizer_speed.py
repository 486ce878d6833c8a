"""How long a training step of a tokenizer and its discriminator takes, beside other programs.

python benchmarks/tokenizer_speed.py toy                   # ours beside the libraries' layers
python benchmarks/tokenizer_speed.py toy --each            # and with one of them replaced
python benchmarks/tokenizer_speed.py f8 --program=jax      # the published f8 size
python benchmarks/tokenizer_speed.py f8 --program=torch    # the same in PyTorch, channels last

"toy" takes a step of the row "+ adversarial" of benchmarks/tokenizer.py on 64 pixels with the
convolutions, normalisations and blurs of models/convolution.py and with those of the libraries,
which it alternates. "f8" takes steps of the published OpenImages size with 256 pixels, batch 2,
L1 and hinge losses, Adam and the published discriminator, without a perceptual network; every
program has a process of its own, so that its memory is its own. Times are the smallest of all
steps.
"""

import argparse
import contextlib
import functools
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import tokenizer as rows
from vqd_jax import config as config_lib
from vqd_jax.models import autoencoder, convolution, discriminator
from vqd_jax.options import AutoencoderOptions
from vqd_jax.training import tokenizer

LIBRARIES = "the libraries'"


def _flax_norm(self, x, *, swish=False):
    module = nnx.GroupNorm(
        x.shape[-1], num_groups=self.num_groups, epsilon=self.epsilon, rngs=nnx.Rngs(0)
    )
    graphdef = nnx.split(module)[0]
    y = nnx.merge(graphdef, {"scale": self.scale[...], "bias": self.bias[...]})(x)
    return jax.nn.swish(y) if swish else y


def _blur_by_strides(x):
    for axis in (1, 2):
        width = [(0, 0)] * 4
        width[axis] = (1, 2)
        padded, half = jnp.pad(x, width, mode="edge"), -(-x.shape[axis] // 2)
        a, b, c, d = (
            jax.lax.slice_in_dim(padded, start, start + 2 * half - 1, 2, axis) for start in range(4)
        )
        x = (a + d) * 0.125 + (b + c) * 0.375
    return x


# What can be replaced by a library's: (where, name, the library's).
_PLAIN = {
    "few channels": (convolution, "_FEW", 0),
    "upsampling": (convolution, "upsampled_conv", convolution._repeat_and_conv),
    "normalisation": (convolution.GroupNorm, "__call__", _flax_norm),
    "blur": (discriminator, "blur_pool", _blur_by_strides),
}


@contextlib.contextmanager
def plain(*names):
    """Some programs of ours are replaced while a step is traced."""
    before = {name: getattr(*_PLAIN[name][:2]) for name in names}
    for name in names:
        setattr(*_PLAIN[name])
    try:
        yield
    finally:
        for name, ours in before.items():
            setattr(*_PLAIN[name][:2], ours)


def compiled_step(config, options, batch, *replaced):
    """A function that takes a step on random pictures, and the program's memory in bytes."""
    rng = np.random.default_rng(0)
    shape = (batch, config.image_size, config.image_size, 3)
    images = jnp.asarray(rng.integers(0, 256, shape, np.uint8))
    state = jax.jit(lambda key: tokenizer.create_state(config, options, key))(jax.random.key(0))

    def step(state, images):
        return tokenizer.train_step(state, images, config=config, options=options)

    with plain(*replaced):
        program = jax.jit(step, donate_argnums=0).lower(state, images).compile()
    memory = program.memory_analysis()

    def run():
        nonlocal state
        state, metrics = program(state, images)
        jax.block_until_ready(metrics)

    return run, memory.temp_size_in_bytes + memory.argument_size_in_bytes


def fastest(runs, rounds):
    """The smallest time of each function in seconds; the functions take turns."""
    times = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: min(found) for name, found in times.items()}


def toy(rounds, each):
    config = rows.row_config("emoji", "+ adversarial", 1000)
    sizes = config_lib.autoencoder_config(config)
    options = config_lib.autoencoder_options(config)
    make = functools.partial(compiled_step, sizes, options, options.batch_size)
    runs = {"ours": make()[0], LIBRARIES: make(*_PLAIN)[0]}
    if each:
        runs |= {f"ours, but the library's {name}": make(name)[0] for name in _PLAIN}
    found = fastest(runs, rounds)
    print("| program | step, ms | pictures/s |\n|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {1e3 * seconds:.0f} | {options.batch_size / seconds:.1f} |")
    print(f"\nours: {found[LIBRARIES] / found['ours']:.2f} times as fast")


def f8(program, pixels, rounds):
    config = autoencoder.AutoencoderConfig(
        pixels, 128, (1, 1, 2, 4), 2, (pixels // 8,), 256, 256, 8192
    )
    if program == "jax":
        options = AutoencoderOptions(
            batch_size=2, squared_weight=0.0, adversarial_weight=0.1, discriminator="patchgan"
        )
        run, size = compiled_step(config, options, 2)
        print(f"program, GiB: {size / 2**30:.1f}")
    else:
        run = torch_step(config)
    run()
    before = time.process_time()
    seconds = fastest({program: run}, rounds)[program]
    # Other programs on the machine make a step longer, and its processor time hardly.
    processor = (time.process_time() - before) / (rounds + 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{program}: step, s: {seconds:.2f}; processor time of a step, s: {processor:.2f}; "
        f"peak memory of the process, GiB: {peak:.1f}"
    )


def torch_step(config):
    import torch

    from benchmarks import torch_vqgan

    torch.manual_seed(0)
    last = torch.channels_last
    model = torch_vqgan.Autoencoder(config).to(memory_format=last)
    judge = torch_vqgan.patchgan().to(memory_format=last)
    adam = torch.optim.Adam(model.parameters(), 1e-4)
    judge_adam = torch.optim.Adam(judge.parameters(), 1e-4)
    size = config.image_size
    images = (torch.rand(2, 3, size, size) * 2 - 1).to(memory_format=last)

    def run():
        made, commitment = model(images)
        loss = (made - images).abs().mean() + 0.25 * commitment
        # The discriminator's parameters learn from its own loss alone.
        judge.requires_grad_(False)
        (loss - 0.1 * judge(made).mean()).backward()
        judge.requires_grad_(True)
        real, fake = judge(images), judge(made.detach())
        (0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())).backward()
        for optimizer in (adam, judge_adam):
            optimizer.step()
            optimizer.zero_grad()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=("toy", "f8"))
    parser.add_argument("--program", choices=("jax", "torch"), default="jax")
    parser.add_argument("--rounds", type=int, default=0, help="steps; 0 is 15 of toy, 2 of f8")
    parser.add_argument("--each", action="store_true", help="toy with one layer replaced")
    parser.add_argument("--pixels", type=int, default=256, help="side, of f8")
    arguments = parser.parse_args()
    if arguments.size == "toy":
        toy(arguments.rounds or 15, arguments.each)
    else:
        f8(arguments.program, arguments.pixels, arguments.rounds or 2)


if __name__ == "__main__":
    main()
