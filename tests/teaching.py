"""Auxiliary models that are made and taught, and what stands in for the trainer."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from fedsp.distillation import Distillation
from fedsp.preparation import Preparation, prepare_auxiliary
from fedsp.server import ServerModule
from fedsp.stages import Stage
from tiny import adamw, make_data, make_server

STAGE = Stage(steps=20, optimizer=adamw(3e-3))


class Owner:
    """Stands in for the trainer and counts what it is told."""

    def __init__(self, seed: int = 0, precision: str = "32-true") -> None:
        self.seed, self.precision = seed, precision
        self.calls: list[tuple[Any, ...]] = []

    def call(self, hook: str, *args: Any) -> None:
        self.calls.append((hook, *args))

    @property
    def steps(self) -> int:
        return sum(hook == "on_distillation_step" for hook, *_ in self.calls)


def ready_data(folder: Path, **options: Any) -> Any:
    data = make_data(folder, **options)
    data.limit_tokens(60)
    data.setup("fit")
    return data


def loaded_server(folder: Path, distillation: Distillation | None, **options: Any) -> ServerModule:
    server = make_server(folder, initial_distillation=distillation, **options)
    server.configure_model()
    return server


def prepare(
    folder: Path,
    run: str,
    distillation: Distillation | None,
    owner: Owner | None = None,
    data: Any = None,
    **options: Any,
) -> Preparation:
    server = loaded_server(folder, distillation, **options)
    (folder / run).mkdir(exist_ok=True)
    return prepare_auxiliary(
        Fabric(accelerator="cpu", devices=1),
        server,
        data or ready_data(folder),
        kept=folder / run / "auxiliary.safetensors",
        trainer=owner or Owner(),
    )


def same(one: Preparation, other: Preparation) -> bool:
    states = [prepared.auxiliary.state() for prepared in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()
    )


def cached_files(cache: Path) -> list[Path]:
    return sorted((cache / "auxiliary").glob("*"))
