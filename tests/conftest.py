"""What holds for every test: no network, and nothing printed by progress bars or forked tokenizers."""

import os
import socket

import pytest

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before tokenizers is imported; it warns after a fork otherwise
connect = socket.socket.connect


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections that leave this machine fail as they do without a network."""

    def connect_locally(self, address):
        host = address[0] if isinstance(address, tuple) else "localhost"  # a str is a Unix socket's path
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"tests work without a network, but one asked for {host}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
