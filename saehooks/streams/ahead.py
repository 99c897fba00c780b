"""Making the next items beside the work on this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, in order, made by a thread that is at most ``depth`` of them ahead.

    What the items' maker raises is raised here, at its place. Closing the iterator ends the thread.
    """
    made: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def put(what: str, value: Item | BaseException | None = None) -> bool:
        while not closed.is_set():
            try:
                made.put((what, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end")
        except BaseException as error:
            put("error", error)

    worker = threading.Thread(target=work, name="saehooks-ahead", daemon=True)
    worker.start()
    try:
        while True:
            what, value = made.get()
            if what == "end":
                return
            if what == "error":
                raise value  # type: ignore[misc]
            yield value  # type: ignore[misc]
    finally:
        closed.set()
        worker.join()
