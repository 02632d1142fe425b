"""Jobs: work in a thread that says how far it is, that can be stopped, and that fails alone."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator

_END = object()


class Stopped(Exception):
    """Somebody has cancelled the job."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """How far a job is.

    Attributes:
      text: what is done next.
      done: which fraction of the job is done.
    """

    text: str
    done: float


class Job:
    """Work for one visitor.

    Jobs that share a device wait for each other: one works at a time, even if one that was stopped
    still finishes its step.

    Args:
      device: the lock of the device.
    """

    def __init__(self, device: threading.Lock):
        self._device = device
        self._said: queue.SimpleQueue = queue.SimpleQueue()
        self._stop = threading.Event()
        self._error: BaseException | None = None

    def say(self, what) -> None:
        """Tells the visitor something.

        Raises:
          Stopped: the job has been cancelled.
        """
        if self._stop.is_set():
            raise Stopped
        self._said.put(what)

    def stop(self) -> None:
        """The work ends the next time that it says something."""
        self._stop.set()

    def follow(self, work: Callable[["Job"], None]) -> Iterator:
        """Starts the work and yields what it says. Whoever stops listening stops the work.

        Raises:
          Stopped: the job has been cancelled.
          Exception: whatever the work raises.
        """
        threading.Thread(target=self._run, args=(work,), daemon=True).start()
        try:
            while (said := self._said.get()) is not _END:
                yield said
        finally:
            self.stop()
        if self._error is not None:
            raise self._error

    def _run(self, work) -> None:
        try:
            with self._device:
                if self._stop.is_set():
                    raise Stopped
                work(self)
        except BaseException as error:  # it is raised where the visitor listens
            self._error = error
        self._said.put(_END)


class Desk:
    """The jobs of all visitors, by session; a visitor has one job at a time."""

    def __init__(self):
        self._device = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def open(self, session: str) -> Job:
        """A new job; the session's earlier one is stopped."""
        self.stop(session)
        self._jobs[session] = Job(self._device)
        return self._jobs[session]

    def stop(self, session: str) -> None:
        """Stops the session's job, if it has one."""
        if job := self._jobs.pop(session, None):
            job.stop()
