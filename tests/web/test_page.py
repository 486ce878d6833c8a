"""The page in a real browser: what a visitor does, and what they see."""

import base64
import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageSequence

pytest.importorskip("gradio", reason="gradio is not installed")

PROMPT = "red heart"
# Milliseconds; a program may have to be compiled.
LONG = 20_000


@pytest.fixture(scope="module")
def requested():
    return []


@contextlib.contextmanager
def opened(browser, url, requested, size):
    """A page in a window of its own; an error in its scripts fails the test."""
    context = browser.new_context(viewport=size, accept_downloads=True)
    context.set_default_timeout(LONG)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    # Gradio catches what a component throws, and writes it there.
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("request", lambda request: requested.append(request.url))
    page.goto(url)
    page.wait_for_selector("#generate")
    yield page
    context.close()
    assert errors == []


@pytest.fixture
def page(browser, page_url, requested, request):
    size = getattr(request, "param", {"width": 1280, "height": 900})
    with opened(browser, page_url, requested, size) as page:
        yield page


def part(page, name):
    return page.locator(f'[data-part="{name}"]')


def said(page, pattern):
    """Waits until the page says so."""
    status = part(page, "status")
    try:
        page.wait_for_function(
            "pattern => new RegExp(pattern).test("
            "document.querySelector('[data-part=status]').textContent)",
            arg=pattern,
        )
    except Exception:
        raise AssertionError(f"no {pattern!r}: {status.text_content()!r}") from None
    return status.text_content()


def made(page):
    """Waits for the answer."""
    said(page, "^Made")


def put(page, name, value):
    """Types a number beside a slider, whose own value may still be on its way there."""
    field = page.locator(f"#{name} input[type=number]")
    for _ in range(20):
        field.fill(str(value))
        field.press("Tab")
        page.wait_for_timeout(100)
        if field.input_value() == str(value):
            return
    pytest.fail(f"{name} stays {field.input_value()}")


def generate(page, prompt=PROMPT, pictures=1):
    page.fill("#prompt textarea", prompt)
    put(page, "num_images", pictures)
    page.click("#generate")
    made(page)


def recipe(page):
    """What the page would save of the chosen picture."""
    with page.expect_download() as download:
        part(page, "recipe").click()
    return json.loads(open(download.value.path(), encoding="utf-8").read())


def numbers(text):
    return np.frombuffer(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), "<u2")


def take(page, tokens):
    """Takes tokens back with the mouse, one click each."""
    for token in tokens:
        box = part(page, "canvas").bounding_box()
        x, y = token % 4, token // 4
        part(page, "canvas").click(
            position={"x": (x + 0.5) * box["width"] / 4, "y": (y + 0.5) * box["height"] / 4}
        )


def test_a_sentence_becomes_pictures_and_tokens_are_painted_again(page, web_model):
    generate(page, pictures=2)
    assert part(page, "sides").locator("img").count() == 2
    before = recipe(page)
    assert before["request"]["prompt"] == PROMPT
    fields = before["request"]
    whole = web_model.generate(
        [PROMPT], num_images=2, seed=fields["seed"], num_steps=fields["num_steps"]
    )
    np.testing.assert_array_equal(numbers(before["codes"]), whole.codes[0, 0])
    take(page, [5, 6, 9])
    assert "3 of 16" in part(page, "hint").text_content()
    part(page, "again").click()
    part(page, "again").is_disabled()
    page.wait_for_function(
        "() => document.querySelector('[data-part=hint]').textContent.startsWith('Drag')"
    )
    made(page)
    after = recipe(page)
    kept = np.delete(np.arange(16), [5, 6, 9])
    np.testing.assert_array_equal(numbers(after["codes"])[kept], numbers(before["codes"])[kept])
    np.testing.assert_array_equal(numbers(after["request"]["known"])[[5, 6, 9]], 32)
    part(page, "undo").click()
    assert recipe(page) == before


@pytest.mark.slow
def test_two_settings_side_by_side_share_the_seed(page):
    page.fill("#prompt textarea", PROMPT)
    page.get_by_role("button", name="Side by side").click()
    put(page, "num_steps_2", 20)
    page.click("#both")
    made(page)
    labels = part(page, "sides").locator(".side > p").all_text_contents()
    assert len(labels) == 2 and all("bits a token" in label for label in labels)
    assert "num steps 100" in labels[0] and "num steps 20" in labels[1]
    first = recipe(page)
    part(page, "sides").locator(".strip").nth(1).locator("button").first.click()
    second = recipe(page)
    assert second["request"] == first["request"] | {"num_steps": 20}


@pytest.mark.slow
def test_the_steps_can_be_seen_again(page):
    generate(page)
    last = part(page, "canvas").evaluate("canvas => canvas.toDataURL()")
    part(page, "step").fill("0")
    assert part(page, "step-text").text_content() == "0 of 100"
    hidden = part(page, "canvas").evaluate("canvas => canvas.toDataURL()")
    part(page, "step").fill("50")
    page.wait_for_timeout(500)
    between = part(page, "canvas").evaluate("canvas => canvas.toDataURL()")
    assert len({last, hidden, between}) == 3
    part(page, "canvas").hover(position={"x": 5, "y": 5})
    assert "Confidence" in part(page, "token").text_content()
    assert part(page, "candidates").locator("li").count() == 5
    with page.expect_download() as download:
        part(page, "animate").click()
    frames = ImageSequence.Iterator(Image.open(download.value.path()))
    # Equal frames become one that is shown for longer: 100 of 60 ms before the last.
    assert sum(frame.info["duration"] for frame in frames) == 100 * 60 + 1500


def rotated_photo():
    """A photo of 120 x 80 pixels, red on its left, whose file is turned by its EXIF orientation."""
    pixels = np.full((80, 120, 3), 255, np.uint8)
    pixels[:, :60] = [255, 0, 0]
    turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue(), pixels


def test_a_picture_of_ones_own_is_painted_again_and_pasted_back(page, web_model):
    photo, pixels = rotated_photo()
    part(page, "file").set_input_files(
        {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo}
    )
    said(page, "^Your")
    take(page, [0])
    part(page, "again").click()
    made(page)
    after = recipe(page)
    upright = Image.open(io.BytesIO(photo)).transpose(Image.Transpose.ROTATE_270)
    codes = web_model.encode_images([np.asarray(upright)])[0]
    np.testing.assert_array_equal(numbers(after["codes"])[1:], codes[1:])
    with page.expect_download() as download:
        part(page, "paste").click()
    whole = np.asarray(Image.open(download.value.path()))
    assert whole.shape == pixels.shape
    changed = (whole != np.asarray(upright)).any(axis=-1)
    # The first of 4 x 4 tokens of the square of 80 pixels in the middle.
    assert changed[:20, 20:40].any() and changed.sum() == changed[:20, 20:40].sum()


def test_a_bad_file_is_refused_in_one_line(page):
    part(page, "file").set_input_files(
        {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": b"no picture at all"}
    )
    page.wait_for_selector(".failed")
    assert part(page, "status").text_content() == (
        "picture: cannot be read: not an image of a known format"
    )


def test_a_picture_of_the_camera(page):
    part(page, "camera").click()
    page.wait_for_function("() => document.querySelector('video').videoWidth > 0")
    part(page, "take").click()
    said(page, "^Your")
    assert part(page, "sides").locator("img").count() == 1


def test_stop_ends_a_request_and_the_next_one_is_met(page):
    page.fill("#prompt textarea", PROMPT)
    put(page, "num_images", 16)
    page.get_by_role("button", name="Settings").click()
    put(page, "num_steps", 1000)
    # On a machine that is busy the request may be over before the click arrives.
    for _ in range(5):
        page.click("#generate")
        said(page, "^step")
        page.click("#stop")
        if said(page, "^Stopped|^Made").startswith("Stopped"):
            break
    else:
        pytest.fail("no request was stopped")
    assert not part(page, "progress").is_visible()
    put(page, "num_steps", 20)
    generate(page)
    assert "of 20" in part(page, "step-text").text_content()


def test_a_link_makes_the_picture_again(page, browser):
    generate(page)
    before = recipe(page)
    part(page, "link").click()
    page.wait_for_function("() => location.search.includes('seed=')")
    page.reload()
    page.wait_for_selector("#generate")
    made(page)
    assert recipe(page) == before
    assert page.input_value("#prompt textarea") == PROMPT
    part(page, "recipe-file").set_input_files(
        {
            "name": "a.json",
            "mimeType": "application/json",
            "buffer": json.dumps(before | {"request": before["request"] | {"seed": 7}}).encode(),
        }
    )
    page.wait_for_function("() => document.querySelector('#seed input').value == '7'")
    made(page)
    assert recipe(page)["request"] == before["request"] | {"seed": 7}


@pytest.mark.parametrize("page", [{"width": 375, "height": 700}], indirect=True)
def test_a_narrow_screen_needs_no_sideways_scrolling(page):
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    box = part(page, "canvas").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 375


def test_the_keyboard_is_enough(page):
    page.focus("#prompt textarea")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    made(page)
    before = recipe(page)
    page.focus("[data-part=canvas]")
    for key in ("ArrowDown", "ArrowRight", "Space", "Shift+ArrowRight"):
        page.keyboard.press(key)
    assert "2 of 16" in part(page, "hint").text_content()
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.dataset.part") != "again":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.querySelector('[data-part=hint]').textContent.startsWith('Drag')"
    )
    made(page)
    changed = numbers(recipe(page)["codes"]) != numbers(before["codes"])
    assert set(np.flatnonzero(changed)) <= {5, 6}


@pytest.mark.slow
@pytest.mark.parametrize(("condition", "prompt"), [("class", "2"), ("none", "")])
def test_a_model_of_classes_or_of_nothing(condition, prompt, browser, model_of, serve):
    """A list of classes and no prompt; neither of them, and no guidance."""
    model, size = model_of(condition), {"width": 1280, "height": 900}

    def alone(seed):
        # With the programs of the page, so that no others are compiled.
        watched = {"callback": lambda preview: None, "callback_steps": 5, "trajectory": True}
        return model.generate([prompt], seed=seed, **watched).codes[0, 0]

    alone(0)
    with opened(browser, serve(model), [], size) as page:
        page.set_default_timeout(3 * LONG)
        page.get_by_role("button", name="Settings").click()
        page.locator("#temperature").wait_for()
        assert not page.locator("#prompt textarea").is_visible()
        guided = [page.locator(f"#{n}").is_visible() for n in ("negative_prompt", "guidance_scale")]
        assert guided == 2 * [condition == "class"]
        if condition == "class":
            page.locator("#prompt input").click()
            assert page.get_by_role("option").all_inner_texts()[-3:] == ["0", "1", "2"]
            page.get_by_role("option", name="2").click()
        put(page, "num_images", 1)
        page.click("#generate")
        made(page)
        after = recipe(page)
    assert after["request"]["prompt"] == prompt
    np.testing.assert_array_equal(numbers(after["codes"]), alone(after["request"]["seed"]))


def test_the_page_asks_nobody_else(requested, page_url):
    """Last, so that it sees what all the others asked for."""
    foreign = {url for url in requested if not url.startswith((page_url, "data:", "blob:"))}
    assert foreign == set() and len(requested) > 50
