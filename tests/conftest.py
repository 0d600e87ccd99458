"""Seeds, and memory that shows when it is read without having been written."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve tests on a shared machine

import pytest
import torch

from gate4d.kernels.attention import backends
from gate4d.kernels.attention.op import Request


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "kernel: exercises the C++ kernels' arithmetic; run again for every instruction set and sanitizer"
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Verdicts on kernels, right or broken on purpose, stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("GATE4D_CACHE_DIR", str(tmp_path_factory.mktemp("gate4d-cache")))
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every tensor that torch allocates without a value, also from C++, is full of NaN (integers: the largest)."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that computes gates; skipped with the backend's own reasons where it cannot run at all."""
    return require_backend(request.param)


def require_backend(name: str, module: bool = False) -> str:
    """The name, or a skip of the test (or of the whole module) with the backend's reasons."""
    plain = Request("cpu", torch.float32, 64, 64, gate="pairwise", masked=True, aux=True)
    if reasons := backends.BACKENDS[name].not_supported_reasons(plain):
        pytest.skip(f"backend {name}: {'; '.join(reasons)}", allow_module_level=module)
    return name
