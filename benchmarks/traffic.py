"""Bytes that a client and the server exchange in a round: FedSP against averaging weights.

Run: python benchmarks/traffic.py

The messages are made as in a run, from the shipped configurations over the quickstart's model, and
encoded; nothing is trained. FedAvg of the full model sends what `AllWeights` tunes. What a client
gets once, before its first round, is not in it.
"""

import tempfile
from pathlib import Path

from figure import Figure

from fedsp.cli import FederatedCLI
from fedsp.messages import ClientUpdate, ServerBroadcast, encode
from fedsp.payload import Payload
from fedsp.pretrained import hide_loading_bar
from fedsp.shipped import find_shipped, shipped_folder

# the first one is what the others are compared with; each sends the payload of its configuration
METHODS = {
    "FedSP": "fedsp",
    "FedAvg of the full model": "full_finetuning",
    "FedAvg of LoRA, rank 8": "fedlora",
}


def payload(method: str, run_dir: str) -> Payload:
    """Return what travels by a method's configuration over the quickstart's model."""
    quickstart = shipped_folder() / "quickstart.yaml"
    files = ["--config", str(quickstart), "--config", str(find_shipped("method", method))]
    server = FederatedCLI([*files, f"--trainer.run_dir={run_dir}"], run=False).model
    server.configure_model()
    server.start_tuning()
    tensors: Payload = server.payload()
    return tensors


def round_bytes(tensors: Payload) -> tuple[int, int]:
    """Return the bytes of a broadcast and of an update."""
    broadcast, update = ServerBroadcast(0, tensors), ClientUpdate(0, 0, tensors, num_examples=1)
    return len(encode(broadcast, "float32")), len(encode(update, "float32"))


def main() -> None:
    """Print the bytes and the ratios."""
    hide_loading_bar()
    print("bytes a client and round, float32         down           up")
    totals = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, method in METHODS.items():
            down, up = round_bytes(payload(method, str(Path(folder) / method)))
            totals[name] = down + up
            print(f"  {name:28} {down:15,d} {up:12,d}", flush=True)
    ours, *others = totals
    for name in others:
        ratio = totals[ours] / totals[name]
        print(Figure(f"bytes a client and round, {ours} / {name}", ratio).line())


if __name__ == "__main__":
    main()
