"""Several processes as one program: how it begins, agrees, and ends.

Every process runs the same steps. The first one writes what is written once. An error in any of
them ends all of them, with a message that names it; so does a process that dies.
"""

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from vqd_jax.errors import UserError

# A process that says nothing for so long is dead, and the others stop.
HEARTBEAT_SECONDS = 20
_POLL_SECONDS = 2.0
_FAILED = "vqd_jax/failed"


@contextlib.contextmanager
def session(distributed: bool, uses_devices: bool = True) -> Iterator[None]:
    """What a command runs in; with ``distributed`` it is one of several processes.

    The first line of the log says which devices it has, if it uses any.

    The address of the first process and the number of this one come from the environment: Cloud
    TPU, GKE, SLURM and Open MPI are recognised; elsewhere set ``JAX_COORDINATOR_ADDRESS``,
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``. Errors of the start are not caught: a process that
    does not find the others must not train alone.
    """
    _keep_compiled_programs()
    if not distributed:
        if uses_devices:
            logging.info("%d x %s", len(devices()), devices()[0].device_kind)
        yield
        return
    count, index = (os.environ.get(f"JAX_{key}") for key in ("NUM_PROCESSES", "PROCESS_ID"))
    jax.distributed.initialize(
        num_processes=int(count) if count else None,
        process_id=int(index) if index else None,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=60,
    )
    which = f"process {jax.process_index()} of {jax.process_count()}"
    here = f"{jax.local_device_count()} devices here and {jax.device_count()} in all"
    here += f", each a {jax.devices()[0].device_kind}"
    logging.info("%s, %s", which, here)
    if not is_writer():
        # One of them tells how the run goes; the others speak when something is wrong.
        logging.set_verbosity(logging.WARNING)
    watch = _Watch()
    try:
        yield
    except SystemExit:
        # An end that all processes agreed on.
        raise
    except BaseException as error:
        # The watch goes on meanwhile: it knows better where the failure began.
        _fail_together(error)
        raise
    finally:
        # A thread that is inside the runtime's client as Python ends would abort the process.
        watch.stop()


def devices() -> list[jax.Device]:
    """All devices of all processes.

    Raises:
      UserError: JAX has no backend of the platform that it is told to take.
    """
    try:
        return jax.devices()
    # Which of them depends on what is missing: the backend, or what it runs on.
    except (RuntimeError, AssertionError) as error:
        platform = jax.config.jax_platforms
        if not platform:
            raise
        raise UserError(
            f"JAX has no backend for JAX_PLATFORMS={platform}; install what it needs (pip install "
            "'vqd_jax[gpu]' or 'vqd_jax[tpu]'), or take another, such as JAX_PLATFORMS=cpu"
        ) from error


def _keep_compiled_programs() -> None:
    """Compiled programs are kept on disk, so that a second start is a quick one."""
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", f"{home}/vqd_jax/compiled")


def is_writer() -> bool:
    """Whether this is the process that writes logs, pictures and models."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def wait_for_all(name: str) -> None:
    """Returns when all processes are here, however long that takes.

    Unlike ``barrier`` it needs no exchange between devices, which may be given up after a while.

    Args:
      name: of this place in the program, which is passed once.
    """
    if jax.process_count() == 1:
        return
    if (store := _store()) is None:
        barrier(name)
    else:
        milliseconds = 7 * 24 * 3600 * 1000
        store.wait_at_barrier(f"vqd_jax/{name}", milliseconds)


def largest(value: int) -> int:
    """The largest of the values that the processes give; all of them must ask."""
    return int(_gathered(value).max())


def of_first(value: int) -> int:
    """The value that the first process gives; all of them must ask."""
    return int(_gathered(value)[0])


def _gathered(value: int) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray([value])
    with jax.transfer_guard("allow"):
        return multihost_utils.process_allgather(np.asarray(value))


def _store() -> Any | None:
    """The processes' key-value store, in which one that fails tells why; None if there is none.

    JAX has no public name for it. Without it, JAX still ends all processes when the heartbeat of
    one stops, but does not say why it stopped.
    """
    try:
        from jax._src import distributed

        return distributed.global_state.client
    except (ImportError, AttributeError):
        logging.warning(
            "jax %s has no key-value store where this program looks for it: if a process fails, "
            "the others end without its message",
            jax.__version__,
        )
        return None


class _Watch:
    """Ends this process when another one says that it failed."""

    def __init__(self):
        self._client = _store()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while self._client is not None and not self._stopped.wait(_POLL_SECONDS):
            try:
                found = self._client.key_value_try_get(_FAILED)
            # Nothing there yet; that the first process is gone, JAX itself reports.
            except jax.errors.JaxRuntimeError:
                continue
            _leave(f"this process stops, because {found}")

    def stop(self) -> None:
        """No more watching."""
        self._stopped.set()
        self._thread.join()


def _fail_together(error: BaseException) -> None:
    """Tells the other processes, and sees to it that this one need not wait for them."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        # Most likely another process failed or is gone. The watch, or JAX itself, finds out which,
        # says so and ends this one; until then the error here would only mislead.
        logging.warning("an exchange with other processes broke off; finding out which one is gone")
        time.sleep(HEARTBEAT_SECONDS + 10)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:1000]
    if (store := _store()) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            store.key_value_set(
                _FAILED, f"process {jax.process_index()} failed ({reason})", allow_overwrite=False
            )
    if is_writer():
        # The messages are kept in this process.
        time.sleep(2 * _POLL_SECONDS)
    # Runs before JAX's own farewell, which would wait for the others.
    atexit.register(_leave, None)


def _leave(message: str | None) -> None:
    if message:
        print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
