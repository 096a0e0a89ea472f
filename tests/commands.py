"""The `fedsp` command in this process, over a configuration of the tiny federation."""

import contextlib
import copy
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import tiny
from fedsp.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left behind: exit status and both streams."""

    status: int
    out: str
    err: str


def command(*args: object) -> Outcome:
    """Run `fedsp ARGS` and catch how it ends."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            status = int(end.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


def of_class(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, **({"init_args": init_args} if init_args else {})}


def make_config(folder: Path) -> dict[str, Any]:
    """Return a configuration in which every choice is made by its class path."""
    tokenizer, rows = tiny.files(folder)
    adamw = partial(of_class, "torch.optim.AdamW", lr=0.01, weight_decay=0.0)
    server = {
        "backbone": {"name_or_path": tokenizer, "config": tiny.GPT2},
        "soft_prompt": {
            "num_virtual_tokens": 4,
            "initializer": of_class("fedsp.soft_prompt.TextInit"),
        },
        "training": {
            "steps": 2,
            "optimizer": adamw(),
            "lr_scheduler": of_class("fedsp.schedules.LinearWarmup", warmup_fraction=0.2),
        },
        "auxiliary": of_class("fedsp.auxiliary.KeptLayers", num_layers=2),
        "initial_distillation": {"stage": {"steps": 2}, "cache_dir": ""},
    }
    data = {
        "clients": of_class("fedsp.sources.Files", paths=rows),
        "task": of_class("fedsp.tasks.PromptCompletion"),
        "partitioner": of_class("fedsp.partition.IID", num_clients=3),
        "server": 20,
        "public": 20,
        "selection": 12,
        "test": 12,
        "batching": {"batch_size": 4},
        "cache_dir": str(folder / "cache"),
    }
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "num_rounds": 2,
            "run_dir": str(folder / "run"),
            "enable_progress_bar": False,
            "sampler": of_class("fedsp.sampling.UniformSampler", clients_per_round=2),
            "aggregator": of_class("fedsp.aggregation.StreamingMean", weight_by_examples=True),
            "server_optimizer": of_class("torch.optim.SGD", lr=1.0, momentum=0.5),
            "callbacks": [of_class("fedsp.baseline.ServerOnlyBaseline")],
            "logger": ["fedsp.tracking.csv_logger"],
        },
        "model": of_class("fedsp.server.ServerModule", **server),
        "client": of_class(
            "fedsp.client.ClientModule",
            auxiliary={"steps": 1},
            soft_prompt={"steps": 2, "optimizer": adamw()},
        ),
        "data": of_class("fedsp.data.FederatedDataModule", **data),
    }


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with values at dotted paths set; `init_args` is part of a path."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = config
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return config


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
