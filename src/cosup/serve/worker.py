"""The thread that owns model, index and session, and the side of it that asyncio sees."""

import asyncio
import logging
import math
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cosup.data import Passage
from cosup.engine import Engine, Event, Finished, Inserted, Options, Retrieved

log = logging.getLogger("cosup.serve")
T = TypeVar("T")


class BusyError(Exception):
    """The queue is full.

    Args:
        seconds: after which a place may be free.
    """

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class FailedError(Exception):
    """The engine failed on this request; the reason is in the log, not here."""


class StoppedError(Exception):
    """The server is shutting down."""


@dataclass(frozen=True, slots=True)
class Found:
    """A retrieval with the passages of its hits, as they were at that moment."""

    event: Retrieved
    passages: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class Cited:
    """An inserted passage, as it was at that moment: the next claim rests on it."""

    passage: Passage
    score: float


Item = Event | Found | Cited
_Out = asyncio.Queue[list[Item] | Exception]


class Worker:
    """Runs an engine's session on a thread of its own; everything that touches model or index runs there, in turn.

    Args:
        engine: whose `rows` requests share.
        queue_size: requests that may wait beside those that have rows.
    """

    def __init__(self, engine: Engine, *, queue_size: int):
        self.engine = engine
        self.capacity = engine.options.rows + queue_size
        self.open = 0
        self._session = engine.session()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outs: dict[int, tuple[asyncio.AbstractEventLoop, _Out]] = {}
        self._thread = threading.Thread(target=self._run, name="cosup-engine", daemon=True)
        self._stopping = False
        self._mean_seconds = 1.0

    @property
    def active(self) -> int:
        """Rows in use."""
        return self._session.active

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return max(self.open - self.engine.options.rows, 0)

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def refuse(self) -> None:
        """Takes no further request; those that run and wait go on."""
        self._stopping = True

    def check_ready(self) -> None:
        """Raises StoppedError if it takes no further request."""
        if not self.ready:
            raise StoppedError

    def stop(self) -> None:
        """Ends the thread after the step that it is in."""
        self._stopping = True
        self._inbox.put(None)
        self._thread.join()

    async def submit(self, prompt: Sequence[int], options: Options) -> "Running":
        """Takes a request; whoever gets it closes it.

        Raises:
            BusyError: rows and queue are full.
            StoppedError: the server is shutting down.
            UserError: the engine does not take the prompt.
        """
        self.check_ready()
        if self.open >= self.capacity:
            turns = (self.open - self.engine.options.rows + 1) / self.engine.options.rows
            raise BusyError(min(max(math.ceil(turns * self._mean_seconds), 1), 60))
        loop = asyncio.get_running_loop()
        running = Running(self, loop.time())
        try:
            running.number = await self.call(lambda: self._submit(prompt, options, loop, running.out))
        except BaseException:
            running.close()
            raise
        return running

    def leave(self, running: "Running", *, seconds: float | None) -> None:
        """A request has ended after so many seconds, or goes away before its end: None."""
        self.open -= 1
        if seconds is None:
            self._inbox.put(lambda: self._leave(running.number, running.out))
        else:
            self._mean_seconds += 0.2 * (seconds - self._mean_seconds)

    async def call(self, function: Callable[[], T]) -> T:
        """Runs a function on the thread, between two steps. Raises what it raises."""
        if not self._thread.is_alive():
            raise StoppedError
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                result = function()
            except Exception as e:
                _tell(loop, _settle, future, None, e)
            else:
                _tell(loop, _settle, future, result, None)

        self._inbox.put(run)
        return await future

    def _submit(self, prompt: Sequence[int], options: Options, loop: asyncio.AbstractEventLoop, out: _Out) -> int:
        number = self._session.submit(prompt, options=options)
        self._outs[number] = loop, out
        return number

    def _leave(self, number: int, out: _Out) -> None:
        """A request that goes away before it was told its number is known by its queue."""
        if number < 0:
            number = next((n for n, (_, other) in self._outs.items() if other is out), -1)
        if self._outs.pop(number, None) is not None:
            self._session.cancel(number)

    def _run(self) -> None:
        while self._take():
            if not (self._session.active or self._session.waiting):
                continue
            try:
                self._deliver(self._session.step())
            except Exception as e:  # its message could hold a prompt, so it is not logged
                log.error("the engine failed (%s); its requests end, and it starts again", type(e).__name__)
                self._fail_all()
        self._fail_all()

    def _take(self) -> bool:
        """Does what was asked before now; waits for something if nothing runs. False: stop.

        What is asked meanwhile waits for the next step, so that those who ask again and again can't put it off.
        """
        try:
            wait = not (self._session.active or self._session.waiting)
            for _ in range(max(self._inbox.qsize(), 1)):
                task = self._inbox.get(block=wait)
                if task is None:
                    return False
                task()
                wait = False
        except queue.Empty:
            pass
        return True

    def _deliver(self, events: Sequence[tuple[int, Event]]) -> None:
        items: defaultdict[int, list[Item]] = defaultdict(list)
        for number, event in events:
            if number in self._outs:
                try:
                    items[number].append(self._with_passages(event))
                except Exception as e:  # of the index; the other requests go on
                    log.error("the passages of a request can't be read (%s); it ends", type(e).__name__)
                    items.pop(number, None)
                    self._fail(number)
        for number, each in items.items():
            if number in self._outs:
                loop, out = self._outs[number]
                if isinstance(last := each[-1], Finished):
                    del self._outs[number]
                    if last.reason == "error":  # what follows the colon could be a path
                        log.error("an answer ended early: %s", last.response.error.partition(":")[0])
                _tell(loop, out.put_nowait, each)

    def _with_passages(self, event: Event) -> Item:
        if isinstance(event, Retrieved):
            return Found(event, tuple(self.passages([hit.id for hit in event.hits])))
        if isinstance(event, Inserted):
            return Cited(self.passages([event.passage_id])[0], event.score)
        return event

    def passages(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, without text where one has gone since. Only on the thread, as `call` runs it."""
        try:
            return self.engine.index.get(ids)
        except KeyError:
            return [passage for id in ids for passage in (self.passage(id) or Passage(id, ""),)]

    def passage(self, id: str) -> Passage | None:
        """One passage, or None. Only on the thread."""
        try:
            return self.engine.index.get([id])[0]
        except KeyError:
            return None

    def _fail(self, number: int) -> None:
        loop, out = self._outs.pop(number)
        self._session.cancel(number)
        _tell(loop, out.put_nowait, FailedError())

    def _fail_all(self) -> None:
        for number in list(self._outs):
            self._fail(number)
        self._session = self.engine.session()


class Running:
    """A request that was taken.

    Args:
        worker: that works on it.
        started: the loop's time.
    """

    def __init__(self, worker: Worker, started: float):
        self.out, self.number = _Out(), -1
        self._worker, self._started = worker, started
        self._done = self._closed = False
        worker.open += 1

    async def steps(self) -> AsyncGenerator[list[Item], None]:
        """What happens to it, step by step. Raises FailedError if the engine failed."""
        while not self._done:
            items = await self.out.get()
            self._done = isinstance(items, Exception) or isinstance(items[-1], Finished)
            if isinstance(items, Exception):
                raise items
            yield items

    def close(self) -> None:
        """Gives its place back, and its row if it has not ended."""
        if not self._closed:
            self._closed = True
            seconds = asyncio.get_running_loop().time() - self._started
            self._worker.leave(self, seconds=seconds if self._done else None)


def _settle(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *values: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *values)
