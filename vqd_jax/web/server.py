"""The server of the page: what may come in, and from where."""

import ipaddress
import os
import socket
from collections.abc import Callable
from typing import Any

import fastapi
import fastapi.responses
import gradio as gr
import uvicorn
from absl import logging

from vqd_jax.errors import UserError
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.web import layout, wire, work

# What the page and Gradio's clients ask for. Gradio has more: a store of uploads, a proxy, its own
# recordings. Nothing here needs them, so nobody gets them.
_ALLOWED = (
    "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/assets/", "/static/", "/svelte/",
    "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/queue/", "/gradio_api/call/",
    "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/heartbeat/", "/gradio_api/theme.css",
    "/gradio_api/component_server", "/gradio_api/startup-events", "/gradio_api/app_id",
)  # fmt: skip
# A picture in base64 and the rest of a request.
MAX_BODY = wire.MAX_BYTES * 4 // 3 + 200_000
# Gradio keeps the whole page and the last answer for each session, at least 70 kB, and takes every
# plain request for a session of its own. Nothing here reads them; its own bound is 10,000.
MAX_SESSIONS = 100
# After every request Gradio sums up the last 10,000 in a table, for a page that is not served here.
_NO_ANALYTICS = {
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1" + 12 * "0",
}


class Guard:
    """An ASGI application in front of another: routes, hosts and sizes that are let through.

    Args:
      app: what is behind.
      hosts: names by which the server may be called; None lets all through. A foreign page that
        makes its name point at this machine is not let in.
    """

    def __init__(self, app: Callable, hosts: set[str] | None):
        self._app, self._hosts = app, hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            # Uvicorn's own start and stop; the page has no web sockets.
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal:
            await _answer(send, *refusal)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope, headers) -> tuple[int, str] | None:
        host = headers.get(b"host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._hosts is not None and name not in self._hosts:
            return 403, "this server does not go by that name"
        origin = headers.get(b"origin")
        if origin is not None and origin.split("://", 1)[-1] != host:
            return 403, "the request comes from another page"
        path = scope["path"].rstrip("/") or "/"
        if path != "/" and not any(
            path == allowed.rstrip("/") or (allowed.endswith("/") and path.startswith(allowed))
            for allowed in _ALLOWED
        ):
            return 404, "there is nothing here"
        if b"transfer-encoding" in headers:
            return 411, "the request does not say how long it is"
        length = headers.get(b"content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return 413, "the request is too large"
        return None


async def _answer(send, status: int, text: str) -> None:
    head = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": text.encode()})


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def application(model: VQDiffusion, engine: Any, hosts: set[str] | None) -> Callable:
    """The ASGI application of the page, guarded; see ``Guard`` for ``hosts``."""
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", **fonts).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )
    # Gradio reads these when the page is built.
    os.environ.update(_NO_ANALYTICS)
    blocks = layout.build(model, engine)
    blocks.state_session_capacity = MAX_SESSIONS
    gr.mount_gradio_app(
        app, blocks, path="/", theme=theme, css=layout.WIDTH, footer_links=[],
        show_error=True, run_history=False, ssr_mode=False, mcp_server=False, pwa=False,
        enable_monitoring=False, max_file_size=1,
        app_kwargs={"exception_handlers": {TypeError: _wrong_call, KeyError: _wrong_call}},
    )  # fmt: skip
    return Guard(app, hosts)


async def _wrong_call(request: fastapi.Request, error: Exception) -> fastapi.Response:
    """Says what Gradio raises about a call by name: no such function, or no such parameter."""
    if request.url.path.startswith("/gradio_api/call/"):
        if isinstance(error, KeyError):
            return fastapi.responses.JSONResponse({"detail": "there is no such function"}, 404)
        detail = str(error).split(". Please", 1)[0]
        return fastapi.responses.JSONResponse({"detail": detail}, 422)
    raise error


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one.

    Raises:
      UserError: the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: {error.strerror or error}") from error


def serve(model: VQDiffusion, host: str, port: int) -> None:
    """Serves the page until it is interrupted.

    Args:
      model: what makes the pictures.
      host: address to bind to, such as 127.0.0.1.
      port: 0 takes a free one.

    Raises:
      UserError: the address cannot be had.
    """
    with listen(host, port) as listener:
        engine = work.engine(model)
        try:
            logging.info("compiling for the settings of the model")
            work.prepare(model, engine)
            bound = listener.getsockname()[1]
            hosts = {"localhost", "127.0.0.1", "[::1]"} if is_loopback(host) else None
            if hosts is None:
                logging.warning(
                    "--host=%s: whoever reaches this machine may use the page; there is no "
                    "password and no encryption, so put a proxy that has both before it", host
                )  # fmt: skip
            config = uvicorn.Config(
                application(model, engine, hosts), log_level="warning", server_header=False,
                timeout_graceful_shutdown=2,
            )  # fmt: skip
            shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
            logging.info("ready: http://%s:%d", shown, bound)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            engine.close()
