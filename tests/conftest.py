"""One thread per test process: the processes run side by side. A pass that fails is an error, not a dense graph."""

import gc
import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("MCTF_FAULTS", "raise")


def pytest_collection_finish() -> None:
    """What was imported stays: a collection of garbage need not go through it, thousands of times in a run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 10, 10)


@pytest.fixture
def faults_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that fails leaves the graph dense, as it does for users."""
    monkeypatch.delenv("MCTF_FAULTS")
