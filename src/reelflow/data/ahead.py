"""Where a reader stands among batches that are functions of their numbers, and the few that are made ahead of it."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from reelflow.errors import ConfigError

__all__ = ["Ahead"]

Built = TypeVar("Built")


class Ahead(Generic[Built]):
    """Batches in their order: every one, or each `parts`-th from `part` on.

    With `prefetch` > 0 at most that many are made ahead, in `threads` background threads. What `make` raises is raised by
    `next`, and the position stays. `consumed` counts the batches handed out by all readers together.
    """

    def __init__(self, make: Callable[[int], Built], *, prefetch: int, threads: int) -> None:
        self.make, self.prefetch, self.threads = make, prefetch, threads
        self.consumed, self.part, self.parts = 0, 0, 1
        self._ahead: deque[Future[Built]] = deque()
        self._workers: ThreadPoolExecutor | None = None

    def next(self) -> Built:
        built = self._from_workers() if self.prefetch else self.make(self.consumed + self.part)
        self.consumed += self.parts
        return built

    def deal(self, part: int, parts: int) -> None:
        """Hand out only batches `part`, `part` + `parts`, ... after those handed out so far.

        Raises:
            ConfigError: there is no such part.
        """
        if not 0 <= part < parts:
            raise ConfigError(f"the parts are 0 ... {parts - 1}, got {part}")
        self._forget()
        self.part, self.parts = part, parts

    def seek(self, consumed: int) -> None:
        """Go on as if so many had been handed out."""
        self._forget()
        self.consumed = consumed

    def close(self) -> None:
        """Stop the threads; `next` would start them again."""
        self._forget()
        if self._workers is not None:
            self._workers.shutdown(wait=True, cancel_futures=True)
            self._workers = None

    def _from_workers(self) -> Built:
        if self._workers is None:
            self._workers = ThreadPoolExecutor(max_workers=self.threads, thread_name_prefix="batches")
        while len(self._ahead) <= self.prefetch:  # the batch about to be handed out, and `prefetch` more
            number = self.consumed + self.part + self.parts * len(self._ahead)
            self._ahead.append(self._workers.submit(self.make, number))
        try:
            built = self._ahead[0].result()
        except BaseException:
            self._forget()
            raise
        self._ahead.popleft()
        return built

    def _forget(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
