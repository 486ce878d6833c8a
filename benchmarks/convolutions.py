"""Ways to write the layers of a small tokenizer at 64 pixels for a CPU: mostly 3x3 convolutions.

The last rows are layers of EfficientNet-Lite0 at 224 pixels that convolve each channel apart.

python benchmarks/convolutions.py
python benchmarks/convolutions.py --match=doubled    # only shapes with this in their title

A row is one shape and one way; forward, and forward with both gradients, in ms. The ways of a shape
take turns, and the shortest of their times counts.

Letters: B batch, H/W side, C channels of the input, D of the output.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqd_jax.models import convolution

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
BATCH, ROUNDS = 8, 20


def plain(x, kernel):
    """The library's."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS
    )


def channels_first(x, kernel):
    """The library's with NCHW in between."""
    y = jax.lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2), kernel, (1, 1), ((1, 1), (1, 1)),
        dimension_numbers=("NCHW", "HWIO", "NCHW"),
    )  # fmt: skip
    return y.transpose(0, 2, 3, 1)


def bfloat16(x, kernel):
    """The library's, with inputs in bfloat16 and sums in float32."""
    return jax.lax.conv_general_dilated(
        x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), (1, 1), ((1, 1), (1, 1)),
        dimension_numbers=DIMENSIONS, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _padded(x):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def patches(x, kernel):
    """One product of all patches, joined from slices."""
    return convolution._few_inputs(_padded(x), kernel)


def library_patches(x, kernel):
    """One product of ``conv_general_dilated_patches``."""
    rows = jax.lax.conv_general_dilated_patches(
        x, (3, 3), (1, 1), ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS
    )
    return rows @ kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[-1])


def nine_products(x, kernel):
    """The sum of nine products of shifted pictures."""
    _, height, width, _ = x.shape
    padded = _padded(x)
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


def one_product(x, kernel):
    """One product of all pixels with all taps, and nine shifted parts added up."""
    return convolution._few_outputs(_padded(x), kernel)


def blocks(x, kernel):
    """Blocks of 2x2 pixels from 4x4: one product with the kernel four times in a sparse matrix."""
    batch, height, width, channels = x.shape
    out = kernel.shape[-1]
    matrix = jnp.zeros((4, 4, channels, 2, 2, out), kernel.dtype)
    for i in range(2):
        for j in range(2):
            matrix = matrix.at[i : i + 3, j : j + 3, :, i, j].set(kernel)
    matrix = matrix.reshape(2, 2, 2, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
    h, w = height // 2, width // 2
    deep = _padded(x).reshape(batch, h + 1, 2, w + 1, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    deep = deep.reshape(batch, h + 1, w + 1, -1)
    rows = jnp.concatenate([deep[:, i : i + h, j : j + w] for i in (0, 1) for j in (0, 1)], -1)
    y = (rows @ matrix.reshape(16 * channels, -1)).reshape(batch, h, w, 2, 2, out)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, out)


def winograd(x, kernel):
    """F(2x2, 3x3) (Lavin and Gray, 2015): 16 products of a quarter of the pixels."""
    batch, height, width, channels = x.shape
    out, h, w = kernel.shape[-1], height // 2, width // 2
    left = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
    padded = _padded(x)
    d = [
        [padded[:, i : i + height - 1 : 2, j : j + width - 1 : 2] for j in range(4)]
        for i in range(4)
    ]

    def turned(a, b, c, e):
        return [a - c, b + c, c - b, b - e]

    columns = [turned(*(d[i][j] for i in range(4))) for j in range(4)]
    tiles = [turned(*(columns[j][i] for j in range(4))) for i in range(4)]
    stacked = jnp.stack([tile.reshape(-1, channels) for row in tiles for tile in row])
    weights = jnp.einsum("ai,bj,ijcd->abcd", left, left, kernel).reshape(16, channels, out)
    m = jnp.einsum("tmc,tcd->tmd", stacked, weights).reshape(4, 4, batch, h, w, out)

    def back(a, b, c, e):
        return [a + b + c, b - c - e]

    half = back(*m)
    rows = [jnp.stack(back(*half[i]), axis=3) for i in range(2)]
    return jnp.stack(rows, axis=2).reshape(batch, height, width, out)


WAYS = (
    plain, channels_first, bfloat16, patches, library_patches, nine_products, one_product, blocks,
    winograd,
)  # fmt: skip
# (side, C, D) and the ways that are tried.
SHAPES = {
    (64, 16, 16): WAYS,
    (32, 32, 32): WAYS,
    (16, 64, 64): WAYS,
    (64, 3, 16): (plain, patches, nine_products, blocks),
    (64, 16, 3): (plain, patches, nine_products, one_product, blocks),
}


def repeated(x, kernel):
    """The library's, after every pixel was repeated."""
    return convolution._repeat_and_conv(x, kernel)


UPSAMPLED = ((32, 32, 32), (16, 64, 64))


def library_norm(x, scale):
    """Flax's group normalisation, then swish."""
    norm = nnx.GroupNorm(x.shape[-1], num_groups=8, epsilon=1e-6, rngs=nnx.Rngs(0))
    graphdef = nnx.split(norm)[0]
    return jax.nn.swish(nnx.merge(graphdef, {"scale": scale, "bias": jnp.zeros_like(scale)})(x))


def our_norm(x, scale):
    """Ours, from sums over every channel."""
    graphdef = nnx.split(convolution.GroupNorm(x.shape[-1], 8))[0]
    return nnx.merge(graphdef, {"scale": scale, "bias": jnp.zeros_like(scale)})(x, swish=True)


def compare(title, ways, x_shape, kernel_shape):
    """Prints one row for each way, after it was checked against the first."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, kernel = draw(*x_shape), draw(*kernel_shape)
    programs, expected = {}, jax.jit(ways[0])(x, kernel)
    cotangent = draw(*expected.shape)
    for way in ways:
        error = jnp.abs(jax.jit(way)(x, kernel) - expected).max() / jnp.abs(expected).max()
        assert error < (0.02 if way is bfloat16 else 1e-4), way
        both = lambda x, k, way=way: jax.vjp(way, x, k)[1](cotangent)  # noqa: E731
        with_value = lambda x, k, way=way, both=both: (way(x, k), both(x, k))  # noqa: E731
        programs[way] = [jax.jit(way), jax.jit(with_value)]
    times = {way: [[], []] for way in ways}
    for number in range(ROUNDS + 1):
        for way in ways:
            for program, found in zip(programs[way], times[way], strict=True):
                start = time.perf_counter()
                jax.block_until_ready(program(x, kernel))
                if number:
                    found.append(1e3 * (time.perf_counter() - start))
    for way in ways:
        forward, gradients = (min(found) for found in times[way])
        says = way.__doc__.splitlines()[0].rstrip(".").replace("``", "`")
        print(f"| {title} | {says} | {forward:.2f} | {gradients:.2f} |", flush=True)


def four_convolutions(x, kernel):
    """Four 2x2 convolutions at the low resolution."""
    return convolution._four_convolutions(x, kernel)


def library_apart(x, kernel):
    """The library's, with as many groups as channels."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS, feature_group_count=x.shape[-1]
    )


def shifted_products(x, kernel):
    """The sum of shifted pictures, each times one weight a channel."""
    padding = convolution.same_padding(x.shape[1:3], kernel.shape[0], 1)
    return convolution.depthwise_conv(x, kernel, padding=padding)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="")
    arguments = parser.parse_args()
    print("| side, channels | way | forward, ms | with gradients, ms |\n|---|---|---|---|")
    rows = [(f"{s}, {c} to {d}", ways, (s, c), (3, 3, c, d)) for (s, c, d), ways in SHAPES.items()]
    doubled = (repeated, four_convolutions)
    rows += [(f"{s}, {c} to {d}, doubled", doubled, (s, c), (3, 3, c, d)) for s, c, d in UPSAMPLED]
    norms = (library_norm, our_norm)
    rows += [(f"{s}, {c}, normalised", norms, (s, c), (c,)) for s, c in ((64, 32), (16, 64))]
    apart = (library_apart, shifted_products)
    layers = ((56, 144, 3), (28, 240, 5), (14, 480, 3))
    rows += [(f"{s}, {c} apart, {k}x{k}", apart, (s, c), (k, k, 1, c)) for s, c, k in layers]
    for title, ways, (side, channels), kernel in rows:
        if arguments.match in title:
            compare(title, ways, (BATCH, side, side, channels), kernel)


if __name__ == "__main__":
    main()
