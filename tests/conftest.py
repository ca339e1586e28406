"""Settings of the whole test run: hypothesis profiles, threads, seeds, caches, no network."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["NMFX_CACHE"] = "0"  # no timing of an earlier run decides what a test sees

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter; it reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `make test` runs one worker per core: more threads per worker would only fight for the cores.
torch.set_num_threads(1)

# A derandomized profile fails today for what it fails for tomorrow; the deep one looks for more.
settings.register_profile(
    "ci", max_examples=50, deadline=None, derandomize=True, database=None, print_blob=True
)
settings.register_profile("deep", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("NMFX_HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _fresh_inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Inductor's cache on disk is keyed by the ops of a graph, not by what nmfx decomposes them to:
    # one left by an earlier run would hide a changed formula.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture
def flush_denormal() -> Iterator[None]:
    """Runs a test with the processor's flush-to-zero flags set, as some inference servers do."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no flush-denormal flag")
    yield
    torch.set_flush_denormal(False)
