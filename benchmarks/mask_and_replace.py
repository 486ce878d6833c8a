"""Should noise replace codes, or only mask them? Models that differ in nothing else, on shapes.

python benchmarks/mask_and_replace.py --workdir=DIR
python benchmarks/mask_and_replace.py --workdir=DIR --report --plot=FILE

One model for every replace mass and seed, all of the same size, trained for the same number of
steps on the same codes. Each is asked for its bits a token, for the share of wrong tokens that it
puts right, and for pictures of captions whose pair of colour and shape no training picture has,
with several rules and numbers of steps. What is right in them is counted, and their distance to the
true pictures of those captions measured: KID in the features of EfficientNet-Lite0, which the extra
``eval`` brings. Errors are standard errors over the seeds.

A training or a measurement that is finished is a file in DIR and is not done again. The report ends
with the minutes that they took.
"""

import functools
import itertools
from pathlib import Path

import attribute_accuracy
import jax
import jax.numpy as jnp
import numpy as np
import study
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.data import codes as codes_lib
from vqd_jax.diffusion import sampler, schedule
from vqd_jax.evaluation import distances, features, likelihood
from vqd_jax.interop import pretrained
from vqd_jax.models import conditioned
from vqd_jax.parallel import rows
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import stage_two

# The replace mass at time T, and config.diffusion.mask, the mask probabilities at times 1 and T,
# that express it. config.diffusion.keep is (0.99999, 0.000009) in every row, so all rows forget the
# picture at the same rate; what is neither kept nor masked is replaced, and the tables are straight
# lines between the end points. Hence 0 masks all that is not kept, 1 masks nothing, 1e-6 is
# ``released`` and has this mass at all times, and 0.1 is ``paper``, where the mass grows with time
# as it does in 0.05 and 0.2. (At time 1 it is 1e-6 there, and at T short of its name by 9e-6.)
MASKS = {
    "0": (0.00001, 0.999991),
    "1e-6": schedule.RELEASED_MASK,
    "0.05": (0.000009, 0.95),
    "0.1": schedule.PAPER_MASK,
    "0.2": (0.000009, 0.8),
    "1": (0.0, 0.0),
}
RULES = ("ordinary", "high_quality", "purity", "confidence", "remask")
STEPS = (10, 25, 50, 100)
# Rules that begin all masked, or hide tokens again, have no meaning where nothing is ever masked.
_WITHOUT_MASKS = ("ordinary",)
# The share of tokens that are exchanged, and where the chain that is to mend them begins (in T).
_WRONG = 0.1
_BEGINNINGS = (0.1, 0.25, 0.5, 0.75, 1.0)
_MENDING_STEPS = 10


def run_config(config: ConfigDict, mass: str, seed: int) -> ConfigDict:
    """The config of one model."""
    config = config.copy_and_resolve_references()
    config.seed = seed
    config.diffusion.schedule = "released"
    config.diffusion.keep = schedule.RELEASED_KEEP
    config.diffusion.mask = MASKS[mass]
    config_lib.validate(config)
    return config


def rules_of(mass: str, rules: list[str]) -> list[str]:
    """The rules that have a meaning with this replace mass."""
    return [rule for rule in rules if mass != "1" or rule in _WITHOUT_MASKS]


def folder_of(place: Path, mass: str, seed: int) -> Path:
    """The workdir of a model."""
    return place / f"mass_{mass}_seed_{seed}"


def train(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Trains one model and returns what the training itself measures at its end."""
    stage_two.train(config, str(workdir))
    last = study.metrics(workdir)
    return {f"{s} bits": last[f"{s}/bits_per_token"] for s in ("train", "validation")}


def seen(pictures: np.ndarray) -> np.ndarray:
    """Features of pictures uint8 [R, S, S, 3]: float32 [R, D]."""
    return rows.in_batches(net().features, pictures, 50)


@functools.cache
def net() -> features.FeatureNet:
    """The network that distances are measured with, read once."""
    return features.efficientnet_lite0()


@functools.cache
def true_features(count: int, size: int) -> np.ndarray:
    """Features of the pictures that the captions belong to."""
    scenes = attribute_accuracy.asked(count)[1]
    return seen(attribute_accuracy.true_pictures(scenes, size))


def judged(pictures: np.ndarray) -> dict[str, float]:
    """Of pictures uint8 [R, S, S, 3] of R captions: shares of what is right in them, and KID."""
    scenes = attribute_accuracy.asked(len(pictures))[1]
    found = attribute_accuracy.scores(pictures, scenes)
    shares = {name: float(mean) for name, (mean, _) in found.items()}
    true = true_features(*pictures.shape[:2])
    return shares | {"kid": float(distances.kid(seen(pictures), true).value)}


def draw_and_judge(model: VQDiffusion, rule: str, num_steps: int, count: int) -> dict[str, float]:
    """Draws a picture of each caption and judges them."""
    prompts = attribute_accuracy.asked(count)[0]
    made = model.generate(prompts, rule=rule, num_steps=num_steps, batch_size=count)
    return judged(made.pixels[:, 0])


def ceiling(model: VQDiffusion, count: int) -> dict[str, float]:
    """What the tokenizer allows: the true pictures after a pass through it, judged."""
    scenes = attribute_accuracy.asked(count)[1]
    real = attribute_accuracy.true_pictures(scenes, model.config.data.image_size)
    return judged(model.reconstruct(real))


def exchanged(key: jax.Array, codes: jax.Array, num_codes: int) -> tuple[jax.Array, jax.Array]:
    """Codes [B, N] with a tenth of each row's exchanged for others, and which, bool [B, N]."""
    key_place, key_code = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(key_place, codes.shape), axis=1)
    wrong = order < round(_WRONG * codes.shape[1])
    other = (codes + jax.random.randint(key_code, codes.shape, 1, num_codes)) % num_codes
    return jnp.where(wrong, other, codes), wrong


@functools.partial(jax.jit, static_argnames="sizes")
def mended(params, key, codes, conditions, noise, strength, *, sizes):
    """Wrong tokens of pictures, and what a model makes of them.

    Args:
      params: of the two networks.
      key: PRNG key.
      codes: int32 [B, N], of real pictures.
      conditions: int32 [B, L], their captions.
      noise: the schedule.
      strength: share of T at which the chain takes the pictures up; nothing is added to them.
      sizes: of the networks.

    Returns:
      Which tokens were exchanged, bool [B, N]; the likeliest codes after one call of the network,
      and the codes at the end of an ordinary chain, int32 [B, N] each.
    """
    key_wrong, key_chain = jax.random.split(key)
    given, wrong = exchanged(key_wrong, codes, noise.num_codes)
    predict = conditioned.bind(sizes, params).predictor(conditions)
    keys = jax.random.split(key_chain, len(codes))
    settings = sampler.Settings(initial=codes, strength=strength, num_steps=_MENDING_STEPS)
    chain, steps = sampler.begin(keys, codes.shape, noise, settings)
    chain = chain._replace(tokens=given)
    likeliest = predict(given, chain.start).argmax(-1)
    return wrong, likeliest, sampler.advance(keys, predict, chain, steps, noise, settings)[0].tokens


def self_correction(found: pretrained.Model, codes, conditions) -> dict[str, float]:
    """Shares of tokens, for every beginning: put right, spoilt, and right in the end.

    ``put right at once`` takes the likeliest codes of one call. With a replace mass of 0 no visible
    token ever changes, so nothing is put right by a chain.
    """
    sizes, noise = config_lib.model_config(found.config), config_lib.noise_schedule(found.config)
    table = {}
    for strength in _BEGINNINGS:
        parts = []
        for number, ((some, texts), count) in enumerate(rows.batches((codes, conditions), 64)):
            key = jax.random.fold_in(jax.random.key(0), number)
            made = mended(found.params, key, some, texts, noise, strength, sizes=sizes)
            wrong, *answers = (np.asarray(x)[:count] for x in made)
            parts.append((wrong, *(answer == some[:count] for answer in answers)))
        wrong, at_once, after = (np.concatenate(x) for x in zip(*parts, strict=True))
        table[f"{strength}"] = {
            "put right at once": float(at_once[wrong].mean()),
            "put right": float(after[wrong].mean()),
            "spoilt": float(1 - after[~wrong].mean()),
            "right": float(after.mean()),
        }
    return table


def measure(config: ConfigDict, flags) -> None:
    """Trains and measures all that is left to do; models of one replace mass share programs."""
    source = codes_lib.open_split(f"{config.data.codes}/validation")
    codes, conditions = likelihood.chosen(source, config.evaluation.num_images, "text")
    # Where its weights are missing, the study ends before it has trained.
    net()
    shared = {}
    # All masses once, and then again, so that what is there when it is stopped can be compared.
    for seed, mass in itertools.product(range(flags.seeds), flags.mass):
        workdir = folder_of(flags.workdir, mass, seed)
        of_run = run_config(config, mass, seed)
        study.once(workdir / "trained.json", functools.partial(train, of_run, workdir))
        found = pretrained.load_run(str(workdir))
        correct = functools.partial(self_correction, found, codes, conditions)
        study.once(workdir / "self_correction.json", correct)
        model = shared.setdefault(mass, VQDiffusion(*found)).with_params(found.params)
        study.once(_ceiling(flags), functools.partial(ceiling, model, flags.pictures))
        for rule in rules_of(mass, flags.rule):
            for steps in flags.steps:
                draw = functools.partial(draw_and_judge, model, rule, steps, flags.pictures)
                study.once(workdir / f"drawn_{rule}_{steps}.json", draw)
                print(f"{workdir.name}: {rule}, {steps} steps", flush=True)


def _ceiling(flags) -> Path:
    return flags.workdir / "ceiling" / "ceiling.json"


def kept(flags, mass: str, name: str) -> list[dict]:
    """What was measured of a mass under this name, one dict for each seed that has it."""
    paths = [folder_of(flags.workdir, mass, s) / f"{name}.json" for s in range(flags.seeds)]
    return [study.files.read_json(path, "remove it") for path in paths if path.exists()]


def plot(flags) -> None:
    """Draws the share of pictures in which everything is right, by rule, over the steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(flags.rule), figsize=(11, 2.8), sharex=True, sharey=True, squeeze=False
    )
    for axis, rule in zip(axes[0], flags.rule, strict=True):
        for mass in (mass for mass in flags.mass if rule in rules_of(mass, flags.rule)):
            runs = [kept(flags, mass, f"drawn_{rule}_{steps}") for steps in flags.steps]
            shares = [100 * np.array([drawn["all"] for drawn in of_steps]) for of_steps in runs]
            means = [share.mean() for share in shares]
            errors = [share.std(ddof=1) / np.sqrt(len(share)) for share in shares]
            axis.errorbar(flags.steps, means, errors, label=mass, capsize=2)
        axis.set(title=rule, xscale="log", xlabel="steps")
        axis.set_xticks(flags.steps, map(str, flags.steps))
        axis.minorticks_off()
    axes[0, 0].set_ylabel("everything right (%)")
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, title="replace mass", loc="center right", frameon=False)
    figure.savefig(flags.plot, dpi=80, bbox_inches="tight")


def report(flags) -> None:
    """Prints the tables of what is there."""
    lines = []
    for mass in flags.mass:
        trained, mending = kept(flags, mass, "trained"), kept(flags, mass, "self_correction")
        cells = [
            study.over_seeds([t[f"{s} bits"] for t in trained]) for s in ("validation", "train")
        ]
        # Where the chain begins is the choice of whoever mends, so each mass has its best one.
        best = max(_BEGINNINGS, key=lambda b: sum(m[f"{b}"]["right"] for m in mending))  # noqa: B023
        for name in ("put right at once", "put right", "spoilt", "right"):
            cells.append(study.over_seeds([m[f"{best}"][name] for m in mending], percent=True))
        lines.append([mass, len(trained), *cells, best if mending else "–"])
    study.print_table(
        f"Bits a token, and what becomes of pictures in which {_WRONG:.0%} of the tokens are wrong "
        "(%)",
        ["replace mass", "seeds", "bits, validation", "bits, train", "wrong put right at once",
         "wrong put right", "right spoilt", "right in the end", "chain from (T)"],
        lines,
    )  # fmt: skip
    for attribute in ("all", "colour", "shape", "size", "position", "count", "kid"):
        is_share, lines = attribute != "kid", []
        for mass in flags.mass:
            for rule in rules_of(mass, flags.rule):
                drawn = [kept(flags, mass, f"drawn_{rule}_{steps}") for steps in flags.steps]
                # A study may have been begun before distances were measured.
                values = [[d[attribute] for d in runs if attribute in d] for runs in drawn]
                lines.append([mass, rule, *(study.over_seeds(v, is_share) for v in values)])
        named = {"all": "Everything right (%)", "kid": "KID to the true pictures"}
        steps = [f"{steps} steps" for steps in flags.steps]
        what = named.get(attribute, f"{attribute.capitalize()} right (%)")
        study.print_table(what, ["replace mass", "rule", *steps], lines)
    if _ceiling(flags).exists():
        found = study.files.read_json(_ceiling(flags), "remove it")
        print(f"\nThe tokenizer allows {found['all']:.1%} right, and a KID of {found['kid']:.3f}")
    study.print_cost(flags.workdir, "trained", "self_correction", "drawn")


def main() -> None:
    parser = study.parser(__doc__.splitlines()[0])
    parser.add_argument("--mass", nargs="+", choices=tuple(MASKS), default=list(MASKS))
    parser.add_argument("--rule", nargs="+", default=list(RULES))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--plot", help="file for curves of what is all right; needs the extra docs")
    flags = parser.parse_args()
    if not flags.report:
        measure(study.begin(flags), flags)
    report(flags)
    if flags.plot:
        plot(flags)


if __name__ == "__main__":
    main()
