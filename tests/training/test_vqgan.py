"""Both networks of a VQGAN: their gradients, their state, and what every term changes."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from vqd_jax import checkpoint
from vqd_jax import config as config_lib
from vqd_jax.data import batches, encode
from vqd_jax.errors import UserError
from vqd_jax.interop import perceptual_files, pretrained
from vqd_jax.models import autoencoder, discriminator, perceptual
from vqd_jax.models.autoencoder import AutoencoderConfig
from vqd_jax.options import AutoencoderOptions
from vqd_jax.parallel import rows, sharding
from vqd_jax.training import adversarial, stage_one, stage_two, task, tokenizer

jax.config.update("jax_numpy_rank_promotion", "raise")

CONFIG = AutoencoderConfig(
    image_size=16,
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    latent_channels=8,
    codebook_dim=4,
    num_codes=16,
    norm_groups=4,
)
JUDGED = AutoencoderOptions(
    num_steps=20,
    warmup_steps=1,
    learning_rate=1e-3,
    squared_weight=0.5,
    adversarial_weight=0.2,
    lecam_weight=0.1,
    lecam_decay=0.9,
    ema_decay=0.9,
    discriminator_channels=8,
    discriminator_layers=1,
)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)


def whole(tree):
    return tree


@functools.cache
def compiled(options, config=CONFIG):
    return jax.jit(functools.partial(tokenizer.train_step, config=config, options=options))


@functools.cache
def begun(options, config=CONFIG):
    create = functools.partial(tokenizer.create_state, config, options)
    return jax.jit(create)(jax.random.key(0))


def run(state, options, steps, config=CONFIG):
    for _ in range(steps):
        batch = np.roll(PIXELS, int(state.step), axis=0)
        state, metrics = compiled(options, config)(state, batch)
    return state, {name: float(value) for name, value in metrics.items()}


def assert_equal(a, b, **tolerance):
    pairs = zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True)
    for (path, x), (_, y) in pairs:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        name = jax.tree_util.keystr(path)
        if tolerance:
            np.testing.assert_allclose(x, y, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)


def losses(params, judge, state, options):
    """The two networks' losses, written down one after the other."""
    pixels = autoencoder.from_pixels(jnp.asarray(PIXELS))
    sizes = options.discriminator_config()
    codebook = state.codebook.codebook
    (made, latent), _ = tokenizer._forward(
        params, codebook, pixels, None, state.step, config=CONFIG, options=options, whole=whole
    )
    real, fake = (discriminator.bind(sizes, judge)(x) for x in (pixels, made))
    error = made - pixels
    reconstruction = 0.5 * jnp.mean(jnp.abs(error)) + 0.5 * jnp.mean(error**2)
    own = adversarial.discriminator_hinge(real, fake)
    own += options.lecam_weight * adversarial.lecam(state.discriminator.lecam, real, fake)
    return reconstruction, -jnp.mean(fake), latent, own


@pytest.mark.slow
def test_both_gradients_are_those_of_each_loss_alone():
    options = dataclasses.replace(JUDGED, adaptive_weight=True)
    state, _ = run(begun(JUDGED), JUDGED, 1)

    @jax.jit
    def both(state):
        parts = tokenizer._gradients(
            None, state.key, PIXELS, state=state, config=CONFIG, options=options, whole=whole
        )

        def stacked(params, judge):
            return (jnp.stack(losses(params, judge, state, options)),) * 2

        # The gradient of each loss, one after the other, in a new first axis.
        both_params = state.params, state.discriminator.params
        return parts, *jax.jacrev(stacked, argnums=(0, 1), has_aux=True)(*both_params)

    (found, _, metrics), (by_params, by_judge), values = both(state)
    reconstruction, fooling, latent = (
        jax.tree.map(lambda x, i=i: x[i], by_params) for i in range(3)
    )
    of_judge = jax.tree.map(lambda x: x[3], by_judge)
    kernels = (g["decoder"]["conv_out"]["kernel"] for g in (reconstruction, fooling))
    weight = 0.2 * float(adversarial.adaptive_weight(*kernels))
    assert not np.isclose(weight, 0.2)
    np.testing.assert_allclose(metrics["adversarial_weight"], weight, rtol=1e-4)
    expected = jax.tree.map(lambda r, f, z: r + weight * f + z, reconstruction, fooling, latent)
    assert_equal(found["autoencoder"], expected, rtol=2e-3, atol=1e-6)
    assert_equal(found["discriminator"], of_judge, rtol=2e-3, atol=1e-6)
    total = values[0] + weight * values[1] + values[2]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_run():
    straight, _ = run(begun(JUDGED), JUDGED, 4)
    half, _ = run(begun(JUDGED), JUDGED, 2)
    resumed, _ = run(jax.tree.map(lambda x: jnp.array(x, copy=True), half), JUDGED, 2)
    assert_equal(straight, resumed)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), straight, begun(JUDGED))
    # Both networks learn, the averages of logits and weights move.
    parts = (moved.params, moved.discriminator.params, moved.discriminator.lecam, moved.averaged)
    assert all(all(jax.tree.leaves(part)) for part in parts)


@pytest.mark.slow
def test_the_parts_of_a_batch_make_the_step_of_the_whole():
    parts = dataclasses.replace(JUDGED, gradient_accumulation=2)
    state, _ = run(begun(JUDGED), JUDGED, 1)
    of_whole, metrics = run(state, JUDGED, 1)
    of_parts, metrics_of_parts = run(state, parts, 1)
    assert_equal(of_whole.codebook, of_parts.codebook, rtol=1e-4, atol=1e-5)
    assert_equal(of_whole.discriminator.lecam, of_parts.discriminator.lecam, rtol=1e-4)
    # A psnr is a mean of logarithms there.
    for name in metrics.keys() - {"psnr"}:
        assert metrics[name] == pytest.approx(metrics_of_parts[name], rel=2e-3, abs=1e-5), name
    # Adam divides by the size of a gradient, so that of a tiny one is any number.
    for part in ("params", "averaged"):
        assert_equal(getattr(of_whole, part), getattr(of_parts, part), atol=2e-4)


@pytest.mark.slow
def test_every_part_of_a_batch_has_its_own_weight_and_statistics():
    # Without momentum, the first moment of Adam is the gradient.
    whole_batch = dataclasses.replace(
        JUDGED, adaptive_weight=True, discriminator="patchgan", adam_b1=0.0, clip_norm=1e9
    )
    in_parts = dataclasses.replace(whole_batch, gradient_accumulation=2)

    def gradients(state):
        return [part.opt_state[1][0].mu for part in (state, state.discriminator)]

    start = begun(whole_batch)
    alone = [compiled(whole_batch)(start, PIXELS[part::2]) for part in range(2)]
    together, metrics = compiled(in_parts)(start, PIXELS)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *[gradients(state) for state, _ in alone])
    assert_equal(gradients(together), expected, rtol=1e-3, atol=1e-6)
    weights = [float(found["adversarial_weight"]) for _, found in alone]
    assert weights[0] != pytest.approx(weights[1], rel=0.01)
    assert float(metrics["adversarial_weight"]) == pytest.approx(np.mean(weights), rel=1e-4)


@pytest.mark.slow
def test_before_its_start_the_discriminator_neither_learns_nor_counts():
    late = dataclasses.replace(JUDGED, adversarial_start=2, adversarial_warmup=1)
    judged, metrics = run(begun(late), late, 2)
    assert_equal(judged.discriminator, begun(late).discriminator)
    assert metrics["discriminator_loss"] == metrics["adversarial_weight"] == 0.0
    state, metrics = run(judged, late, 1)
    assert metrics["adversarial_weight"] == pytest.approx(0.1)
    assert metrics["discriminator_gradient_norm"] > 0
    # The first step of its own optimizer, at the rate of the run's third step.
    moments = state.discriminator.opt_state[1][0]
    assert int(moments.count) == 1
    _, metrics = run(state, late, 1)
    assert metrics["adversarial_weight"] == pytest.approx(0.2)


def test_averaged_weights_by_hand():
    state, _ = run(begun(JUDGED), JUDGED, 1)
    start = tokenizer.complete(begun(JUDGED))
    # The decay of the first step is 1/10.
    expected = jax.tree.map(lambda a, p: 0.1 * a + 0.9 * p, start, tokenizer.complete(state))
    assert_equal(state.averaged, expected, rtol=1e-5, atol=1e-6)
    assert tokenizer.result(state) is state.averaged
    assert state.averaged["quantize"]["embedding"].shape == (16, 4)


def test_the_perceptual_term_is_the_distance_of_the_network():
    options = dataclasses.replace(
        JUDGED, adversarial_weight=0.0, perceptual_weight=0.5, perceptual="random"
    )
    config, seen = perceptual_files.load("random", seed=0)
    state = begun(options).replace(perceptual=seen)
    pixels = autoencoder.from_pixels(jnp.asarray(PIXELS))
    made = pixels * 0.5
    loss, metrics = tokenizer._image_losses(made, pixels, seen, options)
    distance = perceptual.distance(seen, made, pixels, config=config).mean()
    np.testing.assert_allclose(metrics["perceptual"], distance, rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["reconstruction"] + 0.5 * distance, rtol=1e-5)
    shapes = jax.eval_shape(
        functools.partial(tokenizer.train_step, config=CONFIG, options=options), state, PIXELS
    )
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(state)
    assert "perceptual" in shapes[1] and "adversarial" not in shapes[1]


@pytest.mark.slow
def test_a_gumbel_codebook_learns_by_gradients():
    config = dataclasses.replace(CONFIG, quantizer="gumbel")
    options = AutoencoderOptions(num_steps=10, warmup_steps=0, kl_weight=0.1, temperature_steps=5)
    state, metrics = run(begun(options, config), options, 2, config)
    assert state.codebook is None and 0 < metrics["kl"] < np.log(16)
    old = begun(options, config).params["quantize"]
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params["quantize"], old)
    assert moved == {"embedding": True, "proj": {"bias": True, "kernel": True}}
    assert tokenizer.result(state) is state.params


@pytest.mark.slow
def test_bfloat16_and_remat_change_gradients_by_rounding():
    plain = AutoencoderOptions(num_steps=10, warmup_steps=1)
    rounded = dataclasses.replace(plain, dtype="bfloat16", remat="full")
    state, found = begun(plain), []
    for options in (plain, rounded):
        make = functools.partial(
            tokenizer._gradients, None, config=CONFIG, options=options, whole=whole
        )
        made = jax.jit(lambda key, pixels, state, make=make: make(key, pixels, state=state))
        leaves = jax.tree.leaves(made(state.key, PIXELS, state)[0])
        assert all(leaf.dtype == jnp.float32 for leaf in leaves)
        found.append(jnp.concatenate([leaf.reshape(-1) for leaf in leaves]))
    # A latent between two codes may choose the other one.
    a, b = found
    assert float(a @ b) > 0.9 * float(jnp.linalg.norm(a) * jnp.linalg.norm(b))


LAYOUT = Path(__file__).parents[1] / "data" / "layouts" / "jsonl"
NUM_CODES = 256  # Twelve pictures of 16 codes cannot use them all.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Config and workdir of a run of stage one with both networks. Not to be changed."""
    workdir = tmp_path_factory.mktemp("trained")
    shutil.copytree(LAYOUT, workdir / "pictures")
    config = tiny.get_config()
    config.data.update({"name": "image_text_folder", "dir": str(workdir / "pictures")})
    config.autoencoder.update(dataclasses.asdict(JUDGED))
    config.autoencoder.update({"num_codes": NUM_CODES, "num_steps": 8, "batch_size": 4})
    config.autoencoder.update({"steps_per_call": 2, "profile_steps": 2})
    config.training.update({"log_every": 2, "save_every": 4, "eval_every": 8})
    stage_two.train_autoencoder(config, str(workdir / "run"))
    return config, workdir / "run"


@pytest.fixture
def at_step_4(trained, tmp_path):
    """Config and workdir of that run as it was when step 4 was saved."""
    config, workdir = trained
    shutil.copytree(workdir, tmp_path / "run")
    for name in ("checkpoints/8", "model", "model_remapped", "profile"):
        shutil.rmtree(tmp_path / "run" / "autoencoder" / name)
    return config.copy_and_resolve_references(), tmp_path / "run"


def finished(config, workdir):
    """The state that a run ended with."""
    made = stage_one.AutoencoderTask(config, sharding.make_mesh(config))
    wanted = checkpoint.abstract(jax.eval_shape(made.create_state))
    step, state = checkpoint.load(f"{workdir}/autoencoder/checkpoints", wanted)
    assert step == config.autoencoder.num_steps
    return state


def given(config, workdir):
    """The complete parameters in its model folder."""
    return pretrained.load_autoencoder(config, pretrained.model_folder(str(workdir)))


def logged(workdir):
    """Every number of metrics.jsonl but those of the clock, by step and name."""
    lines = (workdir / "autoencoder" / "metrics.jsonl").read_text().splitlines()
    return {
        (row["step"], name): value
        for row in map(json.loads, lines)
        for name, value in row.items()
        if not name.endswith("images_per_second")
    }


@pytest.mark.slow
def test_a_run_leaves_its_averages_and_a_trace(trained):
    config, workdir = trained
    assert_equal(given(config, workdir), finished(config, workdir).averaged)
    (trace,) = (workdir / "autoencoder" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    # That of stage two would be here.
    assert not (workdir / "profile").exists()


@pytest.mark.slow
def test_codes_that_no_training_picture_has_are_left_out(trained):
    config, workdir = trained
    params, crop = given(config, workdir), encode.crop(config, encode.TRAIN)
    records = batches.records(encode.data_set(config), encode.TRAIN, decode=False)
    crops = np.stack([crop(records[i], config.seed, i) for i in range(len(records))])
    codec = encode.Codec(config_lib.autoencoder_config(config), params)
    codes = np.asarray(codec.encode(rows.padded(crops, codec.batch_size)))[: len(crops)]
    used = np.unique(codes)
    assert 2 < len(used) < NUM_CODES
    expected = np.zeros(NUM_CODES, np.int32)
    expected[used] = np.arange(1, len(used) + 1)
    # The fields that the log names; id 0 is every code that is left out.
    fewer = config.copy_and_resolve_references()
    fewer.autoencoder.update({"num_codes": len(used) + 1, "codebook_size": NUM_CODES})
    found = pretrained.load_autoencoder(fewer, str(workdir / "autoencoder" / "model_remapped"))
    np.testing.assert_array_equal(found.pop("remap")["full_to_code"], expected)
    assert_equal(found, params)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["", "autoencoder/model_remapped"])
def test_a_run_begins_from_a_trained_tokenizer(trained, place):
    config, workdir = trained
    params = given(config, workdir)
    config = config.copy_and_resolve_references()
    config.autoencoder.init_from = str(workdir / place)
    mesh = sharding.make_mesh(config)
    again = stage_one.AutoencoderTask(config, mesh)
    fresh = task.init_state(again, mesh)
    state = again.begin(fresh)
    # All entries of the codebook, whatever the remap.
    assert_equal(tokenizer.complete(state), params)
    assert_equal(state.averaged, params)
    # As if the latents of a batch of 4 pictures had chosen all codes equally often.
    sizes = np.asarray(state.codebook.cluster_size)
    np.testing.assert_array_equal(sizes, np.full(NUM_CODES, 4 * 16 / NUM_CODES, np.float32))
    centres = np.asarray(state.codebook.cluster_sum) / sizes[:, None]
    np.testing.assert_allclose(centres, params["quantize"]["embedding"], rtol=1e-6)
    # The discriminator and both optimizers begin anew.
    assert_equal(
        (state.discriminator, state.opt_state, state.step),
        (fresh.discriminator, fresh.opt_state, fresh.step),
    )


@pytest.mark.slow
def test_steps_of_one_call_are_the_steps_one_by_one(trained, at_step_4):
    config, workdir = at_step_4
    config.autoencoder.update({"steps_per_call": 1, "profile_steps": 0})
    stage_two.train_autoencoder(config, str(workdir))
    ours, theirs = finished(config, workdir), finished(*trained)
    # Another program rounds otherwise. The gradient of some biases is a rounding error, and Adam
    # makes a whole step of it; so parameters are compared less closely than moments.
    for part in ("codebook", "opt_state"):
        assert_equal(getattr(ours, part), getattr(theirs, part), rtol=1e-3, atol=1e-5)
    for part in ("lecam", "opt_state"):
        pair = [getattr(state.discriminator, part) for state in (ours, theirs)]
        assert_equal(*pair, rtol=1e-3, atol=1e-5)
    assert_equal(ours, theirs, rtol=1e-3, atol=2e-4)
    assert logged(workdir) == pytest.approx(logged(trained[1]), rel=1e-3)


@pytest.mark.slow
def test_a_discriminator_that_is_not_finite_stops_the_run(at_step_4):
    config, workdir = at_step_4
    # Step 5 makes its weights so large that its gradient has no finite norm at step 6. The loss is
    # still finite there.
    config.autoencoder.discriminator_learning_rate = 1e7
    with pytest.raises(UserError) as error:
        stage_two.train_autoencoder(config, str(workdir))
    told = r"the loss is -?\d[\d.e+]* and the gradient norm (inf|nan) at step 6; the last good"
    told += f" checkpoint is {workdir}/autoencoder/checkpoints/4\\. "
    assert re.match(told, str(error.value))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("discriminator", "patchgan", "discriminator: 'blurpool' -> 'patchgan'"),
        ("discriminator_layers", 2, "discriminator_layers: 1 -> 2"),
        ("adversarial_weight", 0.0, "adversarial_weight: 0.2 -> 0.0"),
    ],
)
def test_a_run_does_not_go_on_with_another_discriminator(at_step_4, key, value, told):
    config, workdir = at_step_4
    config.autoencoder[key] = value
    with pytest.raises(UserError, match=f"was made with another config .autoencoder.{told}"):
        stage_two.train_autoencoder(config, str(workdir))


@pytest.mark.slow
def test_a_checkpoint_of_another_discriminator_is_refused_by_its_arrays(at_step_4):
    config, workdir = at_step_4
    config.autoencoder.discriminator_layers = 2
    # Without it, nothing else says what the run was made with.
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match=r"checkpoints/4 is of another model .*discriminator\."):
        stage_two.train_autoencoder(config, str(workdir))


@pytest.mark.slow
def test_four_devices_make_the_step_of_one(environment):
    if jax.device_count() < 4:
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", __file__, "-k", "four"]
        done = subprocess.run(command, env=environment | flags, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return
    config = tiny.get_config()
    for name in ("adversarial_weight", "lecam_weight", "ema_decay", "discriminator_layers"):
        config.autoencoder[name] = getattr(JUDGED, name)
    config.autoencoder.discriminator_channels = 8
    made = []
    for shape in ((1, 1), (2, 2)):
        config.mesh.data, config.mesh.fsdp = shape
        devices = jax.devices()[: shape[0] * shape[1]]
        mesh = sharding.make_mesh(config, devices)
        trained = stage_one.AutoencoderTask(config, mesh)
        state = task.init_state(trained, mesh)
        step = task.jit_step(trained, mesh)
        for _ in range(2):
            batch = sharding.put_batch({"image": PIXELS}, mesh)
            state, metrics = step(state, batch)
        made.append((state, jax.device_get(metrics)))
    (one, metrics), (several, metrics_of_several) = made
    kernel = several.discriminator.params["conv"][0]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    for name, value in metrics.items():
        assert value == pytest.approx(metrics_of_several[name], rel=1e-3, abs=1e-5), name
    assert_equal(one.codebook, sharding.fetch(several.codebook), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("perceptual", "alexnet", "perceptual='alexnet': must be one of squeezenet, random, vgg16"),
        ("discriminator", "none", "config.autoencoder.discriminator='none'"),
        ("discriminator_layers", 0, "config.autoencoder.discriminator_layers=0"),
        ("adversarial_weight", -1.0, "config.autoencoder.adversarial_weight=-1.0"),
        ("dtype", "float16", "dtype='float16': must be one of float32, bfloat16"),
        ("ema_decay", 1.0, "config.autoencoder.ema_decay=1.0"),
    ],
)
def test_impossible_options_are_named(key, value, message):
    config = tiny.get_config()
    config.autoencoder[key] = value
    with pytest.raises(config_lib.UserError) as error:
        config_lib.validate(config)
    assert message in str(error.value)
