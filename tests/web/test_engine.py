"""The queue, with samplings that are lists of numbers."""

import threading
import time

import pytest

from vqd_jax.errors import UserError
from vqd_jax.web import engine as engine_lib
from vqd_jax.web.engine import Engine


class Asked:
    """A request of so many parts; ``fails`` raises an error instead of the second part."""

    def __init__(self, name, parts=3, key="", fails=None):
        self.name, self.parts, self.key, self.fails = name, parts, key, fails


class Log:
    """Who ran together, segment by segment, and what each was told."""

    def __init__(self):
        self.segments, self.told, self.over = [], {}, {}

    def start(self, requests):
        for part in range(max(request.parts for request in requests)):
            for request in requests:
                if request.fails is not None and part == 1:
                    raise request.fails
            self.segments.append([request.name for request in requests])
            yield [f"{request.name}{part}" for request in requests]

    def ask(self, engine, request, visitor=None, rows=1, name=""):
        told, over = [], threading.Event()

        def post(event, value):
            told.append((event, value))
            if event in ("done", "failed"):
                over.set()

        self.told[request.name], self.over[request.name] = told, over
        return engine.ask(request, rows, visitor or request.name, post, name)

    def wait(self, *names):
        for name in names:
            assert self.over[name].wait(20), (name, self.told[name])

    def last(self, name):
        return self.told[name][-1]


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def make(log):
    made = []

    def make(**options):
        gate, waits = threading.Event(), threading.Event()
        engine = Engine(log.start, lambda r: r.key, lambda rs: rs[0].key, max_rows=4, **options)
        # Nothing begins before the test opens the gate.
        engine.call(lambda: waits.set() or gate.wait(20))
        assert waits.wait(20)
        made.append((engine, gate))
        return engine, gate

    yield make
    for engine, gate in made:
        gate.set()
        engine.close()


def test_requests_of_one_key_run_together_and_each_gets_its_own(log, make):
    engine, gate = make()
    for name in "abcde":
        log.ask(engine, Asked(name))
    gate.set()
    log.wait(*"abcde")
    # Four rows at most run together.
    assert ["a", "b", "c", "d"] in log.segments and ["e"] in log.segments
    for name in "abcde":
        assert [v for event, v in log.told[name] if event == "part"] == [
            f"{name}0", f"{name}1", f"{name}2"
        ]  # fmt: skip
        assert log.last(name)[0] == "done"


def test_samplings_take_turns(log, make):
    engine, gate = make()
    log.ask(engine, Asked("long", parts=50, key="x"))
    log.ask(engine, Asked("short", parts=2, key="y"))
    for key in "xy":
        engine.prepare([Asked("", key=key)])
    log.segments.clear()
    gate.set()
    log.wait("short", "long")
    assert log.segments[:4] == [["long"], ["short"]] * 2
    assert log.segments[4:] == [["long"]] * 48


def test_visitors_take_turns(log, make):
    engine, gate = make()
    for number in range(6):
        log.ask(engine, Asked(f"greedy{number}", key=f"g{number}"), visitor="greedy")
    log.ask(engine, Asked("modest", key="m"))
    for key in ("m", *(f"g{n}" for n in range(6))):
        engine.prepare([Asked("", key=key)])
    log.segments.clear()
    gate.set()
    log.wait("modest", "greedy5")
    begun = list(dict.fromkeys(names[0] for names in log.segments))
    assert begun.index("modest") == 1
    places = [value for event, value in log.told["greedy5"] if event == "waiting"]
    assert places == sorted(places, reverse=True) and places[-1] == 0


def test_a_cancel_takes_effect_within_one_segment(log, make):
    engine, gate = make()
    ticket = log.ask(engine, Asked("a", parts=10**6))
    log.ask(engine, Asked("b", parts=30, key="b"))
    gate.set()
    log.wait("b")
    ticket.cancel()
    engine.call(lambda: None).result(20)
    engine.call(lambda: None).result(20)
    before = len(log.told["a"])
    engine.call(lambda: None).result(20)
    assert len(log.told["a"]) == before and log.last("a")[0] == "part"


def test_a_cancel_in_the_queue(log, make):
    engine, gate = make()
    log.ask(engine, Asked("a")).cancel()
    log.ask(engine, Asked("b"))
    gate.set()
    log.wait("b")
    assert all("a" not in names for names in log.segments)


def test_a_name_cancels_what_runs_and_what_waits_and_nothing_else(log, make):
    engine, gate = make()
    cancelled = ("failed", engine_lib.CANCELLED)
    log.ask(engine, Asked("runs", parts=10**6), visitor="v", name="x")
    log.ask(engine, Asked("beside", key="b"), visitor="v", name="y")
    log.ask(engine, Asked("nameless", key="n"), visitor="v")
    # There are three lanes, so this one waits.
    log.ask(engine, Asked("waits", key="w"), visitor="v", name="z")
    for key in ("", "b", "n", "w"):
        engine.prepare([Asked("", key=key)])
    log.segments.clear()
    found = [engine.call(engine.cancel, name) for name in ("z", "", "unknown")]
    gate.set()
    assert [future.result(20) for future in found] == [1, 0, 0]
    log.wait("beside", "nameless", "waits")
    assert log.last("waits") == cancelled
    assert all("waits" not in names for names in log.segments)
    assert engine.call(engine.cancel, "x").result(20) == 1
    assert engine.call(engine.cancel, "x").result(20) == 0
    assert log.last("runs") == cancelled and log.told["runs"].count(cancelled) == 1
    assert log.last("beside")[0] == log.last("nameless")[0] == "done"


def test_one_that_fails_harms_no_other_and_is_told_why(log, make):
    engine, gate = make()
    log.ask(engine, Asked("a"))
    log.ask(engine, Asked("bad", fails=UserError("seed: must be small")))
    log.ask(engine, Asked("worse", fails=ZeroDivisionError("secret")))
    log.ask(engine, Asked("b"))
    gate.set()
    log.wait("a", "bad", "worse", "b")
    assert log.last("a")[0] == log.last("b")[0] == "done"
    assert log.last("bad") == ("failed", "seed: must be small")
    assert log.last("worse") == ("failed", engine_lib.DEFECT)


def test_time_limits_of_the_waiting_and_the_running(log, make):
    engine, gate = make(time_limit=0.3)
    log.ask(engine, Asked("runs", parts=10**7))
    log.ask(engine, Asked("late", key="late"))
    time.sleep(0.2)
    gate.set()
    log.wait("runs")
    assert log.last("runs") == ("failed", "it took longer than 0.3 s")
    engine, gate = make(time_limit=0.1)
    log.ask(engine, Asked("waits"))
    time.sleep(0.3)
    gate.set()
    log.wait("waits")
    assert log.last("waits") == ("failed", "it took longer than 0.1 s")


def test_the_queue_is_bounded(log, make):
    engine, _ = make()
    for number in range(engine_lib.MAX_WAITING_OF_ONE):
        log.ask(engine, Asked(f"{number}"), visitor="a")
    with pytest.raises(UserError, match="requests of yours wait already"):
        log.ask(engine, Asked("more"), visitor="a")
    for number in range(engine_lib.MAX_WAITING - engine_lib.MAX_WAITING_OF_ONE):
        log.ask(engine, Asked(f"other {number}"))
    with pytest.raises(UserError, match="try again"):
        log.ask(engine, Asked("one more"))


def test_programs_are_made_while_others_run(log):
    making, made = threading.Event(), threading.Event()

    def start(requests):
        if requests[0].key == "new" and threading.current_thread().name.startswith("preparing"):
            making.set()
            assert made.wait(20)
        yield from log.start(requests)

    engine = Engine(start, lambda r: r.key, lambda rs: rs[0].key)
    log.ask(engine, Asked("new", key="new"))
    assert making.wait(20)
    log.ask(engine, Asked("known"))
    # The program of the second is made after that of the first, so it is given here.
    engine.prepare([Asked("known")])
    log.wait("known")
    assert ("preparing", None) in log.told["new"] and not log.over["new"].is_set()
    made.set()
    log.wait("new")
    assert log.last("new")[0] == "done"
    engine.close()


def test_who_waits_when_the_server_stops_is_told(log, make):
    engine, gate = make()
    log.ask(engine, Asked("a"))
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closed:
        time.sleep(0.01)
    gate.set()
    closing.join(20)
    assert log.last("a") == ("failed", "the server stops")
