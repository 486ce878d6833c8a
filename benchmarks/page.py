"""What the page costs, and whether a crowd gets what it asked for.

python benchmarks/page.py --model=MODEL --part=speed
python benchmarks/page.py --model=MODEL --part=crowd
python benchmarks/page.py --model=MODEL --part=masks

speed: seconds from the click to the first preview and to the picture, in Debian's chromium, beside
those of ``generate``; the two take turns. crowd: eight visitors with fifty requests each, of which
some are cancelled and some are malformed; every answer is compared with that of ``generate``.
masks: 200 random masks through the API; no token outside of a mask may change.

A workdir of a run is a model, too. Needs the extras "web" and, for speed, "test".
"""

import argparse
import collections
import concurrent.futures
import contextlib
import pathlib
import random
import resource
import shutil
import statistics
import sys
import threading
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
VISITORS, REQUESTS, STEPS = 8, 50, 25
PROMPTS = (
    "a large red circle in the centre, white background",
    "a small blue star at the top left, pale pink background",
    "",
    "a large green square on the left, grey background",
)
# Times are measured in the browser, from the click to when the words are there.
CLICK = """pictures => new Promise(done => {
  const status = document.querySelector('[data-part=status]');
  const begin = performance.now(), seen = {};
  const watch = new MutationObserver(() => {
    const text = status.textContent, now = (performance.now() - begin) / 1000;
    if (/step/.test(text) && !seen.preview) seen.preview = now;
    if (/^Made/.test(text)) { watch.disconnect(); done({...seen, picture: now}); }
  });
  watch.observe(status, {childList: true, characterData: true, subtree: true});
  document.querySelector('#generate').click();
})"""


@contextlib.contextmanager
def served(model):
    """The address of the page, in this process."""
    import uvicorn

    from vqd_jax.web import server, work

    engine = work.engine(model)
    work.prepare(model, engine)
    listener = server.listen("127.0.0.1", 0)
    app = server.application(model, engine, {"127.0.0.1"})
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    while not running.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
        engine.close()


def speed(model, url, repeats):
    """Prints the medians of both sides, and of their ratio."""
    from playwright.sync_api import sync_playwright

    found = collections.defaultdict(list)
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.goto(url)
        page.fill("#prompt textarea", PROMPTS[0])
        for pictures in (1, 4):
            page.locator("#num_images input[type=number]").fill(str(pictures))
            page.locator("#num_images input[type=number]").press("Tab")
            page.wait_for_timeout(500)
            for repeat in range(repeats + 1):
                seen = page.evaluate(CLICK)
                begin = time.perf_counter()
                model.generate([PROMPTS[0]], num_images=pictures, seed=repeat)
                alone = time.perf_counter() - begin
                if repeat:
                    found[pictures].append((seen["preview"], seen["picture"], alone))
        browser.close()
    for pictures, times in found.items():
        preview, picture, alone = (statistics.median(x) for x in zip(*times, strict=True))
        ratio = statistics.median(b / c for _, b, c in times)
        print(
            f"{pictures} picture(s), medians of {repeats}: first preview after {preview:.2f} s, "
            f"picture after {picture:.2f} s; generate {alone:.2f} s; ratio {ratio:.2f}"
        )


def ask(client, fields, fate, waits):
    """(what became of a request, its answer)."""
    job = client.submit(**fields, api_name="/generate")
    if fate == "cancelled":
        time.sleep(waits)
        job.cancel()
        return "cancelled", None
    try:
        return "answered", job.result(600)
    except Exception as error:
        return "refused", str(error)


def visit(url, number, wishes):
    """Fifty requests of a visitor, one after the other: a cancel ends all that a client runs."""
    from gradio_client import Client

    client, draw, told = Client(url, verbose=False), random.Random(number), []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        jobs = []
        for _ in range(REQUESTS):
            fate = draw.choices(("answered", "cancelled", "malformed"), (7, 2, 1))[0]
            fields = draw.choice(wishes)
            if fate == "malformed":
                fields = fields | draw.choice(
                    [{"seed": -1}, {"rule": "luck"}, {"known": [1]}, {"prompt": "x" * 999}]
                )
            jobs.append((fate, fields, pool.submit(ask, client, fields, fate, draw.random())))
        for fate, fields, job in jobs:
            told.append((fate, fields, *job.result()))
    return told


def memory():
    """Resident MiB of this process now."""
    for line in open("/proc/self/status", encoding="ascii"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def crowd(model, url):
    """Prints what became of all requests, how many codes differ, and the memory."""
    steps = min(STEPS, model.config.diffusion.num_steps)
    wishes = [
        {"prompt": prompt, "seed": seed, "num_images": count, "num_steps": steps}
        for seed, prompt in enumerate(PROMPTS)
        for count in (1, 2, 4)
    ]
    sizes = []
    for turn in range(3):
        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(VISITORS) as pool:
            visits = [
                pool.submit(visit, url, VISITORS * turn + number, wishes)
                for number in range(VISITORS)
            ]
            told = [one for visit in visits for one in visit.result()]
        seconds = time.perf_counter() - begin
        sizes.append(memory())
        fates = collections.Counter((fate, outcome) for fate, _, outcome, _ in told)
        print(f"crowd {turn + 1}: {seconds:.0f} s, {sizes[-1]:.0f} MiB;", end=" ")
        print(", ".join(f"{a} {b} {n}" for (a, b), n in sorted(fates.items())), flush=True)
        compare(model, wishes, told)


def compare(model, wishes, told):
    """Prints how the answers differ from what ``generate`` makes of the same request alone."""
    alone = {}
    for fields in wishes:
        options = {name: value for name, value in fields.items() if name != "prompt"}
        made = model.generate([fields["prompt"]], **options)
        alone[fields["prompt"], fields["num_images"]] = made.codes[0]
    pictures = equal = tokens = 0
    for fate, fields, outcome, answer in told:
        if outcome != "answered":
            continue
        assert fate == "answered", (fate, fields)
        codes = np.array(answer["codes"])
        expected = alone[fields["prompt"], fields["num_images"]]
        same = (codes == expected).all(axis=1)
        pictures, equal = pictures + len(same), equal + same.sum()
        tokens += (codes != expected).sum()
    print(f"  {equal} of {pictures} pictures are those of generate; {tokens} tokens differ")


def masks(model, url):
    """Prints how many tokens changed inside and outside of 200 random masks."""
    from gradio_client import Client

    from vqd_jax.web import form

    client, draw = Client(url, verbose=False), np.random.default_rng(0)
    size, mask = form.num_tokens(model), form.num_codes(model)
    base = np.array(client.predict(prompt=PROMPTS[0], num_images=4, api_name="/generate")["codes"])
    taken = draw.random((200, size)) < draw.random((200, 1))
    taken[~taken.any(axis=1), 0] = True
    codes = base[np.arange(200) % 4]

    def paint(number):
        known = np.where(taken[number], mask, codes[number]).tolist()
        fields = {"prompt": PROMPTS[number % 4], "seed": number, "num_steps": STEPS}
        return client.predict(**fields, known=known, api_name="/generate")["codes"][0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = np.array(list(pool.map(paint, range(200))))
    changed = made != codes
    print(
        f"200 masks: {changed[~taken].sum()} of {(~taken).sum():,} tokens outside changed, "
        f"{changed[taken].sum():,} of {taken.sum():,} inside"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="model folder, or workdir of a run")
    parser.add_argument("--part", required=True, choices=["speed", "crowd", "masks"])
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from vqd_jax.pipeline import VQDiffusion

    model = VQDiffusion.from_pretrained(given.model)
    with served(model) as url:
        if given.part == "speed":
            speed(model, url, given.repeats)
        else:
            globals()[given.part](model, url)


if __name__ == "__main__":
    main()
