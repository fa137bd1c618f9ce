"""Ranks give signs of life, so that none waits for ever for one whose node is gone.

A collective with a rank that has vanished without a goodbye (power, network, a frozen process) waits until its
timeout, which must be hours, since one rank may pack a corpus or write a large checkpoint while the others wait. So
every rank counts up a key in the store of torch.distributed from a thread of its own. Rank 0 watches all of them, the
others rank 0 and its verdict: a beat costs each rank a few small messages, and rank 0 one a rank. Whoever misses
another for the limit logs it and ends its process; the launcher does the same with the rest of its node. Time in which
a process itself stood still (suspended by its scheduler, or on a machine that was) does not count: it could not listen.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

from torch import distributed as dist

from titans_ds.errors import ConfigError

LOST = 75  # exit code where another rank was lost: EX_TEMPFAIL, worth another try
LIMIT = "TITANS_HEARTBEAT_SECONDS"
DEFAULT_LIMIT = 40.0
_TICK = 0.25  # seconds between looks at the clock
ADVICE = (
    "Its node or the network failed, or the process was killed or froze. This run has ended here, too; it goes on from "
    "its newest checkpoint with --resume auto. On another number of ranks, first: "
    "python launch/universal_checkpoint.py RUN"
)
logger = logging.getLogger("titans_ds")
_current: list[Heartbeat] = []


def start_heartbeat() -> None:
    """Start this rank's, once torch.distributed runs; a collective. Nothing on one rank, or where switched off."""
    limit = limit_seconds()
    if not limit or dist.get_world_size() == 1 or _current:
        return
    session: list[Any] = [uuid.uuid4().hex]  # under torchrun a store outlives its ranks
    dist.broadcast_object_list(session, src=0)
    timeout = timedelta(seconds=limit)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    client: Any = cast(Any, dist).TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    _current.append(Heartbeat(client, str(session[0]), dist.get_rank(), dist.get_world_size(), limit))
    _current[0].start()
    atexit.register(stop_heartbeat)


def stop_heartbeat() -> None:
    """Stop this rank's, when all ranks have come to their end."""
    while _current:
        _current.pop().stop()


def on_loss(task: Callable[[str], None]) -> None:
    """A task for when another rank is lost, given the message; it has five seconds."""
    for heartbeat in _current:
        heartbeat.last_words = task


def failed_everywhere() -> bool:
    """Called by a rank that fails: whether within some seconds all of them do, as with a mistake in the settings.

    If not, the others are at their work, and no collective can be had with them any more.
    """
    return _current[0].failed_everywhere() if _current else True


def limit_seconds() -> float:
    """How long a rank may give no sign of life: TITANS_HEARTBEAT_SECONDS, by default 40; 0 switches heartbeats off.

    Raises:
        ConfigError: it is no such number.
    """
    text = os.environ.get(LIMIT, str(DEFAULT_LIMIT))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if limit < 0 or 0 < limit < 1:
        raise ConfigError(f"the environment variable {LIMIT} is {text!r}; it must be seconds, 1 or more, or 0 for none")
    return limit


class Heartbeat:
    """One rank's signs of life, and its watch over others.

    Args:
        store: a torch.distributed.Store, over a connection of its own.
        session: of this start of the ranks.
        rank: this one.
        world_size: number of ranks.
        limit: seconds.
        leave: ends the process.
    """

    def __init__(
        self,
        store: Any,
        session: str,
        rank: int,
        world_size: int,
        limit: float,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.store, self.rank, self.world_size, self.limit, self.leave = store, rank, world_size, limit, leave
        self.last_words: Callable[[str], None] | None = None
        self._prefix, self._ended = f"titans_ds/{session}", threading.Event()
        self._clock = WakingClock(max(0.5, limit / 20))
        self._contact, self._verdict, self._failures = self._clock.now(), "", 0
        watched = range(1, world_size) if rank == 0 else range(1)
        tasks = (self._beat, self._watch)
        self._threads = [threading.Thread(target=t, name=f"heartbeat{t.__name__}", daemon=True) for t in tasks]
        self._counts, self._changed = dict.fromkeys(watched, -1), dict.fromkeys(watched, self._contact)

    def start(self) -> None:
        """Begin to count and to watch, in a thread each."""
        self.store.set(f"{self._prefix}/host/{self.rank}", socket.gethostname())
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, and let the others be. A thread in the midst of a call at Python's end would abort the process."""
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def failed_everywhere(self, seconds: float = 10.0) -> bool:
        """See the function of that name; on its own connection to the store, as everything here."""
        self._failures += 1
        key, limit = f"{self._prefix}/failed/{self._failures}", time.monotonic() + seconds
        try:
            failed = self.store.add(key, 1)
            while failed < self.world_size and time.monotonic() < limit:
                time.sleep(0.1)
                failed = self.store.add(key, 0)
        except Exception:  # the store is gone, and rank 0 with it
            return False
        return bool(failed >= self.world_size)

    def _beat(self) -> None:
        while not self._ended.wait(min(self.limit / 8, 5.0)):
            try:
                self._exchange()
                self._contact = self._clock.now()
            except Exception:  # the store does not answer: _watch decides when that is too long
                continue

    def _exchange(self) -> None:
        self.store.add(f"{self._prefix}/{self.rank}", 1)
        for other in self._counts:
            self._look_at(other)
        verdict = f"{self._prefix}/verdict"
        if self._verdict and self.rank == 0:
            self.store.set(verdict, self._verdict)
        elif self.rank != 0 and self.store.check([verdict]):
            self._verdict = self.store.get(verdict).decode()

    def _look_at(self, other: int) -> None:
        count = self.store.add(f"{self._prefix}/{other}", 0)
        now = self._clock.now()
        if count != self._counts[other]:
            self._counts[other], self._changed[other] = count, now
        elif now - self._changed[other] > self.limit and not self._verdict:
            host = f"{self._prefix}/host/{other}"
            name = self.store.get(host).decode() if self.store.check([host]) else "a host that never answered"
            self._verdict = self._silent(f"rank {other} on {name}", now - self._changed[other])

    def _watch(self) -> None:
        """Apart from _beat, which may be stuck in a call to a store that is gone."""
        while not self._ended.wait(_TICK):
            silence = self._clock.now() - self._contact
            if silence > self.limit + 2 and not self._verdict:
                self._verdict = self._silent(f"rank 0 on {os.environ.get('MASTER_ADDR', 'its host')}", silence)
            if self._verdict:
                if self.rank == 0:
                    self._ended.wait(min(self.limit / 8, 5.0) + 1)  # the store is here: let the others hear of it
                say_lost(self._verdict, self.last_words)
                self.leave(LOST)
                return

    def _silent(self, who: str, seconds: float) -> str:
        return f"{who} has given no sign of life for {seconds:.0f} s"


class WakingClock:
    """Seconds in which this process runs, for threads that look at it every _TICK.

    Args:
        still: seconds without a look that mean that the process stood still; they count as one tick, not as none, lest
            a process whose threads seldom come to run never loses patience.
    """

    def __init__(self, still: float) -> None:
        self._still, self._lock, self._looked, self._missed = still, threading.Lock(), time.monotonic(), 0.0

    def now(self) -> float:
        """Like time.monotonic, without the time in which the process stood still."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked > self._still:
                self._missed += now - self._looked - _TICK
            self._looked = now
            return now - self._missed


def say_lost(what: str, last_words: Callable[[str], None] | None = None) -> None:
    """Log what was lost and what to do; then have the last words, if that takes no longer than five seconds."""
    message = f"{what}. {ADVICE}"
    logger.error("error: %s", message)
    if last_words is not None:
        thread = threading.Thread(target=last_words, args=(message,), daemon=True)
        thread.start()
        thread.join(5)
    sys.stdout.flush()


def lost_contact(error: BaseException) -> str | None:
    """What an error of a collective says, if it is that another rank is gone, or can't be reached any more."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if not isinstance(error, dist.DistError) and "gloo/transport" not in text:
        return None
    here = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
    text = re.sub(r"^\[\S+:\d+\]\s*", "", text).split(". This is typically", maxsplit=1)[0]
    return f"{here} lost contact with another rank ({text})"
