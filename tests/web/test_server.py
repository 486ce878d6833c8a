"""What programs may ask of the page, and what nobody may."""

import concurrent.futures
import gc
import http.client
import json
import re
import runpy
import time
import uuid
from pathlib import Path

import httpx
import numpy as np
import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

PROMPTS = ("red heart", "a black cat", "", "rocket")


@pytest.fixture(scope="module")
def client(page_url):
    from gradio_client import Client

    # A machine that is busy may take long to answer.
    return Client(page_url, verbose=False, httpx_kwargs={"timeout": 60})


def post(page_url, path, body, **kwargs):
    return httpx.post(page_url + path, json=body, timeout=60, **kwargs)


def generate(client, **fields):
    return client.predict(**fields, api_name="/generate")


def test_requests_that_run_together_get_what_they_get_alone(client, web_model):
    """Also with another number of rows: the codes are equal to those of ``generate``."""
    requests = [
        {"prompt": prompt, "seed": seed, "num_images": count, "num_steps": 20}
        for seed, (prompt, count) in enumerate(zip(PROMPTS * 2, (1, 2, 3, 1) * 2, strict=True))
    ]
    jobs = [client.submit(**request, api_name="/generate") for request in requests]
    for request, job in zip(requests, jobs, strict=True):
        answer = job.result(60)
        options = {name: value for name, value in request.items() if name != "prompt"}
        alone = web_model.generate([request["prompt"]], **options)
        np.testing.assert_array_equal(answer["codes"], alone.codes[0])
        assert answer["request"]["prompt"] == request["prompt"] and answer["is_over"]


def test_previews_come_before_the_answer(client):
    job = client.submit(prompt="a", num_steps=20, api_name="/generate")
    last = job.result(60)
    steps = [answer["step"] for answer in job.outputs()]
    # One at the first chance, and others where it takes longer than the time between two.
    assert steps[0] == 5 and steps == sorted(set(steps)) and steps[-1] == last["step"] == 20
    hidden = [np.sum(np.array(answer["codes"]) == 32) for answer in job.outputs()]
    assert hidden[0] > hidden[-1] == 0 and hidden == sorted(hidden, reverse=True)


@pytest.mark.slow
def test_one_of_two_requests_of_a_client_is_cancelled(client, web_model):
    """The other one, which may run in the same batch, has the pictures of ``generate``."""
    options = {"seed": 3, "num_images": 2, "num_steps": 500}
    # On a machine that is busy the request may be over before the cancel arrives.
    for _ in range(5):
        ids = [str(uuid.uuid4()) for _ in range(2)]
        ended, stays = (
            client.submit(prompt=prompt, request_id=id, **options, api_name="/generate")
            for prompt, id in zip(PROMPTS, ids, strict=False)
        )
        while not ended.outputs() and not ended.done():
            time.sleep(0.02)
        if client.predict(request_id=ids[0], api_name="/cancel") == {"cancelled": 1}:
            break
    else:
        pytest.fail("no request was cancelled")
    with pytest.raises(Exception, match="it was cancelled"):
        ended.result(60)
    assert ended.outputs()[-1]["step"] < 500
    alone = web_model.generate([PROMPTS[1]], **options)
    np.testing.assert_array_equal(stays.result(60)["codes"], alone.codes[0])
    for id in (*ids, str(uuid.uuid4())):
        assert client.predict(request_id=id, api_name="/cancel") == {"cancelled": 0}


def test_plain_http_cancels_too(page_url):
    path, request_id = "/gradio_api/call/v2/", {"request_id": str(uuid.uuid4())}
    event = post(page_url, f"{path}generate", {"num_steps": 1000} | request_id).json()["event_id"]
    until, told = time.monotonic() + 60, ""
    while '"cancelled": 1' not in told and time.monotonic() < until:
        cancel = post(page_url, f"{path}cancel", request_id).json()["event_id"]
        told = httpx.get(f"{page_url}/gradio_api/call/cancel/{cancel}", timeout=60).text
    told = httpx.get(f"{page_url}/gradio_api/call/generate/{event}", timeout=60).text
    assert "it was cancelled" in told and '"is_over": true' not in told


def test_every_token_outside_of_a_mask_stays(client):
    """Random masks, eight at a time; benchmarks/page.py has 200 of a trained model."""
    draw, count = np.random.default_rng(0), 32
    codes = draw.integers(0, 32, (count, 16))
    masks = draw.random((count, 16)) < draw.random((count, 1))
    masks[~masks.any(axis=1), 0] = True

    def paint(number):
        known = np.where(masks[number], 32, codes[number]).tolist()
        fields = {"prompt": PROMPTS[number % 4], "seed": number, "num_steps": 5, "known": known}
        return generate(client, **fields)["codes"][0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = np.array(list(pool.map(paint, range(count))))
    np.testing.assert_array_equal(made[~masks], codes[~masks])
    assert (made[masks] != codes[masks]).mean() > 0.5


def test_pictures_go_in_and_out_as_text(client, web_model):
    codes = np.random.default_rng(0).integers(0, 32, (2, 16))
    pictures = client.predict(codes=codes.tolist(), api_name="/decode")["pictures"]
    again = client.predict(picture=pictures[0], api_name="/encode")
    pixels = web_model.decode_codes(codes[:1])
    np.testing.assert_array_equal(again["codes"], web_model.encode_images(pixels)[0])


def test_the_example_runs(page_url, tmp_path, monkeypatch):
    path = Path(__file__).parents[2] / "docs" / "examples" / "page_client.py"
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(path))
    example["main"](page_url, "red heart")
    assert {file.name for file in tmp_path.iterdir()} == {"before.png", "after.png"}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("generate", {"seed": -1}, "seed: must lie in"),
        ("generate", {"prompt": ["a"]}, "prompt: must be a text"),
        ("generate", {"known": [1, 2]}, "known: must be 16 numbers"),
        ("generate", {"known": [99999] * 16}, "known: must be a list of whole numbers"),
        ("generate", {"known": "abc"}, "known: must be a list of whole numbers"),
        ("generate", {"request_id": str(uuid.uuid1())}, "request_id: must be a random UUID"),
        ("cancel", {"request_id": "1"}, "request_id: must be a random UUID"),
        ("encode", {"picture": "/etc/passwd"}, "picture: must be a data URL"),
        ("decode", {"codes": [[32] * 16]}, "codes: must be 16 numbers below 32"),
        ("decode", {"codes": []}, "codes: must be 1..64 lists"),
    ],
)
def test_malformed_calls_are_told_why(client, name, fields, message):
    with pytest.raises(Exception, match=re.escape(message)):
        client.predict(**fields, api_name=f"/{name}")


def test_the_schema_refuses_what_it_does_not_know(page_url):
    answer = post(page_url, "/gradio_api/call/v2/generate", {"prompt": "a", "bogus": 1})
    assert answer.status_code == 422 and "bogus" in answer.text
    assert post(page_url, "/gradio_api/call/v2/bogus", {}).status_code == 404
    answer = post(page_url, "/gradio_api/call/generate", {"data": ["a"] * 14})
    event = answer.json()["event_id"]
    told = httpx.get(f"{page_url}/gradio_api/call/generate/{event}", timeout=60).text
    assert "there are 14 values for 13 parameters" in told


def test_what_gradio_has_beside_the_page_is_not_there(page_url):
    for path in (
        "upload", "file=/etc/passwd", "proxy=http://127.0.0.1", "run/predict", "stream/x",
        "run-history/connect", "vibe-edit", "process_recording", "login",
    ):  # fmt: skip
        assert httpx.get(f"{page_url}/gradio_api/{path}").status_code == 404, path
        assert post(page_url, f"/gradio_api/{path}", {}).status_code == 404, path
    assert httpx.get(f"{page_url}/monitoring/summary").status_code == 404
    assert httpx.get(f"{page_url}/docs").status_code == 404


def test_foreign_pages_and_names_are_turned_away(page_url):
    assert httpx.get(page_url, headers={"host": "example.org"}).status_code == 403
    body = {"prompt": "a"}
    path = "/gradio_api/call/v2/generate"
    foreign = post(page_url, path, body, headers={"origin": "http://example.org"})
    assert foreign.status_code == 403
    assert post(page_url, path, body, headers={"origin": page_url}).status_code == 200


def test_gradio_keeps_few_sessions_and_no_account_of_requests(client):
    """Its own bounds are 10,000 of each, which is up to a gigabyte."""
    from gradio.state_holder import StateHolder

    from vqd_jax.web import server

    for _ in range(2):
        client.predict(request_id=str(uuid.uuid4()), api_name="/cancel")
    holders = [one for one in gc.get_objects() if isinstance(one, StateHolder)]
    served = [one for one in holders if client.session_hash in one]
    assert [one.capacity for one in served] == [server.MAX_SESSIONS]
    queue = served[0].blocks._queue
    assert len(queue.event_analytics) <= 1
    assert queue.cached_event_analytics_summary == {"functions": {}}


def test_large_and_endless_bodies_are_turned_away(page_url):
    path = page_url + "/gradio_api/call/v2/encode"
    large = http.client.HTTPConnection(page_url.removeprefix("http://"), timeout=20)
    large.putrequest("POST", "/gradio_api/call/v2/encode")
    large.putheader("Content-Length", str(10**9))
    large.endheaders()
    assert large.getresponse().status == 413
    large.close()
    endless = httpx.post(path, content=(b"{" for _ in range(3)))
    assert endless.status_code == 411


def test_no_answer_tells_where_things_are_on_the_server(client, page_url):
    """Paths of this machine: of the program, its environment, temporary and home folders."""
    import gradio

    answers = [httpx.get(page_url + path).text for path in ("/", "/config", "/gradio_api/info")]
    answers.append(json.dumps(generate(client, prompt="a", num_steps=1)))
    with pytest.raises(Exception, match="seed") as error:
        generate(client, seed=-1)
    answers.append(str(error.value))
    event = post(page_url, "/gradio_api/call/encode", {"data": [{"path": "/etc/passwd"}]})
    told = httpx.get(f"{page_url}/gradio_api/call/encode/{event.json()['event_id']}", timeout=60)
    answers.append(told.text)
    for place in (Path(__file__).parents[2], Path(gradio.__file__).parent, Path.home(), "/tmp/"):
        for answer in answers:
            assert not re.search(rf"(?<![\w.]){re.escape(str(place))}(?!\w)", answer), place


def test_one_line_says_what_is_missing_or_taken(call, tmp_path):
    status, output = call("--mode=serve", f"--model={tmp_path}")
    assert status == 1 and output.count("error:") == 1


def test_an_address_that_is_taken(page_url):
    from vqd_jax.errors import UserError
    from vqd_jax.web import server

    port = int(page_url.rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"--port={port}: "):
        server.listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.0.1", True),
        ("0.0.0.0", False), ("::", False), ("192.168.0.1", False), ("example.org", False),
    ],
)  # fmt: skip
def test_which_addresses_stay_on_this_machine(host, expected):
    from vqd_jax.web import server

    assert server.is_loopback(host) is expected
