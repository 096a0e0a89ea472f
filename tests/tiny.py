"""A federation small enough for tests: a random-weight GPT-2 and sums as questions."""

import json
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from fedsp.batching import Batching
from fedsp.client import ClientModule
from fedsp.data import FederatedDataModule
from fedsp.distillation import Distillation
from fedsp.examples import Example
from fedsp.messages import ServerBroadcast
from fedsp.partition import IID
from fedsp.pretrained import BackboneSpec
from fedsp.sampling import UniformSampler
from fedsp.schedules import LinearWarmup
from fedsp.server import ServerModule, SoftPromptSpec
from fedsp.soft_prompt import TextInit
from fedsp.sources import Files
from fedsp.stages import Stage
from fedsp.tasks import PromptCompletion
from fedsp.trainer import FederatedTrainer

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 257,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}


def write_tokenizer(folder: Path) -> str:
    """Write a byte-level tokenizer without merges: 256 bytes and an end-of-text token."""
    vocab = {character: idx for idx, character in enumerate(sorted(ByteLevel.alphabet()))}
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(
        folder
    )
    return str(folder)


def write_rows(path: Path, count: int = 120) -> str:
    """Write additions as prompt and completion, one JSON object a line."""
    rows = (
        {"prompt": f"{a}+{b}=", "completion": str(a + b)}
        for a, b in ((i % 13, i // 13) for i in range(count))
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@cache
def files(folder: Path) -> tuple[str, str]:
    """Tokenizer folder and data file, written once a folder, whatever processes share it."""
    tokenizer, rows = folder / "tokenizer", folder / "rows.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        if not tokenizer.exists():
            with suppress(OSError):  # another process was faster
                Path(write_tokenizer(Path(made, "tokenizer"))).rename(tokenizer)
        if not rows.exists():
            Path(write_rows(Path(made, "rows.jsonl"))).replace(rows)
    return str(tokenizer), str(rows)


def adamw(lr: float) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def make_server(folder: Path, **options: Any) -> ServerModule:
    tokenizer, _ = files(folder)
    defaults: dict[str, Any] = {
        "backbone": BackboneSpec(name_or_path=tokenizer, tokenizer=tokenizer, config=GPT2),
        "soft_prompt": SoftPromptSpec(num_virtual_tokens=4, initializer=TextInit(), dropout=0.1),
        "training": Stage(steps=2, optimizer=adamw(1e-2), lr_scheduler=LinearWarmup),
        "initial_distillation": Distillation(Stage(steps=4), cache_dir=""),
    }
    return ServerModule(**{**defaults, **options})


def make_client(**options: Any) -> ClientModule:
    defaults: dict[str, Any] = {
        "auxiliary": Stage(steps=1, optimizer=adamw(1e-3)),
        "soft_prompt": Stage(steps=2, optimizer=adamw(1e-2), lr_scheduler=LinearWarmup),
        "dropout": 0.1,
    }
    return ClientModule(**{**defaults, **options})


def make_data(folder: Path, **options: Any) -> FederatedDataModule:
    tokenizer, rows = files(folder)
    defaults: dict[str, Any] = {
        "clients": Files(rows),
        "task": PromptCompletion(),
        "partitioner": IID(num_clients=3),
        "server": 20,
        "public": 20,
        "selection": 12,
        "test": 12,
        "batching": Batching(batch_size=4),
        "tokenizer": tokenizer,
        "cache_dir": str(folder / "cache"),
    }
    return FederatedDataModule(**{**defaults, **options})


def make_trainer(run_dir: Path, **options: Any) -> FederatedTrainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "num_rounds": 3,
        "run_dir": str(run_dir),
        "enable_progress_bar": False,
    }
    return FederatedTrainer(**{**defaults, **options})


def fit(folder: Path, run_dir: Path, **options: Any) -> FederatedTrainer:
    """Run the default tiny federation and return its trainer."""
    ckpt_path = options.pop("ckpt_path", None)
    server = options.pop("server", None) or make_server(folder)
    client = options.pop("client", None) or make_client()
    data = options.pop("data", None) or make_data(folder)
    trainer = make_trainer(run_dir, **options)
    trainer.fit(server, client, data, ckpt_path=ckpt_path)
    return trainer


def loaded_server(folder: Path, dropout: float = 0.0, **options: Any) -> ServerModule:
    """A server with its model and a prompt of 4 virtual tokens."""
    server = make_server(folder, soft_prompt=SoftPromptSpec(4, dropout=dropout), **options)
    server.configure_model()
    return server


def loaded_client(server: ServerModule, **options: Any) -> ClientModule:
    """A client with a server's auxiliary model and prompt."""
    client = make_client(**options)
    backbone, prompt = server.require_model()
    client.install(server.auxiliary_recipe.build(backbone), prompt.num_virtual_tokens)
    client.receive(ServerBroadcast(0, {"soft_prompt": prompt.prefix()}))
    return client


def examples(count: int, seed: int = 0, prompt: int = 6, completion: int = 3) -> list[Example]:
    """Random token ids, so many of a prompt and of its completion."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 250, (count, prompt + completion), generator=generator).tolist()
    return [Example(row[:prompt], [row[prompt:]], 0, [completion]) for row in ids]


def fit_with_states(folder: Path, run_dir: Path, num_rounds: int) -> None:
    """Run a federation that keeps all kinds of states, or go on with it.

    Two of three clients a round, FedAdam, reparameterised prompts, trained auxiliary models.
    """
    fit(
        folder,
        run_dir,
        ckpt_path="last" if run_dir.exists() else None,
        num_rounds=num_rounds,
        sampler=UniformSampler(clients_per_round=2),
        server_optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        server=make_server(
            folder, soft_prompt=SoftPromptSpec(4, TextInit(), reparameterization_size=3)
        ),
        client=make_client(auxiliary=Stage(1, adamw(1e-3)), dropout=0.2, reparameterization_size=3),
    )
