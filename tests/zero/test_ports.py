"""Ports for ranks to meet on: no two processes get the same, nor one that somebody listens on."""

from __future__ import annotations

import multiprocessing
import socket

import pytest

from titans_ds.errors import ConfigError
from titans_ds.zero import ports


def take(count: int, queue: multiprocessing.Queue, done: multiprocessing.Event) -> None:
    queue.put([ports.free_port() for _ in range(count)])
    done.wait(60)


def test_processes_side_by_side_get_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four take 30 each of 160, of which one is in use; then those of processes that have ended are free again."""
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue = context.Queue()
    done = context.Event()
    with socket.socket() as server:
        server.bind(("", ports.free_port()))
        server.listen()
        used = server.getsockname()[1]
        monkeypatch.setattr(ports, "_PORTS", range(used - 80, used + 80))
        workers = [context.Process(target=take, args=(30, queue, done)) for _ in range(4)]
        for worker in workers:
            worker.start()
        taken = [port for _ in workers for port in queue.get(timeout=60)]
        done.set()
        for worker in workers:
            worker.join()
        assert len(set(taken)) == 120
        assert used not in taken
        monkeypatch.setattr(ports, "_PORTS", sorted(taken))
        assert ports.free_port() in taken
        monkeypatch.setattr(ports, "_PORTS", range(used, used + 1))
        with pytest.raises(ConfigError, match="are in use"):
            ports.free_port()
