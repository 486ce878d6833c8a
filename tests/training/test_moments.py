"""Matching moments: a teacher judges what a student draws."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import distil as distil_config
from configs import tiny
from vqd_jax.diffusion import objective, schedule
from vqd_jax.errors import UserError
from vqd_jax.interop import pretrained
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import distil, moments

# Two tokens of two codes, and a mask.
NUM_CODES, MASK = 2, 2
# Both codes are always the same, so that a token says all of the other.
JOINT = np.array([[0.4, 0.0], [0.0, 0.6]])
NOISE = schedule.linear(10, NUM_CODES, (0.99999, 0.000009), (0.000009, 0.3))
PAIRS = list(itertools.product(range(NUM_CODES + 1), repeat=2))


def posterior() -> np.ndarray:
    """p(x | x_t) of the joint law above by Bayes' rule: [T + 1, 3, 3, token, code]."""
    keep, mask, replace = (
        np.asarray(x, np.float64) for x in (NOISE.keep, NOISE.mask, NOISE.replace)
    )
    table = np.full((11, 3, 3, 2, NUM_CODES), 0.5)
    for t, (a, b) in itertools.product(range(1, 11), PAIRS):

        def likelihood(token, code, t=t):
            return mask[t] if token == MASK else replace[t] + keep[t] * (token == code)

        weights = JOINT * [[likelihood(a, i) * likelihood(b, j) for j in (0, 1)] for i in (0, 1)]
        weights /= weights.sum()
        table[t, a, b] = weights.sum(1), weights.sum(0)
    return table


def network(logits):
    """A table of logits [T + 1, 3, 3, token, code] as a network."""
    return lambda tokens, t: logits[t, tokens[:, 0], tokens[:, 1]]


def pictures(key, count):
    """Codes of the joint law, and the tokens at time T that a chain of them ends with."""
    key_code, key_noise = jax.random.split(key)
    codes = jax.random.bernoulli(key_code, JOINT[1, 1], (count, 1)).astype(jnp.int32)
    codes = jnp.broadcast_to(codes, (count, 2))
    return codes, objective.noise(key_noise, codes, jnp.full(count, 10), NOISE)


def losses(student, auxiliary, teacher, key, times, count=256):
    tables = (network(table) for table in (student, auxiliary, teacher))
    drawn = pictures(jax.random.fold_in(key, 1), count)
    return objective.matched(key, *tables, *drawn, NOISE, np.array(times))


@pytest.fixture(scope="module")
def true_logits():
    return jnp.log(jnp.asarray(posterior(), jnp.float32) + 1e-9)


def test_where_the_two_judges_agree_the_student_stays(true_logits):
    student = jnp.asarray(np.random.default_rng(0).normal(size=true_logits.shape), jnp.float32)

    def of_student(student):
        return losses(student, true_logits, true_logits, jax.random.key(3), [10, 5])[0]

    value, gradient = jax.value_and_grad(of_student)(student)
    assert value == 0 and not gradient.any()


def test_the_losses_are_the_cross_entropies_of_the_paper(true_logits):
    rng = np.random.default_rng(0)
    student, auxiliary = (
        jnp.asarray(rng.normal(size=true_logits.shape), jnp.float32) for _ in range(2)
    )
    seen = {}

    def watched(name, table):
        def call(tokens, t):
            seen[name] = np.asarray(tokens), np.asarray(t)
            return network(table)(tokens, t)

        return call

    key = jax.random.key(5)
    x0, first = pictures(jax.random.key(6), 4000)
    networks = watched("p", student), watched("r", auxiliary), watched("q", true_logits)
    found = objective.matched(key, *networks, x0, first, NOISE, np.array([10, 5]))
    (x_t, t), (x_s, s) = seen["p"], seen["q"]
    np.testing.assert_array_equal(seen["r"][0], x_s)
    # Each call of the student as often as the other, and x_s between it and the next call.
    assert set(t) == {5, 10} and abs((t == 5).mean() - 0.5) < 0.03
    assert set(s[t == 10]) == set(range(5, 11)) and set(s[t == 5]) == set(range(1, 6))
    # At time T the student sees nothing but the first tokens.
    np.testing.assert_array_equal(x_t[t == 10], np.asarray(first)[t == 10])

    def log_of(table, tokens, t):
        return np.asarray(jax.nn.log_softmax(network(table)(jnp.asarray(tokens), jnp.asarray(t))))

    log_p = log_of(student, x_t, t)
    log_r, log_q = (log_of(table, x_s, s) for table in (auxiliary, true_logits))
    cross = {
        name: -(np.exp(log_p) * log).sum(-1).mean() for name, log in (("q", log_q), ("r", log_r))
    }
    np.testing.assert_allclose(found[0], cross["q"] - cross["r"], rtol=1e-5)
    # The pairs cost what they do without a judge.
    of_pairs = -np.take_along_axis(log_p, np.asarray(x0)[..., None], -1).mean()
    np.testing.assert_allclose(found[2], of_pairs, rtol=1e-5)


def test_the_auxiliary_network_learns_what_the_student_drew(true_logits):
    # Next to nothing is noise up to time 9, so that x_s is what was drawn.
    keep, mask = np.array([1.0] + [1 - 1e-6] * 9 + [0.0]), np.array([0.0] + [1e-6] * 9 + [1.0])
    noise = schedule.Schedule(keep, np.zeros(11), mask, NUM_CODES)
    rng = np.random.default_rng(0)
    student, auxiliary = (
        jnp.asarray(rng.normal(size=true_logits.shape), jnp.float32) for _ in range(2)
    )
    seen = []

    def judge(tokens, t):
        seen.append((np.asarray(tokens), np.asarray(t)))
        return network(true_logits)(tokens, t)

    ends = pictures(jax.random.key(6), 300)
    key, times = jax.random.key(5), np.array([9])
    found = objective.matched(key, network(student), network(auxiliary), judge, *ends, noise, times)
    ((drawn, s),) = seen
    assert (drawn != MASK).all() and (drawn != np.asarray(ends[0])).any()
    log_r, log_q = (
        np.asarray(jax.nn.log_softmax(network(table)(drawn, s)))
        for table in (auxiliary, true_logits)
    )
    of_drawn = np.take_along_axis(log_r, drawn[..., None], -1)[..., 0]
    expected = -of_drawn - (np.exp(log_q) * log_r).sum(-1)
    np.testing.assert_allclose(found[1], expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("times", [[10], [10, 5]])
def test_a_student_of_one_step_learns_that_its_tokens_agree(true_logits, times):
    # The teacher cannot do that: in one step it draws each token alone.
    tables = {"student": true_logits, "auxiliary": true_logits}
    optimizer = optax.adam(0.03)

    @jax.jit
    def step(carry, key):
        tables, state = carry

        def total(tables):
            found = losses(tables["student"], tables["auxiliary"], true_logits, key, times)
            return found[0] + found[1]

        updates, state = optimizer.update(jax.grad(total)(tables), state)
        return (optax.apply_updates(tables, updates), state), tables["student"]

    keys = jax.random.split(jax.random.key(0), 1500)
    _, students = jax.lax.scan(step, (tables, optimizer.init(tables)), keys)
    p = np.asarray(jax.nn.softmax(students[-500::50, 10], axis=-1), np.float64)
    mask = float(NOISE.mask[10])
    prior = np.array([(1 - mask) / 2, (1 - mask) / 2, mask])
    shares = {"agree": 0.0, "first is 1": 0.0, "teacher": 0.0}
    for a, b in PAIRS:
        weight = prior[a] * prior[b]
        shares["agree"] += weight * (p[:, a, b, 0] * p[:, a, b, 1]).sum(-1).mean()
        shares["first is 1"] += weight * p[:, a, b, 0, 1].mean()
        alone = posterior()[10, a, b]
        shares["teacher"] += weight * (alone[0] * alone[1]).sum()
    assert shares["teacher"] == pytest.approx(0.4**2 + 0.6**2, abs=1e-4)
    # All masked, 9 % of the time, nothing tells which of the two it is to be. Adam's steps are not
    # small, and the tables move around what they should be.
    assert shares["agree"] > 0.9
    assert shares["first is 1"] == pytest.approx(0.6, abs=0.08)


@pytest.fixture
def command(untrained, tmp_path):
    """Flags that judge a student of an untrained teacher, and the teacher."""
    config = tiny.get_config()
    config.diffusion.keep, config.diffusion.mask = (0.99999, 0.000009), (0.000009, 0.3)
    teacher = untrained(config)
    teacher.save_pretrained(str(tmp_path / "teacher"))
    (tmp_path / "prompts.txt").write_text("red heart\na black cat\n")
    return teacher, (
        "--mode=distil", "--config=configs/distil.py", f"--model={tmp_path}/teacher",
        f"--config.distil.prompts_path={tmp_path}/prompts.txt",
        "--config.distil.num_pairs=16", "--config.training.batch_size=8",
        "--config.training.log_every=1", "--config.distil.num_steps=1", "--num_steps=2",
        "--config.sampling.images_per_prompt=1", "--config.distil.moment_weight=0.5",
        f"--workdir={tmp_path}/student",
    )  # fmt: skip


def test_a_judged_student(command, call, tmp_path):
    teacher, flags = command
    status, output = call(*flags, "--config.training.num_steps=2")
    assert status == 0, output
    assert "the judge of config.distil.moment_weight has none" in output
    student = VQDiffusion.from_pretrained(str(tmp_path / "student"))
    # It began from its teacher, and two steps change little.
    ours, theirs = (m._networks.params["denoiser"] for m in (student, teacher))
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, theirs)
    assert 0 < max(jax.tree.leaves(apart)) < 0.01
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if "train/loss" in line]
    assert len(logged) == 2
    for line in logged:
        parts = line["train/pairs"] + 0.5 * line["train/moments"]
        assert line["train/loss"] == pytest.approx(parts, rel=1e-6)
        assert line["train/auxiliary_gradient_norm"] > 0


def test_a_step_moves_two_networks_of_three():
    config = distil.student_config(tiny.get_config(), _given(), "models/teacher")
    config.training.init_from, config.distil.moment_weight = "", 0.5
    config.training.warmup_steps, config.training.gradient_accumulation = 0, 2
    state = jax.jit(moments.MatchedTask(config).create_state)()
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 32, (4, 16)).astype(np.int32) for name in ("codes", "first")}
    batch["text_ids"] = rng.integers(1, 400, (4, 16)).astype(np.int32)
    following, metrics = jax.jit(functools.partial(moments.train_step, config=config))(state, batch)

    def moved(before, after):
        apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
        return max(jax.tree.leaves(apart))

    assert moved(state.params, following.params) > 1e-5
    assert moved(state.auxiliary.params, following.auxiliary.params) > 1e-5
    assert moved(state.teacher, following.teacher) == 0
    # The three networks were one, and then the student and its judges agree.
    assert metrics["moments"] == pytest.approx(0, abs=1e-6)
    assert metrics["auxiliary_gradient_norm"] > 0.01


@pytest.mark.slow
def test_a_judged_student_goes_on_with_all_three_networks(command, call, tmp_path):
    flags = (*command[1], "--config.training.warmup_steps=1", "--config.training.save_every=2")
    runs = {"whole": (4,), "parted": (2, 4)}
    for name, counts in runs.items():
        for count in counts:
            # A run that stops early has the learning rates of the whole one.
            rate = "--config.training.final_learning_rate=1.0"
            steps = f"--config.training.num_steps={count}"
            status, output = call(*flags, rate, steps, f"--workdir={tmp_path}/{name}")
            assert status == 0, output
    assert "goes on from step 2" in output
    config = distil.student_config(tiny.get_config(), _given(), str(tmp_path / "teacher"))
    whole, parted = (pretrained.load_averaged(config, str(tmp_path / name)) for name in runs)
    jax.tree.map(np.testing.assert_array_equal, whole, parted)
    # A run can be a teacher, too.
    flags = (*flags, f"--model={tmp_path}/whole", f"--workdir={tmp_path}/pupil")
    status, output = call(*flags, "--config.training.num_steps=2")
    assert status == 0, output


def _given():
    return distil_config.get_config()


def test_adapters_have_no_part_in_it():
    given = _given()
    given.distil.moment_weight, given.training.adapter_rank = 0.5, 4
    given.training.init_from = "models/teacher"
    with pytest.raises(UserError, match="adapter_rank"):
        distil.student_config(tiny.get_config(), given, "models/teacher")
