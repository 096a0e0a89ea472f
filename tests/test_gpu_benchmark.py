"""The GPU benchmark in its smallest size on the CPU, and its count of operations."""

import json
import sys
from pathlib import Path

import pytest
from lightning.fabric import Fabric
from torch.utils.flop_counter import FlopCounterMode

from fedsp.backbone import load_backbone
from fedsp.pretrained import BackboneSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
from gpu_flops import StageName, peak_flops, step_flops
from gpu_sides import Architecture, FedspSide, Text, load, sgd, step_sizes

ARCHITECTURES = {kind: Architecture(kind, 3, 2, 16, 40) for kind in ("gpt2", "opt")}
TEXT = Text(batch=2, tokens=10, labels=3)


def test_it_runs_through_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--smallest", "--json", str(tmp_path / "gpu.json")])
    assert "no figures of a GPU" in capsys.readouterr().out
    measured = json.loads((tmp_path / "gpu.json").read_text())
    assert not measured["is_gpu"]
    assert all(record["close"] for record in measured["numerics"])
    speed = measured["speed"]
    assert len(speed) == 2 * len(gpu.STAGES)
    assert all(row["same"] > 0.99 for row in speed)
    assert all(row["fedsp_seconds"] > 0 and row["bare_seconds"] > 0 for row in speed)


@pytest.mark.parametrize("stage", gpu.STAGES)
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_operations_are_those_that_torch_counts(
    architecture: Architecture, stage: StageName
) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    # eager attention is plain matrix products, of all pairs: torch counts each of them
    spec = BackboneSpec(config=architecture.config, attn_implementation="eager")
    _, prefix = load(architecture, 4, fabric, "float32")
    side = FedspSide(fabric, load_backbone(spec), prefix, stage, 1, sgd)
    batches = TEXT.draw(architecture.vocabulary, 1, seed=0)
    with FlopCounterMode(display=False) as counter:
        side.run(batches)
    pairs = TEXT.batch * TEXT.tokens * (4 + TEXT.tokens)
    sizes = step_sizes(architecture, TEXT, 4)
    assert counter.get_total_flops() == step_flops(sizes, stage, pairs)


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_computes() -> None:
    assert all(record["close"] for record in gpu.check_numerics("cuda"))


def test_tokens_see_the_prompt_and_the_text_up_to_themselves() -> None:
    # 2 rows of 4 virtual and 1 to 10 text keys
    assert step_sizes(ARCHITECTURES["gpt2"], TEXT, 4).seen_pairs == 2 * (10 * 4 + 55)


def test_devices_are_found_by_their_names() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GeForce GTX 1080") is None
