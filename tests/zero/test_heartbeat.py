"""Ranks that fall silent are noticed, by those that watch them and those that are told; others are left be."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from titans_ds.errors import ConfigError
from titans_ds.training.run_folder import RunFolder
from titans_ds.zero import engine
from titans_ds.zero.heartbeat import LIMIT, LOST, Heartbeat, limit_seconds, lost_contact

SECONDS = 2.0


class Ranks:
    """Heartbeats of several ranks in this process, over a real store, and the codes that they left with."""

    def __init__(self, count: int, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.left: dict[int, int] = {}
        self.beats = [self._beat(rank, count) for rank in range(count)]
        for beat in self.beats:
            beat.start()

    def _beat(self, rank: int, count: int) -> Heartbeat:
        client = torch.distributed.TCPStore("127.0.0.1", self.server.port, is_master=False, wait_for_workers=False)
        return Heartbeat(client, "test", rank, count, self.seconds, lambda code: self.left.update({rank: code}))

    def wait(self, count: int) -> None:
        """Until so many have left."""
        limit = time.monotonic() + 30 * self.seconds
        while len(self.left) < count and time.monotonic() < limit:
            time.sleep(0.05)

    def stop(self) -> None:
        """All of them."""
        for beat in self.beats:
            beat.stop()


def test_all_others_leave_when_one_falls_silent(caplog: pytest.LogCaptureFixture) -> None:
    """Rank 0 sees who is silent and tells the others, who watch rank 0 alone. Two runs, side by side to save time."""
    last_words: dict[int, list[str]] = {0: [], 2: []}
    runs = {silent: Ranks(3) for silent in last_words}
    for silent, ranks in runs.items():
        ranks.beats[1].last_words = last_words[silent].append
    time.sleep(SECONDS * 1.5)
    assert [ranks.left for ranks in runs.values()] == [{}, {}]
    for silent, ranks in runs.items():
        ranks.beats[silent].stop()
    for silent, ranks in runs.items():
        ranks.wait(2)
        ranks.stop()
        assert ranks.left == dict.fromkeys({0, 1, 2} - {silent}, LOST)
        assert caplog.text.count(f"error: rank {silent} on ") == 2
        (words,) = last_words[silent]
        assert words.startswith(f"rank {silent} on ")
    assert caplog.text.count("--resume auto") == 4


def live_through_a_pause(told: multiprocessing.Queue) -> None:
    """Tells which of three ranks have left after a pause of this process, and then after one of them fell silent."""
    ranks = Ranks(3, seconds=1.0)
    told.put("running")
    before = time.monotonic()
    while time.monotonic() - before < 3:
        before = time.monotonic()
        time.sleep(0.01)
    time.sleep(2)
    told.put(dict(ranks.left))
    ranks.beats[1].stop()
    ranks.wait(2)
    ranks.stop()
    told.put(dict(ranks.left))


def test_ranks_that_were_suspended_together_go_on() -> None:
    """As a scheduler suspends a job, or a machine sleeps: nobody was silent, since nobody listened."""
    context = multiprocessing.get_context("spawn")
    told: multiprocessing.Queue = context.Queue()
    process = context.Process(target=live_through_a_pause, args=(told,))
    process.start()
    assert told.get(timeout=120) == "running"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(process.pid, signal.SIGCONT)
    assert told.get(timeout=60) == {}
    assert told.get(timeout=60) == {0: LOST, 2: LOST}
    process.join()


def test_a_store_that_is_gone_is_rank_0_gone() -> None:
    """Its host is."""
    ranks = Ranks(2)
    ranks.beats[0].stop()
    time.sleep(0.5)
    del ranks.server
    ranks.wait(1)
    ranks.stop()
    assert ranks.left == {1: LOST}


def test_a_failure_of_all_and_of_one() -> None:
    """With all failing, they can still talk to one another; with one, it must leave by itself."""
    ranks, found = Ranks(2), []
    threads = [threading.Thread(target=lambda b=b: found.append(b.failed_everywhere())) for b in ranks.beats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True, True]
    assert not ranks.beats[1].failed_everywhere(seconds=0.5)
    ranks.stop()


def test_which_errors_mean_a_lost_rank() -> None:
    gloo = (
        "[/src/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:5: Connection reset. This is typically caused by"
    )
    said = lost_contact(RuntimeError(gloo))
    assert said is not None
    assert said.endswith("lost contact with another rank (Read error [10.0.0.2]:5: Connection reset)")
    assert lost_contact(RuntimeError("shapes do not match")) is None


def test_the_limit_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0")
    assert limit_seconds() == 0
    for wrong in ("soon", "0.5", "-1"):
        monkeypatch.setenv(LIMIT, wrong)
        with pytest.raises(ConfigError, match="it must be seconds"):
            limit_seconds()


def test_a_request_to_stop_is_for_one_start(tmp_path: Path) -> None:
    """A run that goes on does not stop at once again."""
    folder = RunFolder.create(tmp_path / "run", "", overwrite=False)
    assert not folder.asked_to_stop
    (tmp_path / "run" / "stop").touch()
    assert folder.asked_to_stop
    assert not RunFolder.reopen(tmp_path / "run", "", 0, False).asked_to_stop


def test_a_rank_takes_its_gpu_before_the_first_collective_of_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL sends objects through the current GPU, and every rank starts with the first one."""
    order: list[str] = []
    monkeypatch.setenv("RANK", "0")
    fake = SimpleNamespace(init_distributed=lambda **_: order.append("init"))
    monkeypatch.setattr(engine, "import_deepspeed", lambda: fake)
    monkeypatch.setattr(engine, "local_device", lambda: order.append("device"))
    monkeypatch.setattr(engine, "start_heartbeat", lambda: order.append("objects"))
    engine.start_ranks()
    assert order == ["init", "device", "objects"]
