"""What every test stands on: offline, seeded, one thread, no traces left in the environment."""

import atexit
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Set before the imports below: torch, transformers, datasets and wandb read these on import.
_SCRATCH = Path(tempfile.mkdtemp(prefix="fedsp-tests-"))
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith(("WANDB_", "HF_", "FEDSP_", "PL_"))]:
    del os.environ[_name]
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HOME": str(_SCRATCH / "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "XDG_CACHE_HOME": str(_SCRATCH / "cache"),
}

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# What pytest, torch, Lightning and wandb set as part of their work; it is undone like the rest.
_SET_BY_LIBRARIES = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",
        "KMP_DUPLICATE_LIB_OK",
        "KMP_INIT_AT_FORK",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "PL_GLOBAL_SEED",
        "PL_SEED_WORKERS",
        "PYTEST_CURRENT_TEST",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "RANK",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "WANDB_MODE",
        "WANDB_SERVICE",
        "WORLD_SIZE",
    }
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="needs --slow")
    for item in items:
        for marker, skip in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    # Bytes may hold the time (gzip's header does): the processes would not agree on a test's name.
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    """Seed the global streams, so that a test's outcome does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment_is_left_as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the environment after a test and fail the test that changed it behind our back.

    Changes made through `monkeypatch` are fair: they are undone before the comparison.
    """
    before = dict(os.environ)
    yield
    monkeypatch.undo()
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    leaked = sorted(changed - _SET_BY_LIBRARIES)
    assert not leaked, f"the test left these environment variables changed: {leaked}"


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse connections that would leave this machine, and names that need a resolver."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex
    getaddrinfo = socket.getaddrinfo

    def refuse_foreign(host: object) -> None:
        if host not in {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname()}:
            # Not an OSError: that is what retry loops swallow.
            raise RuntimeError(f"a test tried to reach {host!r}; tests run without a network")

    def guard(original):
        def connect_locally(self, address):
            if self.family in {socket.AF_INET, socket.AF_INET6}:
                refuse_foreign(address[0])
            return original(self, address)

        return connect_locally

    def resolve_locally(host, *args, **kwargs):
        refuse_foreign(host.decode() if isinstance(host, bytes) else host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(connect))
        patch.setattr(socket.socket, "connect_ex", guard(connect_ex))
        patch.setattr(socket, "getaddrinfo", resolve_locally)
        yield
