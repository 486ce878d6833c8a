"""The queue: who waits, what runs together, and whose turn it is. It knows no model.

One thread does all work on the device. A sampling is an iterator that pauses after every segment;
the thread goes round the samplings that have begun, so that none waits for another to end, and a
cancel takes effect within one segment.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from typing import Any

from absl import logging

from vqd_jax.errors import UserError

MAX_WAITING = 512
MAX_WAITING_OF_ONE = 64
# Samplings that take turns; more would only make each of them slower.
LANES = 3
# Seconds that a short function may take, its waiting included.
PATIENCE = 120
DEFECT = "a defect of the server; its log says more"
CANCELLED = "it was cancelled"


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request in the queue.

    Attributes:
      request: what is asked for.
      rows: pictures that it makes.
      visitor: who asks; visitors take turns.
      post: is called in the engine's thread with ("waiting", tickets ahead), ("preparing", None),
        ("part", one of what the sampling yields), and at last once with ("done", seconds) or
        ("failed", message).
      deadline: of ``time.monotonic``.
      name: of ``Engine.cancel``; "" is none.
    """

    request: Any
    rows: int
    visitor: str
    post: Callable[[str, Any], None]
    deadline: float
    name: str = ""
    alone: bool = False
    cancelled: bool = False
    ahead: int = -1

    def cancel(self) -> None:
        """Nothing more is done for it, from the next segment on; harmless when it is done."""
        self.cancelled = True


@dataclasses.dataclass(eq=False)
class _Batch:
    tickets: list[Ticket]
    parts: Iterator[Sequence[Any] | None]
    seconds: float = 0.0


class Engine:
    """Runs the requests of many visitors.

    Args:
      start: of requests that run together; each item of the iterator that it returns has one part
        for each of them, or is None where there is nothing to tell.
      key: requests of one key may run together.
      kind: of requests that run together: what decides which programs they need.
      max_rows: most pictures in one sampling.
      time_limit: seconds that a request may take, its waiting included.
    """

    def __init__(
        self,
        start: Callable[[list[Any]], Iterator[Sequence[Any] | None]],
        key: Callable[[Any], Hashable],
        kind: Callable[[list[Any]], Hashable],
        *,
        max_rows: int = 16,
        time_limit: float = 600.0,
    ):
        self._start, self._key, self._kind = start, key, kind
        self._max_rows, self._time_limit = max_rows, time_limit
        # Tickets of every visitor that has some; the visitor whose turn it is comes first.
        self._waiting: dict[str, collections.deque[Ticket]] = {}
        self._running: collections.deque[_Batch] = collections.deque()
        self._calls: collections.deque = collections.deque()
        self._ready: set[Hashable] = set()
        self._preparing: dict[Hashable, concurrent.futures.Future] = {}
        self._preparer = concurrent.futures.ThreadPoolExecutor(1, "preparing")
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def ask(
        self,
        request: Any,
        rows: int,
        visitor: str,
        post: Callable[[str, Any], None],
        name: str = "",
    ) -> Ticket:
        """Puts a request into the queue; see ``Ticket`` for the arguments.

        Raises:
          UserError: too many wait.
        """
        deadline = time.monotonic() + self._time_limit
        ticket = Ticket(request, rows, visitor, post, deadline, name)
        with self._changed:
            if sum(map(len, self._waiting.values())) >= MAX_WAITING:
                raise UserError(f"{MAX_WAITING} requests wait already: try again in a minute")
            mine = self._waiting.setdefault(visitor, collections.deque())
            if len(mine) >= MAX_WAITING_OF_ONE:
                raise UserError(f"{len(mine)} requests of yours wait already")
            mine.append(ticket)
            self._changed.notify()
        return ticket

    def call(self, function: Callable, *args: Any) -> concurrent.futures.Future:
        """Runs a short function between two segments.

        Raises:
          UserError: too many wait.
        """
        future = concurrent.futures.Future()
        with self._changed:
            if len(self._calls) >= MAX_WAITING:
                raise UserError(f"{MAX_WAITING} requests wait already: try again in a minute")
            self._calls.append((future, function, args))
            self._changed.notify()
        return future

    def cancel(self, name: str) -> int:
        """Ends the requests of a name, each with ("failed", ``CANCELLED``); how many there were.

        Only ``call`` may run it: between two segments nobody else tells a ticket anything.
        """
        with self._changed:
            running = [ticket for batch in self._running for ticket in batch.tickets]
            waiting = _tickets(self._waiting)
        found = [t for t in [*running, *waiting] if name and t.name == name and not t.cancelled]
        for ticket in found:
            ticket.cancel()
            ticket.post("failed", CANCELLED)
        return len(found)

    def prepare(self, requests: list[Any]) -> None:
        """Makes the programs of requests that will come, so that those need not wait for them."""
        next(iter(self._start(requests)))
        self._ready.add(self._kind(requests))

    def close(self) -> None:
        """Ends what runs after its segment; what waits fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._preparer.shutdown()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._running or self._calls or self._begins()):
                    # Deadlines pass and programs become ready without a notice.
                    self._changed.wait(0.05 if self._waiting else None)
                    self._end_waiting()
                if self._closed:
                    break
                call = self._calls.popleft() if self._calls else None
                self._begin()
                self._tell_places()
            if call:
                _run(*call)
            if self._running:
                self._advance(self._running.popleft())
        for batch in self._running:
            batch.parts.close()
        for ticket in [*_tickets(self._waiting), *(t for b in self._running for t in b.tickets)]:
            if not ticket.cancelled:
                ticket.post("failed", "the server stops")

    def _advance(self, batch: _Batch) -> None:
        """One segment of a sampling; it stays among the running ones unless it is over."""
        now = time.monotonic()
        for ticket in batch.tickets:
            if not ticket.cancelled and now > ticket.deadline:
                self._too_late(ticket)
        if all(ticket.cancelled for ticket in batch.tickets):
            batch.parts.close()
            return
        try:
            parts = next(batch.parts)
        except StopIteration:
            self._finish(batch)
            return
        except Exception as error:
            self._fail(batch, error)
            return
        batch.seconds += time.monotonic() - now
        if parts is not None:
            for ticket, part in zip(batch.tickets, parts, strict=True):
                if not ticket.cancelled:
                    ticket.post("part", part)
        self._running.append(batch)

    def _finish(self, batch: _Batch) -> None:
        for ticket in batch.tickets:
            if not ticket.cancelled:
                ticket.post("done", batch.seconds)

    def _fail(self, batch: _Batch, error: Exception) -> None:
        """Tells the one request that failed; of several each is tried again on its own."""
        if len(batch.tickets) == 1:
            batch.tickets[0].post("failed", reason(error))
            return
        with self._changed:
            for ticket in batch.tickets:
                ticket.alone = True
                self._waiting.setdefault(ticket.visitor, collections.deque()).appendleft(ticket)

    def _too_late(self, ticket: Ticket) -> None:
        ticket.cancelled = True
        ticket.post("failed", f"it took longer than {self._time_limit:g} s")

    def _end_waiting(self) -> None:
        """Takes out of the queue who cancelled or waited too long."""
        now = time.monotonic()
        for ticket in _tickets(self._waiting):
            if not ticket.cancelled and now > ticket.deadline:
                self._too_late(ticket)
        for visitor, queue in list(self._waiting.items()):
            kept = collections.deque(t for t in queue if not t.cancelled)
            if kept:
                self._waiting[visitor] = kept
            else:
                del self._waiting[visitor]

    def _begins(self) -> bool:
        self._end_waiting()
        return self._next() is not None

    def _next(self) -> Ticket | None:
        """The ticket whose turn it is, of those whose programs are not being made."""
        for ticket in _in_turn(self._waiting):
            preparing = self._preparing.get(self._key(ticket.request))
            if preparing is None or preparing.done():
                return ticket
        return None

    def _begin(self) -> None:
        """Lets the next ones in, with all that may run beside them, while there is a lane."""
        self._end_waiting()
        while len(self._running) < LANES and (first := self._next()) is not None:
            tickets = self._together(first)
            requests = [ticket.request for ticket in tickets]
            if not self._is_ready(first, requests):
                continue
            for ticket in tickets:
                self._leave(ticket)
            self._running.append(_Batch(tickets, iter(self._start(requests))))

    def _together(self, first: Ticket) -> list[Ticket]:
        tickets, rows, key = [first], first.rows, self._key(first.request)
        for ticket in _in_turn(self._waiting):
            fits = ticket is not first and rows + ticket.rows <= self._max_rows
            if fits and not (ticket.alone or first.alone) and self._key(ticket.request) == key:
                tickets.append(ticket)
                rows += ticket.rows
        return tickets

    def _is_ready(self, first: Ticket, requests: list[Any]) -> bool:
        """Whether their programs are there; if not, another thread begins to make them."""
        kind, key = self._kind(requests), self._key(first.request)
        made = self._preparing.pop(key, None)
        # What cannot be prepared fails when it runs, where its visitor is told.
        if kind in self._ready or (made is not None and made.exception() is not None):
            return True
        self._preparing[key] = self._preparer.submit(self.prepare, requests)
        for ticket in _tickets(self._waiting):
            if self._key(ticket.request) == key:
                ticket.post("preparing", None)
        return False

    def _leave(self, ticket: Ticket) -> None:
        """Takes a ticket out of the queue; its visitor goes to the end of the line."""
        queue = self._waiting.pop(ticket.visitor)
        queue.remove(ticket)
        if queue:
            self._waiting[ticket.visitor] = queue

    def _tell_places(self) -> None:
        for place, ticket in enumerate(_in_turn(self._waiting)):
            if ticket.ahead != place and self._key(ticket.request) not in self._preparing:
                ticket.ahead = place
                ticket.post("waiting", place)


async def follow(
    engine: Engine, request: Any, rows: int, visitor: str, name: str = ""
) -> AsyncIterator[tuple[str, Any]]:
    """What happens to a request, as ``Ticket.post`` is told it; arguments as for ``Engine.ask``.

    Whoever stops iterating cancels the request.
    """
    loop, updates = asyncio.get_running_loop(), asyncio.Queue()

    def post(event: str, value: Any) -> None:
        try:
            loop.call_soon_threadsafe(updates.put_nowait, (event, value))
        except RuntimeError:
            # The server is gone, and with it who would read this.
            pass

    ticket = engine.ask(request, rows, visitor, post, name)
    try:
        event = ""
        while event not in ("done", "failed"):
            event, value = await updates.get()
            yield event, value
    finally:
        ticket.cancel()


async def short(engine: Engine, function: Callable, *args: Any) -> Any:
    """What a short function answers.

    Raises:
      UserError: it failed, or took longer than ``PATIENCE``; the message is for the visitor.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(engine.call(function, *args)), PATIENCE)
    except TimeoutError as error:
        raise UserError(f"it took longer than {PATIENCE} s") from error


def _tickets(waiting) -> list[Ticket]:
    return [ticket for queue in waiting.values() for ticket in queue]


def _in_turn(waiting) -> list[Ticket]:
    """All tickets in the order in which they will be let in: one of each visitor, and again."""
    depth = max(map(len, waiting.values()), default=0)
    return [queue[i] for i in range(depth) for queue in waiting.values() if i < len(queue)]


def _run(future: concurrent.futures.Future, function: Callable, args: tuple) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(UserError(reason(error)))


def reason(error: Exception) -> str:
    """What a visitor is told."""
    if isinstance(error, UserError):
        return str(error)
    logging.error("%s", DEFECT, exc_info=error)
    return DEFECT
