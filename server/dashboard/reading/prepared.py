"""Files that take work to make: made once for as long as the run they tell of stays as it is."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

__all__ = ["Prepared"]


class Prepared:
    """Makes files on two threads of its own: whoever waits for one keeps no thread that serves pages.

    However many ask for the same file of the same run, it is made once.

    Args:
        folder: where files are kept, each in place of its older self.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="prepared")
        self._kept: dict[str, tuple[object, Future[Path]]] = {}
        self._guard = threading.Lock()

    async def file(self, name: str, stamp: object, make: Callable[[Path], None]) -> Path:
        """Return a file, made now or before.

        Args:
            name: of the file; one is kept of each.
            stamp: of what it is made from: another one makes the file anew.
            make: writes it to the path that it is given; runs on a thread of its own.

        Raises:
            Exception: whatever ``make`` raised, to everybody who waits; the next to ask tries again.
        """
        with self._guard:
            held = self._kept.get(name)
            if held is None or held[0] != stamp or _spoilt(held[1]):
                held = (stamp, self._workers.submit(self._make, name, make))
                self._kept[name] = held
        return await asyncio.wrap_future(held[1])

    def _make(self, name: str, make: Callable[[Path], None]) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, draft = tempfile.mkstemp(prefix="draft-", dir=self._folder)
        os.close(handle)
        try:
            make(Path(draft))
            # Whoever still downloads the older file keeps it until the end.
            return Path(draft).replace(self._folder / name)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise


def _spoilt(made: Future[Path]) -> bool:
    return made.done() and (made.exception() is not None or not made.result().is_file())
