"""Distillation: pairs of a teacher, and a student that learns from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from configs import distil as distil_config
from configs import tiny
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.diffusion import objective, rules, schedule
from vqd_jax.errors import UserError
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import distil, stage_two

PROMPTS = ["red heart", "a black cat", "grinning face"]


class Stay(struct.PyTreeNode):
    """A rule that leaves all tokens as they are."""

    start = "schedule"

    def __call__(self, key, log_x0, tokens, step, schedule):
        return tokens


def teacher_config():
    config = tiny.get_config()
    # A third of the first tokens are masked, the others are any code.
    config.diffusion.keep, config.diffusion.mask = (0.99999, 0.000009), (0.000009, 0.3)
    config.sampling.num_steps, config.sampling.guidance_scale = 3, 1.0
    return config


@pytest.fixture(scope="module")
def teacher(untrained):
    return untrained(teacher_config())


@pytest.fixture
def given(monkeypatch):
    monkeypatch.setattr(distil, "CHUNK", 8)
    config = distil_config.get_config()
    config.distil.num_pairs, config.seed = 20, 5
    return config


def test_first_tokens_are_those_that_the_chain_began_with(teacher, given):
    made = distil._draw(teacher, PROMPTS, given, range(8, 16), {"rule": Stay()})
    np.testing.assert_array_equal(made["codes"], made["first"])
    masked = (made["first"] == 32).mean()
    assert 0.15 < masked < 0.45
    ids = ClipTokenizer(16).encode_batch(PROMPTS + [""])
    assert {row.tobytes() for row in made["text_ids"]} <= {row.tobytes() for row in ids}


def test_pairs_are_drawn_once_and_again_where_one_file_is_lost(teacher, given, tmp_path):
    where = str(tmp_path / "pairs")
    pairs = distil.draw_pairs(teacher, PROMPTS, given, where, "aa")
    assert pairs["codes"].shape == pairs["first"].shape == (20, 16)
    assert pairs["codes"].max() < 32 and len(np.unique(pairs["codes"])) > 4
    lost, kept = tmp_path / "pairs" / "pairs_00001.npz", tmp_path / "pairs" / "pairs_00000.npz"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    again = distil.draw_pairs(teacher, PROMPTS, given, where, "aa")
    jax.tree.map(np.testing.assert_array_equal, again, pairs)
    assert kept.stat().st_mtime_ns == before
    # Pairs of other settings, or of another teacher, are not mixed with these.
    with pytest.raises(UserError, match="guidance_scale.*use another --workdir"):
        distil.draw_pairs(teacher, PROMPTS, given, where, "aa", guidance_scale=(2.0,))
    with pytest.raises(UserError, match="teacher: .aa. -> .bb."):
        distil.draw_pairs(teacher, PROMPTS, given, where, "bb")
    lost.write_bytes(lost.read_bytes()[:100])
    with pytest.raises(UserError, match="pairs_00001.npz is damaged"):
        distil.draw_pairs(teacher, PROMPTS, given, where, "aa")


def test_tokens_between_the_ends_are_clean_as_often_as_the_schedule_says():
    noise_schedule = schedule.linear(10, 32, (0.99999, 0.000009), (0.000009, 0.3))
    x0, first = jnp.zeros((500, 16), jnp.int32), jnp.full((500, 16), 7, jnp.int32)
    t = jnp.arange(500) % 10 + 1
    x_t = np.asarray(objective.coupled_noise(jax.random.key(0), x0, first, t, noise_schedule))
    assert set(np.unique(x_t)) == {0, 7}
    clean = np.array([(x_t[np.asarray(t) == k] == 0).mean() for k in range(1, 11)])
    np.testing.assert_allclose(clean, noise_schedule.keep[1:], atol=0.06)
    assert clean[-1] == 0


def test_the_loss_is_the_cross_entropy_at_the_times_of_the_student():
    noise_schedule = schedule.linear(10, 4, (0.99999, 0.0), (0.000009, 0.3))
    x0 = jnp.asarray(np.random.default_rng(0).integers(0, 4, (6, 3)))
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3, 4)), jnp.float32)
    seen = []

    def predict(tokens, t):
        seen.append((np.asarray(tokens), np.asarray(t)))
        return logits

    times, first = np.array([10, 5]), jnp.full((6, 3), 4)
    value, accuracy = objective.rectified(
        jax.random.key(0), predict, x0, first, noise_schedule, times
    )
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.take_along_axis(log_p, np.asarray(x0)[..., None], -1).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(accuracy, (log_p.argmax(-1) == np.asarray(x0)).mean())
    tokens, t = seen[0]
    # Half of the images at each of the two times, and at the last one nothing is clean.
    assert sorted(t) == [5, 5, 5, 10, 10, 10]
    assert (tokens[t == 10] == 4).all() and (tokens[t == 5] != 4).any()


def test_a_student_reads_pictures_from_first_tokens(given):
    config = distil.student_config(teacher_config(), given, "models/teacher")
    config.training.init_from, config.distil.num_steps = "", 1
    config.training.learning_rate, config.training.warmup_steps = 5e-3, 1
    rng = np.random.default_rng(0)
    step = jax.jit(functools.partial(stage_two.train_step, config=config, loss=distil.loss))
    state, losses = jax.jit(lambda: stage_two.create_state(config))(), []
    text_ids = ClipTokenizer(16).encode_batch([""] * 32)
    for _ in range(60):
        first = rng.integers(0, 32, (32, 16)).astype(np.int32)
        batch = {"first": first, "codes": (first + 5) % 32, "text_ids": text_ids}
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    # In one step nothing but the first tokens says which code is right: log 32 without them.
    assert losses[0] > 3.4 and losses[-1] < 2.5
    # Importance sampling of the bound has no part in it.
    assert float(state.time_statistics.visits.sum()) == 0


def test_a_student_has_the_model_of_its_teacher_and_the_settings_that_are_given(given):
    given.distil.num_steps, given.training.batch_size = 2, 16
    config = distil.student_config(teacher_config(), given, "models/teacher")
    assert config.denoiser == teacher_config().denoiser
    assert config.diffusion == teacher_config().diffusion
    assert (config.sampling.num_steps, config.training.batch_size, config.seed) == (2, 16, 5)
    assert (config.sampling.rule, config.sampling.guidance_scale) == ("flow", 1.0)
    assert config.training.init_from == config.autoencoder.path == "models/teacher"
    given.training.init_from = "models/student"
    begun = distil.student_config(teacher_config(), given, "models/teacher")
    assert begun.training.init_from == "models/student"
    assert begun.autoencoder.path == "models/teacher"
    given.distil.num_steps = 11
    with pytest.raises(UserError, match="config.distil.num_steps=11: must not exceed the 10 times"):
        distil.student_config(teacher_config(), given, "models/teacher")


def test_a_teacher_becomes_a_student(teacher, given, tmp_path, call):
    teacher.save_pretrained(str(tmp_path / "teacher"))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = (
        "--mode=distil", "--config=configs/distil.py", f"--model={tmp_path}/teacher",
        f"--workdir={tmp_path}/student", f"--config.distil.prompts_path={tmp_path}/prompts.txt",
        "--config.distil.num_pairs=16", "--config.training.num_steps=3",
        "--config.training.batch_size=8", "--config.training.log_every=1",
        "--config.distil.num_steps=1", "--config.sampling.images_per_prompt=1", "--num_steps=2",
    )  # fmt: skip
    status, output = call(*flags)
    assert status == 0, output
    assert (tmp_path / "student" / "samples.png").exists()
    student = VQDiffusion.from_pretrained(str(tmp_path / "student"))
    assert isinstance(student.settings().rule, rules.Flow) and student.settings().num_steps == 1
    # It began from its teacher, and three steps change little.
    ours, theirs = (m._networks.params["denoiser"] for m in (student, teacher))
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, theirs)
    assert 0 < max(jax.tree.leaves(apart)) < 0.01
    status, output = call(*flags)
    assert status == 0 and "nothing is left to do" in output
    status, output = call(*flags, "--config.distil.num_steps=2")
    assert status == 1 and "another config (distil.num_steps: 1 -> 2)" in output
    status, output = call(*flags, "--seed=3")
    assert status == 1 and "--seed belongs to sampling; --config.seed here" in output
    status, output = call(*flags[:2], f"--workdir={tmp_path}/student")
    assert status == 1 and "--model is missing" in output
