"""What holds for every test: no network, two threads, the same random numbers."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_ANALYTICS_ENABLED="0"
)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not burn the cores that others work on
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import socket

import numpy as np
import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))

_connect = socket.socket.connect


def _local_only(self, address):
    """Tests reach this machine and nothing else; a forgotten download is an error, not a slow pass."""
    if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(
        ("127.", "::1", "localhost")
    ):
        raise OSError(f"a test tried to reach {address[0]}: tests have no network")
    return _connect(self, address)


@pytest.fixture(autouse=True)
def _quiet_and_seeded(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", _local_only)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
