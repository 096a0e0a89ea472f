"""Several processes on this machine that form one run, as torchrun would start them.

They are forked from a server that has paid for the imports once.
"""

import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PRELOADED = [
    "fedsp.trainer",
    "transformers.models.gpt2.modeling_gpt2",
    "peft",
    "datasets.packaged_modules.json.json",
]
SECONDS = 120


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
