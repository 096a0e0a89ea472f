"""Several processes on this machine that form one run, as torchrun would start them.

They are forked from a server that has paid for the imports once.
"""

import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsp.baseline import ServerOnlyBaseline
from fedsp.state_files import load_state
from tiny import fit

PRELOADED = [
    "fedsp.trainer",
    "transformers.models.gpt2.modeling_gpt2",
    "peft",
    "datasets.packaged_modules.json.json",
]
SECONDS = 120
TOLERANCE = 1e-4


def run_ranks(
    function: Callable[..., Any], folder: Path, *args: Any, size: int = 2, fails: bool = False
) -> list[dict[str, Any]]:
    """Call a module's function on every rank, and return what it returned as JSON.

    Args:
        function: Called with `args`.
        folder: For the processes' outputs.
        args: Arguments, which must survive a pickle.
        size: Number of ranks.
        fails: Every rank must end with an error, whose text is returned as `error`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"rank-{rank}.json" for rank in range(size)]
    processes = [
        context.Process(target=_child, args=(rank, size, port, outputs[rank], function, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, "a process never came to its end"
    results = [json.loads(path.read_text()) if path.exists() else {} for path in outputs]
    statuses = [process.exitcode for process in processes]
    assert all((status != 0) == fails for status in statuses), (statuses, results)
    return results


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _child(
    rank: int, size: int, port: int, output: Path, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
    }
    try:
        result = function(*args)
    except BaseException as error:
        traceback.print_exc()
        output.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        sys.exit(1)
    output.write_text(json.dumps(result))


def federation(folder: Path, run_dir: Path, devices: int, **options: Any) -> dict[str, Any]:
    """Run a tiny federation as one of `devices` ranks; its rounds, its prompt, all bit for bit."""
    callbacks = [ServerOnlyBaseline()]
    trainer = fit(folder, run_dir, **{"callbacks": callbacks, "devices": devices, **options})
    rounds = [
        {name: value for name, value in metrics.items() if "second" not in name}
        for metrics in trainer.history.rounds
    ]
    payload = trainer.server.payload()
    return {
        "rounds": rounds,
        "zero_shot": trainer.history.zero_shot,
        "payload": {name: tensor.flatten().tolist() for name, tensor in payload.items()},
    }


def assert_close(one: Any, other: Any, where: str = "") -> None:
    """Equal but for rounding; wall-clock seconds aside."""
    if isinstance(one, Mapping):
        assert one.keys() == other.keys(), where
        for key in one:
            if "second" not in str(key):
                assert_close(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for idx, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_close(left, right, f"{where}/{idx}")
    elif isinstance(one, Tensor):
        assert one.shape == other.shape, where
        assert torch.allclose(one.double(), other.double(), atol=TOLERANCE, rtol=0), where
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=TOLERANCE, nan_ok=True), where
    else:
        assert one == other, where


def state(run_dir: Path, rounds: int) -> Any:
    return load_state(run_dir / "checkpoints" / f"round-{rounds:06d}.safetensors")
