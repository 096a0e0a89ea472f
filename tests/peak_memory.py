"""Run a federation of some size in a process of its own and tell its peak memory; Linux only.

Run: python tests/peak_memory.py FOLDER
"""

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from fedsp.auxiliary import SharedCell
from fedsp.batching import Batching
from fedsp.callbacks import FederatedCallback
from fedsp.client import ClientModule
from fedsp.data import FederatedDataModule
from fedsp.partition import IID
from fedsp.pretrained import BackboneSpec
from fedsp.server import ServerModule, SoftPromptSpec
from fedsp.sources import Files
from fedsp.stages import Stage
from tiny import GPT2, files, fit, make_data, make_trainer

# 4 layers of 3.15 M and 16.8 M of token embeddings, which are many bytes for little arithmetic
LARGE = {**GPT2, "vocab_size": 32_768, "n_positions": 256, "n_embd": 512, "n_layer": 4, "n_head": 8}
NUM_ROUNDS = 1


def make_parts(folder: Path) -> tuple[ServerModule, ClientModule, FederatedDataModule]:
    """Return a server, a client and data of which a round takes seconds and some 100 MB."""
    tokenizer, _ = files(folder)
    rows = folder / "long.jsonl"
    texts = [{"prompt": f"{i:040d}", "completion": f"{i:020d}"} for i in range(40)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    stage = Stage(steps=1)
    backbone = BackboneSpec(name_or_path=tokenizer, tokenizer=tokenizer, config=LARGE)
    server = ServerModule(backbone, SoftPromptSpec(10), stage, SharedCell())
    data = make_data(
        folder,
        clients=Files(str(rows)),
        partitioner=IID(num_clients=1),
        server=4,
        public=None,
        selection=None,
        test=None,
        batching=Batching(batch_size=4),
    )
    return server, ClientModule(stage, stage), data


class Gauge(FederatedCallback):
    """Notes the highest memory at every point of the run, in bytes."""

    def __init__(self) -> None:
        self.base = status("VmRSS")
        self.peaks: dict[str, int] = {}

    def _note(self, name: str) -> None:
        self.peaks.setdefault(name, status("VmHWM") - self.base)

    def on_fit_start(self, trainer: Any) -> None:
        self._note("prepared")

    def on_client_start(self, trainer: Any, round_idx: int, client_id: int) -> None:
        self._note(f"before client {client_id}, round {round_idx}")

    def on_client_end(self, trainer: Any, round_idx: int, client_id: int, stages: Any) -> None:
        self._note(f"client {client_id}, round {round_idx}")

    def on_server_train_end(self, trainer: Any, round_idx: int, result: Any) -> None:
        self._note(f"server, round {round_idx}")

    def on_fit_end(self, trainer: Any, report: dict[str, Any]) -> None:
        self._note("end")


def status(name: str) -> int:
    """Return an entry of this process's status in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def main(folder: Path) -> None:
    """Run a tiny federation, which loads all libraries, then the large one; print as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fit(folder / "tiny", folder / "tiny" / "run", num_rounds=1)
    server, client, data = make_parts(folder)
    gauge = Gauge()
    trainer = make_trainer(folder / "run", num_rounds=NUM_ROUNDS, callbacks=[gauge])
    trainer.fit(server, client, data)
    states = trainer.federation.executor.simulation.store.disk_bytes()
    print(json.dumps({"peaks": gauge.peaks, "states": states}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
