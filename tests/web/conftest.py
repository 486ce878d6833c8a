"""A page that is served in this process, and a browser to look at it."""

import contextlib
import shutil
import threading
import time

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def model_of(untrained):
    """model_of("text") -> a model of 16 tokens and up to 1,000 steps with that condition."""
    from configs import tiny

    def model_of(condition):
        config = tiny.get_config()
        config.diffusion.num_steps, config.sampling.num_steps = 1000, 100
        config.denoiser.condition = condition
        config.denoiser.num_classes = 3 if condition == "class" else 0
        return untrained(config)

    return model_of


@pytest.fixture(scope="session")
def web_model(model_of):
    """A model of texts. Not to be changed."""
    return model_of("text")


@contextlib.contextmanager
def _served(model):
    import uvicorn

    from vqd_jax.web import server, work

    engine = work.engine(model)
    app = server.application(model, engine, {"127.0.0.1"})
    listener = server.listen("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.05)
    try:
        yield url
    finally:
        running.should_exit = True
        thread.join()
        engine.close()
        listener.close()


@pytest.fixture(scope="session")
def serve():
    """serve(model) -> the address of its page."""
    with contextlib.ExitStack() as stack:
        yield lambda model: stack.enter_context(_served(model))


@pytest.fixture(scope="session")
def page_url(web_model, serve):
    """The address of the page of ``web_model``."""
    return serve(web_model)


@pytest.fixture(scope="session")
def browser():
    """Debian's chromium, driven by Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine: apt-get install chromium")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
            ],
        )
        yield browser
        browser.close()
