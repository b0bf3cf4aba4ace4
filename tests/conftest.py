"""Every test runs on one thread (workers that share cores would wait for each other), without a network."""

from __future__ import annotations

import os
import socket

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that opens a connection fails instead of downloading."""

    def refuse(self: socket.socket, address: object) -> None:
        raise OSError(f"tests use no network, found a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
