"""The processes of a run fail together: none waits for one that is gone, all say which and why.

A collective operation waits for every rank. A rank that raises therefore tells the others through
the store by which they found each other, and a thread in each of them listens.
"""

import os
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric import Fabric
from torch.distributed import DistError, distributed_c10d

_LISTEN_SECONDS = 0.5
# a rank that was told has so long to leave by itself, before it is ended
_GRACE_SECONDS = 20.0
# a rank that fails stays so long at most, for the others to hear of it
_FAREWELL_SECONDS = 5.0


class OtherRankFailedError(RuntimeError):
    """Another process of the run raised; the message names it and its error."""


@contextmanager
def failing_together(fabric: Fabric) -> Iterator[None]:
    """End a block on every rank as soon as it fails on one; else leave it together.

    Args:
        fabric: Launched. With one process nothing is done.

    Raises:
        OtherRankFailedError: If another rank raised; that rank raises its own error.
    """
    if fabric.world_size == 1:
        yield
        return
    watch = _Watch(fabric.global_rank, fabric.world_size)
    watch.start()
    try:
        yield
        watch.wait_for_all()
    except BaseException as error:
        if watch.failure is not None:
            raise OtherRankFailedError(watch.failure) from error
        watch.tell(error)
        if _is_lost_connection(error):
            raise OtherRankFailedError(
                f"another one of the {fabric.world_size} processes ended without a word: killed, "
                "or out of memory"
            ) from error
        raise
    finally:
        watch.stop()


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective operation failed since another rank is gone; gloo has no type for it."""
    text = str(error)
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError)
        and ("Connection closed by peer" in text or "Connection reset by peer" in text)
    )


class _Watch(threading.Thread):
    """Listens for the failure of another rank, and interrupts this one's work for it."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(name="fedsp-failures", daemon=True)
        self.failure: str | None = None
        self._rank, self._size = rank, size
        self._store: Any = distributed_c10d._get_default_store()
        # a process group may see several runs, one after the other on every rank
        use = self._store.add(f"fedsp/uses/{rank}", 1)
        self._failed = f"fedsp/{use}/failed"
        self._tellers, self._heard = f"fedsp/{use}/tellers", f"fedsp/{use}/heard"
        self._gone = f"fedsp/{use}/gone"
        self._through = [f"fedsp/{use}/through/{idx}" for idx in range(size)]
        self._stopped = threading.Event()

    def run(self) -> None:
        """Listen until stopped; after a failure see to it that this rank ends."""
        while not self._stopped.wait(_LISTEN_SECONDS):
            try:
                if not self._store.check([self._failed]):
                    continue
                told = self._store.get(self._failed).decode()
                self._store.add(self._heard, 1)
            except RuntimeError:
                if self._stopped.wait(_LISTEN_SECONDS):
                    return
                told = f"rank 0 of {self._size} ended without a word"
            self._end(told)
            return

    def _end(self, told: str) -> None:
        self.failure = told
        if self._stopped.is_set():
            return
        interrupt_main()
        if not self._stopped.wait(_GRACE_SECONDS):
            # in the middle of a collective operation that no signal reaches
            print(f"fedsp: error: {told}", file=sys.stderr, flush=True)
            os._exit(1)

    def tell(self, error: BaseException) -> None:
        """Tell the other ranks, and stay until they have heard."""
        self._stopped.set()
        try:
            if self._store.add(self._tellers, 1) > 1:
                self._store.add(self._heard, 1)
                return
            text = f"rank {self._rank} of {self._size} failed: {type(error).__name__}: {error}"
            self._store.set(self._failed, text)
            ends = time.monotonic() + _FAREWELL_SECONDS
            while self._store.add(self._heard, 0) < self._size - 1 and time.monotonic() < ends:
                time.sleep(_LISTEN_SECONDS / 5)
        except RuntimeError:
            return  # the store went with the first rank: who is left hears of that

    def wait_for_all(self) -> None:
        """Wait until every rank is through, however long another one still writes."""
        self._store.set(self._through[self._rank], "")
        while not self._store.check(self._through):
            time.sleep(_LISTEN_SECONDS / 5)
        self._stopped.set()
        self.join()
        # the store lives with the first rank, which therefore leaves last
        gone = self._store.add(self._gone, int(self._rank > 0))
        while self._rank == 0 and gone < self._size - 1:
            time.sleep(_LISTEN_SECONDS / 50)
            gone = self._store.add(self._gone, 0)

    def stop(self) -> None:
        """Listen no more."""
        self._stopped.set()
