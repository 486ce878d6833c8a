"""One evaluation through the command line: what it writes, what it does not do twice, mistakes."""

import json
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from vqd_jax.errors import UserError
from vqd_jax.evaluation import evaluate, page
from vqd_jax.evaluation.pictures import FolderPictures

FLAGS = (
    "--config=configs/tiny.py", "--config.evaluation.features=random",
    "--config.evaluation.features_side=8", "--config.evaluation.num_generated=64",
    "--config.evaluation.metrics=('kid','neighbours','copies','retrieval')",
    "--config.evaluation.protocol=held_out", "--mode=evaluate",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    where = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(str(where / "model"))
    return where


@pytest.fixture
def evaluated(folder, call):
    """Evaluates two settings, and gives the status and the log; the first time is done."""

    def run(*more):
        return call(
            *FLAGS, f"--model={folder}/model", f"--output={folder}/out", "--sweep=num_steps=2,3",
            "--seed=1", *more,
        )  # fmt: skip

    if not (folder / "out" / "report.json").exists():
        status, log = run()
        assert status == 0, log
    return run


def read(folder):
    return json.loads((folder / "out" / "report.json").read_text())


def without_time(folder):
    report = (folder / "out" / "report.json").read_text()
    assert json.loads(report)["time"]["seconds"] > 0
    page_text = (folder / "out" / "report.html").read_text()
    protocol = (folder / "out" / "protocol.txt").read_text()
    return (
        re.sub(r'"time": \{[^}]*\}', "", report),
        *(re.sub(r"Finished \S+ after \S+ s\.", "", text) for text in (page_text, protocol)),
    )


def test_the_report_has_every_part(evaluated, folder):
    report = read(folder)
    assert report["protocol"]["name"] == "held_out, 64 of 176 pictures"
    assert report["protocol"]["num_real"] == 176 and report["protocol"]["seed"] == 1
    assert [r["setting"]["num_steps"] for r in report["results"]] == [2, 3]
    figures = report["results"][0]["figures"]["random-0-8"]
    wanted = {"kid", "precision", "recall", "density", "coverage", "copies", "copies_held_out"}
    assert wanted | {"retrieval_1", "retrieval_5"} == figures.keys()
    # An untrained model is worse than real pictures through its autoencoder, by far.
    assert figures["kid"]["value"] > 5 * figures["kid"]["error"] > 0
    # 176 real pictures to retrieve from: chance is 0.6 %.
    assert figures["retrieval_1"]["value"] < 0.1
    assert 0.1 < figures["copies_held_out"]["value"] < 0.6
    ceiling = report["ceiling"]
    assert ceiling["figures"]["random-0-8"]["kid"]["value"] > 0
    assert 0 < ceiling["reconstruction"]["psnr"]["value"] < 100
    assert ceiling["reconstruction"]["codes_used"] <= ceiling["reconstruction"]["codes"] == 32
    assert report["captions"]["bits_per_token"] > 0
    for word in (report["model"], "seed 1", "num steps 3", "random-0-8", "jax 0."):
        assert word in report["paragraph"]
    html = (folder / "out" / "report.html").read_text()
    assert html.count("<svg") > 5 and html.count("data:image/png") == 4
    # Nothing is fetched: the only address is the name of the format.
    assert set(re.findall(r"https?://[^\"<]*", html)) == {"http://www.w3.org/2000/svg"}
    words = re.sub('data:[^"]*', "", html).replace("is called FID", "")
    assert "<script" not in words and "FID" not in words


@pytest.mark.slow
def test_what_is_cut_off_is_made_again_and_the_report_is_the_same(evaluated, folder):
    before = without_time(folder)
    pictures = sorted((folder / "out").glob("pictures/*/*.png"))
    features = sorted((folder / "out").glob("features/*/*.npy"))
    assert len(pictures) == 128
    for path in [*pictures[40:90], *features[::2]]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in [*pictures[:40], *features[1::2]]}
    # What a kill in the middle of a file leaves.
    shutil.copy(pictures[0], pictures[0].with_name(".tmp-0-00000050.png"))
    for name in ("report.json", "report.html", "protocol.txt"):
        (folder / "out" / name).unlink()
    status, log = evaluated()
    assert status == 0, log
    assert without_time(folder) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
def test_a_killed_evaluation_ends_as_one_never_interrupted(evaluated, folder, start, tmp_path):
    flags = (f"--model={folder}/model", f"--output={tmp_path}/out", "--sweep=num_steps=2,3")

    def begin():
        return start(*FLAGS, *flags, "--seed=1")

    for pattern, count in (("pictures/*/*.png", 1), ("features/*/*.npy", 1), ("pictures/*/*", 80)):
        process = begin()
        while len(list((tmp_path / "out").glob(pattern))) < count:
            assert process.poll() is None, f"never saw {pattern}: {process.communicate()[0]}"
            time.sleep(0.002)
        process.kill()
        process.communicate()
    process = begin()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert without_time(tmp_path) == without_time(folder)


def test_pictures_of_another_program(evaluated, folder, call, tmp_path):
    made = next((folder / "out" / "pictures").iterdir())
    prompts = (made / "prompts.txt").read_text().splitlines()
    shutil.copytree(made, tmp_path / "given", ignore=shutil.ignore_patterns("*.json", "*.txt"))
    rows = [{"file_name": f"{k:08d}.png", "text": text} for k, text in enumerate(prompts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "given" / "metadata.jsonl").write_text(lines)
    flags = (f"--pictures={tmp_path}/given", f"--output={tmp_path}/out")
    cache = f"--config.evaluation.cache={folder}/out/features"
    status, log = call(*FLAGS, *flags, cache)
    assert status == 0, log
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (result,), (own, _) = report["results"], read(folder)["results"]
    # The folder begins with one of the two settings.
    own = own if made.name.startswith("ordinary_2") else read(folder)["results"][1]
    assert result["figures"] == own["figures"]
    assert report["model"] is None and "made by another program" in report["paragraph"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pictures=PATH/empty"], "has no picture"),
        (["--pictures=PATH/no"], "is not a folder of pictures"),
        (["--pictures=PATH/small"], "has 8 x 8 pixels; the real pictures have 16 x 16"),
        (["--pictures=PATH/told"], "metadata.jsonl:1: must be an object with file_name"),
        ([], "--model=MODEL is missing"),
        (["--sweep=steps=3", "--model=MODEL"], "give each of num_steps, rule"),
        (["--sweep=num_steps=x", "--model=MODEL"], "--sweep=num_steps=x: invalid literal"),
        (["--sweep=num_steps=99", "--model=MODEL"], "99"),
        (
            ["--model=MODEL", "--config.evaluation.metrics=('frechet',)"],
            "64 generated pictures are too few for a covariance of 512 features",
        ),
        (
            ["--model=MODEL", "--config.evaluation.features=mobilenet",
             "--config.evaluation.features_path=PATH/no.pt"],
            "no.pt is not a file",
        ),
        (["--model=MODEL", "--config.evaluation.inception=PATH/wrong.pth"], "should have 6726825d"),
        (["--model=MODEL", "--config.evaluation.clip=PATH/empty"], "is not a model folder"),
        (["--model=MODEL", "--config.evaluation.protocol=coco"], "is not one of the data set"),
        (["--model=MODEL", "--config.data.image_size=32"], "makes pictures of 16 pixels"),
        (["--num_images=3"], "--config.evaluation.num_generated"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder, call, tmp_path, flags, message):
    for name in ("empty", "small", "told"):
        (tmp_path / name).mkdir()
    for name, size in (("small", (8, 8)), ("told", (16, 16))):
        Image.new("RGB", size).save(tmp_path / name / "a.png")
    (tmp_path / "told" / "metadata.jsonl").write_text('{"file": "a.png"}\n')
    (tmp_path / "wrong.pth").write_bytes(b"something else")
    flags = [f.replace("PATH", str(tmp_path)).replace("MODEL", f"{folder}/model") for f in flags]
    status, log = call(*FLAGS, f"--output={tmp_path}/out", *flags)
    (line,) = [line for line in log.splitlines() if line.startswith("error:")]
    assert status == 1 and message in line, log
    assert not list((tmp_path / "out").glob("pictures/*")) if (tmp_path / "out").exists() else True


def test_another_size_is_refused_when_the_folder_is_opened(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has 8 x 8 pixels"):
        FolderPictures(tmp_path, 16)


def test_a_sweep_is_read():
    found = evaluate.read_sweep(["num_steps=10, 25,10", "rule=purity,ordinary"])
    assert found == {"num_steps": [10, 25], "rule": ["purity", "ordinary"]}
    with pytest.raises(UserError, match="once"):
        evaluate.read_sweep(["num_steps=1", "num_steps=2"])


def test_a_report_says_how_pictures_were_drawn(tiny_model):
    config = tiny_model.config
    shown = evaluate._shown(config, {"guidance_scale": (5.0,), "guidance_ramp": False, "top_k": 3})
    assert shown == {
        "rule": "ordinary", "num_steps": 10, "guidance_scale": 5.0, "truncation": 0.9, "top_k": 3,
    }  # fmt: skip
    shown = evaluate._shown(config, {"times": (0, 5, 10), "rule": "purity"})
    assert shown["times"] == [0, 5, 10] and "num_steps" not in shown


def test_curves_join_settings_that_differ_in_one_axis():
    settings = [{"num_steps": n, "truncation": t} for n in (10, 100) for t in (0.8, 1.0)]
    results = [(s, {"kid": {"value": k + 1.0, "error": 0.1}}) for k, s in enumerate(settings)]
    lines = page._lines(results, "num_steps", "kid", 1.0)
    assert [line.label for line in lines] == ["truncation 0.8", "truncation 1.0"]
    assert lines[0].points == [(10, 1.0, 0.1), (100, 3.0, 0.1)]
    assert page.curves(results).count("<svg") == 2


def test_given_pictures_are_known_by_their_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pixels = np.full((16, 16, 3), 7, np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / f"{name}.png")
    first, second = (FolderPictures(tmp_path / name, 16) for name in ("a", "b"))
    assert first.identity == second.identity and first.prompts is None
    np.testing.assert_array_equal(first.read([0]), 7)
