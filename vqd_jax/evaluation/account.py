"""The account of an evaluation: ``report.json``, ``report.html``, and the paragraph in
``protocol.txt`` that says how it was made, so that somebody else can check it.

Letters: N pictures, S image side.
"""

import datetime
import importlib.metadata
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from vqd_jax import files
from vqd_jax.data import images, sets
from vqd_jax.evaluation import ceiling, figures, measures, page
from vqd_jax.evaluation.distances import Estimate
from vqd_jax.evaluation.features import FeatureNet
from vqd_jax.evaluation.figures import Made, Measured, Request

_VERSIONS = ("vqd_jax", "jax", "jaxlib", "flax", "numpy", "scipy", "pillow")
# Pictures on the sheets: generated ones in a row and in all, prompts, suspects and neighbours.
_IN_ROW, _SHOWN, _PROMPTS, _SUSPECTS, _NEIGHBOURS = 12, 48, 8, 8, 6
# Generated pictures among which the most suspicious ones are looked for.
_SUSPECTED = 2000


def write(
    request: Request,
    nets: Sequence[FeatureNet],
    made: Sequence[Made],
    measured: Sequence[Measured],
    *,
    seed: int,
    started: float,
) -> None:
    """Writes the three files.

    Args:
      request: the evaluation.
      nets: the networks, in the order of ``measured``.
      made: the pictures of every setting.
      measured: what each network tells.
      seed: that decided the pictures.
      started: when, in seconds since 1970.
    """
    report = _facts(request, nets, made, seed)
    report["results"] = [
        {
            "setting": one.setting,
            "figures": {
                net.name: _plain(found.figures[k])
                for net, found in zip(nets, measured, strict=True)
            },
            "attributes": _plain(_attributes(request, one)),
        }
        for k, one in enumerate(made)
    ]
    report["ceiling"] = _ceiling(request, nets, measured)
    report["captions"] = _captions(request)
    report["paragraph"] = paragraph(report)
    report["time"] = {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
    }
    sheets = _sheets(request, made, measured)
    files.write_json(request.output / "report.json", report)
    files.write_text(request.output / "protocol.txt", f"{report['paragraph']}\n{_when(report)}\n")
    files.write_text(request.output / "report.html", page.render(report, sheets, _when(report)))


def _plain(value: Any) -> Any:
    """With an ``Estimate`` as {"value": ..., "error": ...}."""
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return value


def _facts(request, nets, made, seed) -> dict[str, Any]:
    plan, model = request.plan, request.model
    count = len(made[0].pictures)
    given = "pictures" in made[0].setting
    weighted = int(plan.weights.sum())
    return {
        "protocol": {
            "name": plan.name,
            "statement": plan.protocol.statement,
            "data_set": sets.source_fingerprint(request.builder),
            "prompt_split": plan.prompt_split,
            "reference_split": plan.reference_split,
            "num_generated": count,
            "num_real": len(plan.reference),
            "num_real_repeated": weighted,
            "num_prompts": len(plan.prompts),
            "image_size": request.config.data.image_size,
            "seed": None if given else seed,
            "statistics": request.config.evaluation.inception_statistics and "from a file",
        },
        "model": None if model is None else model.fingerprint(),
        "features": [{"name": net.name, "sha256": net.sha256, "width": net.width} for net in nets],
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS}
        | {"device": jax.devices()[0].device_kind},
    }


def paragraph(report: dict[str, Any]) -> str:
    """How the figures came about, in full; the time apart."""
    p = report["protocol"]
    drawn = "made by another program" if p["seed"] is None else f"drawn with seed {p['seed']}"
    model = report["model"]
    words = [
        f"Protocol {p['name']}: {p['statement']}.",
        f"{p['num_generated']:,} pictures of {p['image_size']} x {p['image_size']} pixels, "
        f"{drawn}, are compared with {p['num_real']:,} real ones "
        + (
            f"(repeated to {p['num_real_repeated']:,} for means and covariances) "
            if p["num_real_repeated"] != p["num_real"]
            else ""
        )
        + f"of the split {p['reference_split']!r} of {p['data_set']}; the {p['num_prompts']:,} "
        f"prompts are of the split {p['prompt_split']!r}. Real pictures are cut to the centred "
        "square and resized by Pillow's bicubic filter.",
    ]
    if model:
        words.append(f"The model's fingerprint is {model}.")
    words += [f"Setting {k}: {_setting(r['setting'])}." for k, r in enumerate(report["results"], 1)]
    nets = [
        f"{net['name']} ({net['width']} features, sha256 {net['sha256'] or 'none: no file'})"
        for net in report["features"]
    ]
    words.append(
        f"Features: {'; '.join(nets)}; the last number of a name is the side in pixels that the "
        "network sees, and it resizes uint8 pixels itself. Only a distance in the features of "
        "Inception is called FID."
    )
    if p["statistics"]:
        words.append("Inception's statistics of the real pictures are from a file.")
    words.append(
        f"Kernel distances take at most {measures.PAIRWISE:,} pictures of each kind and neighbours "
        f"at most {measures.NEIGHBOURS:,}, chosen without replacement. An error is the jackknife "
        "over ten groups of generated pictures."
    )
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    return " ".join([*words, f"Versions: {versions}."])


def _setting(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())


def _when(report) -> str:
    return f"Finished {report['time']['finished']} after {report['time']['seconds']} s."


def _objects(request, place: int) -> list[dict] | None:
    return measures.objects(request.records[int(place)]) if place >= 0 else None


def _attributes(request, one: Made) -> dict[str, Any]:
    if not request.config.data.name.startswith("shapes_text") or not one.prompts:
        return {}
    count = min(len(one.pictures), 2000)
    places = one.records[np.arange(count) % len(one.records)]
    known = {int(place): _objects(request, place) for place in dict.fromkeys(places.tolist())}
    return measures.attribute_shares(one.pictures, [known[int(place)] for place in places])


def _ceiling(request, nets, measured) -> dict[str, Any]:
    found = {
        "figures": {net.name: _plain(m.ceiling) for net, m in zip(nets, measured, strict=True)}
    }
    if request.model is None:
        return found
    real = figures.reconstructible(request)
    found["reconstruction"] = _plain(ceiling.of_reconstructions(request.model, real))
    in_pool, _ = figures.pool(request)
    if in_pool is not None and request.config.data.name.startswith("shapes_text"):
        passed = ceiling.reconstructed(request.model, in_pool, request.autoencoder_params)
        wanted = [_objects(request, place) for place in in_pool.places]
        found["attributes"] = _plain(measures.attribute_shares(passed, wanted))
    return found


def _captions(request) -> dict[str, Any]:
    if request.model is None or request.config.denoiser.condition == "none":
        return {}
    held_out = figures.held_out_pictures(request)
    if held_out is None:
        return {}
    some = held_out.first(request.config.evaluation.num_images)
    texts = [some.text(k) for k in range(len(some))]
    return ceiling.caption_gap(request.config, request.model, request.params, some, texts)


def _sheets(request, made, measured) -> dict[str, Image.Image]:
    """Pictures to look at, by their titles."""
    sheets = {}
    for k, one in enumerate(made, 1):
        pixels = one.pictures.read(range(min(_SHOWN, len(one.pictures))))
        tiles = [Image.fromarray(images.enlarge(image)) for image in pixels]
        rows = [tiles[i : i + _IN_ROW] for i in range(0, len(tiles), _IN_ROW)]
        sheets[f"The first pictures of setting {k}"] = images.tiled(rows)
    first = made[0]
    if first.prompts:
        rows = range(min(len(first.records), len(first.pictures)))
        rows = [k for k in rows if first.records[k] >= 0][:_PROMPTS]
        if rows:
            places = first.records[rows]
            real = figures.real_pictures(request, request.plan.prompt_split, places)
            pairs = np.stack([real.read(range(len(rows))), first.pictures.read(rows)], axis=1)
            labels = [first.prompts[k] for k in rows]
            sheets["Real picture, and what was drawn from its caption"] = images.grid(pairs, labels)
    if measured and measured[0].copies is not None:
        title = "Generated pictures most like a training picture, and their nearest ones"
        sheets[title] = _suspects(request, first, measured[0])
    return sheets


def _suspects(request, first: Made, measured: Measured) -> Image.Image:
    """The generated pictures nearest to a training picture, each with its nearest ones."""
    stored = measured.made[0]
    count = min(len(stored), _SUSPECTED)
    features = stored.take(np.arange(count))
    near, ratios = measured.copies.neighbours(features, _NEIGHBOURS)
    chosen = np.argsort(ratios, kind="stable")[:_SUSPECTS]
    training = figures.training_pictures(request)
    rows = [
        np.concatenate([first.pictures.read([k]), training.read(near[k])]) for k in chosen.tolist()
    ]
    labels = [
        f"{ratios[k]:.2f} of the distance between training pictures"
        + (f": {first.prompts[k % len(first.prompts)]}" if first.prompts else "")
        for k in chosen.tolist()
    ]
    return images.grid(np.stack(rows), labels)
