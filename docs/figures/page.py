"""Takes the pictures of docs/page.md from the real page, in Debian's chromium.

pip install -e '.[test]' && apt-get install chromium
python -m vqd_jax.main --mode=serve
python docs/figures/page.py http://127.0.0.1:7860

It writes page_*.png beside this file.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PROMPT = "woman astronaut, medium skin tone"
# Rows and columns of the tokens of the packaged model.
GRID = 8
STATUS = "document.querySelector('[data-part=status]').textContent"


def made(page):
    page.wait_for_function(f"() => /^Made/.test({STATUS})")


def drag(page, tokens):
    """Takes tokens back: (row, column) one after the other, with the button held down."""
    canvas = page.locator("[data-part=canvas]")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for number, (row, column) in enumerate(tokens):
        x = box["x"] + (column + 0.5) * box["width"] / GRID
        page.mouse.move(x, box["y"] + (row + 0.5) * box["height"] / GRID, steps=3)
        if not number:
            page.mouse.down()
    page.mouse.up()


def take(browser, address, name, width, scheme):
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, device_scale_factor=1
    )
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#generate")
    page.fill("#prompt textarea", PROMPT)
    page.get_by_label("A new seed every time").uncheck()
    page.locator("#seed input").fill("5")
    page.locator("#seed input").press("Tab")
    page.wait_for_timeout(500)
    page.click("#generate")
    made(page)
    drag(page, [(2, 2), (2, 3), (2, 4), (3, 4), (3, 3)])
    page.screenshot(path=Path(__file__).with_name(f"page_{name}_{scheme}.png"), full_page=True)
    if (name, scheme) == ("wide", "light"):
        page.locator("[data-part=clear]").click()
        page.locator("[data-part=step]").fill("12")
        page.wait_for_timeout(1500)
        page.locator("[data-part=work]").screenshot(path=Path(__file__).with_name("page_steps.png"))
    context.close()


def main(address):
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, width in (("wide", 1280), ("narrow", 375)):
            for scheme in ("light", "dark"):
                take(browser, address, name, width, scheme)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
