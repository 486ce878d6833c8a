"""What the compiled programs compute, and how often."""

import re

import jax
import jax.numpy as jnp

from vqd_jax import programs
from vqd_jax.diffusion import sampler, schedule
from vqd_jax.models import conditioned
from vqd_jax.models.denoiser import DenoiserConfig
from vqd_jax.models.text_encoder import TextEncoderConfig

CONFIG = conditioned.ConditionedDenoiserConfig(
    TextEncoderConfig(vocab_size=20, context_length=6, width=14, num_layers=2, num_heads=2),
    DenoiserConfig(
        num_codes=11, grid=(2, 3), num_steps=9, width=12, num_layers=3, num_heads=2, text_width=14
    ),
)


def test_texts_and_times_are_worked_out_once_a_generation():
    params = conditioned.init_params(CONFIG, jax.random.key(0))
    settings = sampler.Settings(num_steps=4, guidance=jnp.float32(5.0))
    keys, ids = jax.random.split(jax.random.key(1), 2), jnp.ones((2, 6), jnp.int32)
    program = jax.jit(
        lambda *args: programs.sample(
            *args, model_config=CONFIG, schedule=schedule.released(9, 11)
        )
    )  # fmt: skip
    compiled = program.lower(params, keys, ids, ids[:1], settings).compile().as_text()
    # What a loop reads is in the tuple that it carries.
    loops = [line for line in compiled.splitlines() if re.search(r" while\(", line)]
    block = params["denoiser"]["blocks"]

    def read_in_a_loop(kernel):
        shape = ",".join(map(str, kernel.shape))
        assert f"f32[{shape}]" in compiled
        return any(f"f32[{shape}]" in line for line in loops)

    assert read_in_a_loop(block["mlp_in"]["kernel"])
    assert not read_in_a_loop(block["cross_attention"]["key"]["kernel"])
    assert not read_in_a_loop(block["norm_self"]["linear"]["kernel"])
