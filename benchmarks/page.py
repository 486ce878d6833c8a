"""What the page costs, and whether a crowd gets what it asked for.

python benchmarks/page.py --model=MODEL --part=speed
python benchmarks/page.py --model=MODEL --part=crowd
python benchmarks/page.py --model=MODEL --part=masks

speed: seconds from the click to the first preview and to the picture, in Debian's chromium, and
from a program's call, beside those of ``generate`` with the same settings; the three take turns.
crowd: turns of eight visitors, whose requests are partly cancelled and partly malformed; every
answer is compared with that of ``generate``, and the server's memory is told after every turn.
masks: 200 random masks through the API; no token outside of a mask may change.

The server is a process of its own. A workdir of a run is a model, too. Needs Linux and the extras
"web" and, for speed, "test".
"""

import argparse
import collections
import concurrent.futures
import contextlib
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
VISITORS, STEPS = 8, 25
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
    """The address of the page, and the id of its process; ``model`` is a folder or "emoji"."""
    command = [sys.executable, "-m", "vqd_jax.main", "--mode=serve", f"--model={model}", "--port=0"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    try:
        said = []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"ready: (http\S+)", line):
                break
        else:
            sys.exit("".join(said))
        # A pipe that nobody reads would stop the server.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield found[1], server.pid
    finally:
        server.terminate()
        server.wait()


def memory(process):
    """Resident MiB of a process now."""
    with open(f"/proc/{process}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def made_alone(model, fields):
    """What ``generate`` makes of the fields of a request."""
    options = {name: value for name, value in fields.items() if name != "prompt"}
    return model.generate([fields["prompt"]], **options)


def clicked(page, pictures):
    """Seconds from the click to the first preview and to the pictures."""
    number = page.locator("#num_images input[type=number]")
    if number.input_value() != str(pictures):
        number.fill(str(pictures))
        number.press("Tab")
        page.wait_for_timeout(500)
    seen = page.evaluate(CLICK)
    return seen["preview"], seen["picture"]


def called(client, fields):
    """Seconds from a program's call to the first preview and to the pictures."""
    begin = time.perf_counter()
    job = client.submit(**fields, api_name="/generate")
    next(iter(job))
    preview = time.perf_counter() - begin
    job.result()
    return preview, time.perf_counter() - begin


def speed(model, url, repeats):
    """Prints the medians of the page, of the API and of ``generate``, and of their ratios."""
    from gradio_client import Client
    from playwright.sync_api import sync_playwright

    client = Client(url, verbose=False)
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.goto(url)
        page.fill("#prompt textarea", PROMPTS[0])
        for pictures in (1, 4):
            times = []
            for repeat in range(repeats + 1):
                fields = {"prompt": PROMPTS[0], "num_images": pictures, "seed": repeat}
                here = [*clicked(page, pictures), *called(client, fields)]
                begin = time.perf_counter()
                made_alone(model, fields)
                times.append((*here, time.perf_counter() - begin))
            # The first of each may compile.
            tell_speed(pictures, np.array(times[1:]))
        browser.close()


def tell_speed(pictures, times):
    """Prints the medians of times [repeats, 5]: two of the page, two of the API, one alone."""
    middle, ratios = np.median(times, axis=0), np.median(times / times[:, -1:], axis=0)
    print(f"{pictures} picture(s), medians of {len(times)}: generate {middle[-1]:.2f} s", end="")
    for name, at in (("page", 0), ("API", 2)):
        print(
            f"; {name} {middle[at]:.2f} s to the first preview, {middle[at + 1]:.2f} s to the "
            f"picture, ratio {ratios[at + 1]:.2f}",
            end="",
        )
    print(flush=True)


def ask(client, fields, fate, waits):
    """(what became of a request, its answer)."""
    request_id = str(uuid.uuid4())
    job = client.submit(**fields, request_id=request_id, api_name="/generate")
    if fate == "cancelled":
        time.sleep(waits)
        client.predict(request_id=request_id, api_name="/cancel")
    try:
        return "answered", job.result(600)
    except Exception as error:
        return "cancelled" if "was cancelled" in str(error) else "refused", str(error)


def visit(url, seed, wishes, count):
    """(fate, fields, outcome, answer) of so many requests of a visitor, two at a time."""
    from gradio_client import Client

    client, draw, asked = Client(url, verbose=False), random.Random(seed), []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(count):
            fate = draw.choices(("answered", "cancelled", "malformed"), (7, 2, 1))[0]
            fields = draw.choice(wishes)
            if fate == "malformed":
                fields = fields | draw.choice(
                    [{"seed": -1}, {"rule": "luck"}, {"known": [1]}, {"prompt": "x" * 999}]
                )
            asked.append((fate, fields, pool.submit(ask, client, fields, fate, draw.random())))
        return [(fate, fields, *job.result()) for fate, fields, job in asked]


def crowd(model, url, process, turns, requests):
    """Prints what became of all requests, how many codes differ, and the memory of the server."""
    steps = min(STEPS, model.config.diffusion.num_steps)
    wishes = [
        {"prompt": prompt, "seed": seed, "num_images": count, "num_steps": steps}
        for seed, prompt in enumerate(PROMPTS)
        for count in (1, 2, 4)
    ]
    alone = {(w["prompt"], w["num_images"]): made_alone(model, w).codes[0] for w in wishes}
    print(f"before: {memory(process):.0f} MiB", flush=True)
    for turn in range(turns):
        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(VISITORS) as pool:
            visits = [
                pool.submit(visit, url, VISITORS * turn + number, wishes, requests)
                for number in range(VISITORS)
            ]
            told = [one for visit in visits for one in visit.result()]
        seconds = time.perf_counter() - begin
        fates = collections.Counter((fate, outcome) for fate, _, outcome, _ in told)
        print(f"crowd {turn + 1}: {seconds:.0f} s, {memory(process):.0f} MiB;", end=" ")
        print(", ".join(f"{a} {b} {n}" for (a, b), n in sorted(fates.items())))
        compare(alone, told)


def compare(alone, told):
    """Prints how the answers differ from what ``generate`` makes of the same request alone."""
    pictures = equal = tokens = 0
    for fate, fields, outcome, answer in told:
        if outcome != "answered":
            continue
        assert fate != "malformed", fields
        codes = np.array(answer["codes"])
        expected = alone[fields["prompt"], fields["num_images"]]
        same = (codes == expected).all(axis=1)
        pictures, equal = pictures + len(same), equal + same.sum()
        tokens += (codes != expected).sum()
    print(
        f"  {equal} of {pictures} pictures are those of generate; {tokens} tokens differ",
        flush=True,
    )


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
    parser.add_argument("--repeats", type=int, default=10, help="of speed, or turns of crowd")
    parser.add_argument("--requests", type=int, default=50, help="of a visitor in a turn of crowd")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from vqd_jax.pipeline import VQDiffusion

    model = VQDiffusion.from_pretrained(given.model)
    with served(given.model) as (url, process):
        if given.part == "speed":
            speed(model, url, given.repeats)
        elif given.part == "crowd":
            crowd(model, url, process, given.repeats, given.requests)
        else:
            masks(model, url)


if __name__ == "__main__":
    main()
