"""One thread per test process: the processes run side by side. A pass that fails is an error, not a dense graph."""

import gc
import os

# Read when torch is imported, in the processes that tests start as well.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

import pytest
import torch
from torch._dynamo import guards

# What is made while modules are imported stays; see below.
gc.disable()
torch.set_num_threads(1)
os.environ.setdefault("MCTF_FAULTS", "raise")
# Dynamo times the guards of everything that it compiles, in an emptied cache, for its log alone.
guards.profile_guard_manager = lambda *_: 0.0


def pytest_collection_finish() -> None:
    """What was imported stays: a collection of garbage need not go through it, thousands of times in a run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 10, 10)
    gc.enable()


@pytest.fixture
def faults_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that fails leaves the graph dense, as it does for users."""
    monkeypatch.delenv("MCTF_FAULTS")
