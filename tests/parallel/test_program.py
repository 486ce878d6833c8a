# ruff: noqa: E501
"""What programs take: texts of the TPU compiler checked by hand, and the step of a small model."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax import modes
from vqd_jax.errors import UserError
from vqd_jax.parallel import program, sharding
from vqd_jax.training import stage_two, task

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).parents[2]

TEXT = """HloModule jit_step

%all-reduce-scatter.1 (input.1: f32[8,4]) -> f32[2,4] {
  %input.1 = f32[8,4]{1,0} parameter(0)
  %all-reduce.9 = f32[8,4]{1,0} all-reduce(%input.1), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}

%fused.1 (p.1: bf16[4,16]) -> bf16[16,16] {
  %all-gather.1 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%fused.2 (p.2: bf16[4,16]) -> bf16[16,16] {
  %all-gather.2 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%body (p.3: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %fusion.1 = bf16[16,16]{1,0} fusion(%x), kind=kCustom, calls=%fused.1
  %fusion.2 = bf16[16,16]{1,0} fusion(%x), kind=kCustom, calls=%fused.2
}

%condition (p.4: (s32[], bf16[4,16])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(19)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.7), direction=LT
}

ENTRY %main (p.5: f32[8,4]) -> f32[] {
  %while.1 = (s32[], bf16[4,16]) while(%t), condition=%condition, body=%body
  %fusion.3 = f32[2,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %all-reduce.1 = (f32[10]{0}, f32[6]{0}) all-reduce(%a, %b), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %all-reduce.2 = f32[10]{0} all-reduce(%a), channel_id=3, replica_groups={{0},{1}}, to_apply=%add
  %start = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=4, source_target_pairs={{0,1}}
}
"""


def test_collectives_are_counted_by_turns_and_channels():
    table = program.by_kind(program.collectives(TEXT))
    assert table == {
        # 16 x 16 of two bytes, of which 3/4 come from elsewhere, in each of 19 turns; written in two
        # fusions, it is one exchange.
        "all-gather": (19, 19 * 384),
        "all-reduce": (1, int(2 * 64 * 7 / 8)),
        "reduce-scatter": (1, int(8 * 4 * 4 * 3 / 4)),
        "collective-permute": (1, 16),
    }


def test_a_gathered_parameter_is_no_activation():
    script = runpy.run_path(str(ROOT / "benchmarks" / "tpu_compile.py"))
    found, of_activations = program.collectives(TEXT), script["gathered_activations"]
    assert of_activations(found, [(19, 16, 16)], stream=64) == []
    (gathered,) = of_activations(found, [(19, 16, 8)], stream=64)
    assert gathered.shapes == ((16, 16),)
    assert gathered.times == 19
    # Of four devices, less than a stream of each.
    assert of_activations(found, [(19, 16, 8)], stream=65) == []


@pytest.fixture(scope="module")
def made():
    config = tiny.get_config()
    mesh = sharding.make_mesh(config)
    denoiser = stage_two.DenoiserTask(config)
    state = task.abstract_state(denoiser, mesh)
    lowered = task.jit_step(denoiser, mesh).lower(state, stage_two.abstract_batch(config, mesh))
    return program.plan(state, lowered, mesh)


def test_the_state_has_the_bytes_that_it_has_when_made(made):
    real = jax.jit(lambda: stage_two.create_state(tiny.get_config()))()
    real = real.replace(key=jax.random.key_data(real.key))
    for name, size in made.state.items():
        assert size == sum(x.nbytes for x in jax.tree.leaves(getattr(real, name))), name
    assert sum(row[3] for row in made.parameters) == made.state["params"]
    # The step takes the state and a batch of 32 x (16 codes and 16 ids).
    batch = 32 * (16 + 16) * 4
    assert made.program.arguments == pytest.approx(sum(made.state.values()) + batch, rel=0.01)
    assert made.program.temporaries > 1e5
    assert made.traffic == {}


def test_the_table_ends_in_whether_it_fits(made):
    mesh = sharding.make_mesh(tiny.get_config())
    text = program.describe(made, mesh, 1.0)
    rows = [line.split() for line in text.splitlines()]
    assert [
        "denoiser.blocks.mlp_in.kernel",
        "2x32x128",
        "None,",
        "fsdp,",
        "tensor",
        "0.031",
    ] in rows
    count = sum(int(np.prod(shape)) for _, shape, _, _ in made.parameters)
    assert f"{count / 1e6:.1f} M parameters on 1 devices (data 1, fsdp 1, tensor 1)" in text
    assert text.endswith("fits into 1 GiB")
    assert "DOES NOT FIT into 0.001 GiB; raise config.mesh.fsdp" in program.describe(
        made, mesh, 0.001
    )
    assert "give --hbm_gib" in program.describe(made, mesh, None)


def test_a_batch_that_cannot_be_divided_is_an_error():
    config = tiny.get_config()
    config.training.gradient_accumulation = 5
    with pytest.raises(UserError, match="config.training.batch_size=32 cannot be divided"):
        modes.plan(config)


def test_an_unknown_slice_is_an_error():
    with pytest.raises(UserError, match="--topology=v5e:3x3"):
        program.topology("v5e:3x3")
