import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax import plan
from vqd_jax.errors import UserError
from vqd_jax.parallel import sharding
from vqd_jax.training import state

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def made():
    return plan.make(tiny.get_config())


def test_the_state_has_the_bytes_that_it_has_when_made(made):
    real = jax.jit(lambda: state.create_state(tiny.get_config()))()
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
    text = plan.describe(made, mesh, 1.0)
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
    assert "DOES NOT FIT into 0.001 GiB; raise config.mesh.fsdp" in plan.describe(made, mesh, 0.001)
    assert "give --hbm_gib" in plan.describe(made, mesh, None)


def test_a_batch_that_cannot_be_divided_is_an_error():
    config = tiny.get_config()
    config.training.gradient_accumulation = 5
    with pytest.raises(UserError, match="config.training.batch_size=32 cannot be divided"):
        plan.make(config)


def test_an_unknown_slice_is_an_error():
    with pytest.raises(UserError, match="--topology=v5e:3x3"):
        plan.topology("v5e:3x3")
