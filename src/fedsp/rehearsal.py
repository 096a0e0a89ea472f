"""A few real steps of every kind, to know what a run's steps cost: time and memory.

The models are trained for these steps and left so; nothing is written. What follows from the
figures is decided elsewhere.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from fedsp.auxiliary import Auxiliary
from fedsp.client import ClientModule
from fedsp.evaluation_loops import evaluate
from fedsp.memory_probe import LiveTensors, tensor_bytes
from fedsp.messages import ServerBroadcast
from fedsp.phases import (
    Batches,
    ClientTurn,
    Optimization,
    distill,
    train_client,
    train_server,
)
from fedsp.quality import QUALITY_BATCHES, measure_quality
from fedsp.stages import Stage
from fedsp.state_files import decode_state, encode_state
from fedsp.vocabulary import IGNORED_LABEL

TIMED_STEPS = 2
# so many batches of a stream tell what its mean and its largest batch are
_BATCHES_LOOKED_AT = 50
_CLIENTS_LOOKED_AT = 8
# before a batch is timed or measured, one makes the optimizer's state and warms up
_ALL_STEPS = 2 + TIMED_STEPS
_FLOAT_BYTES = 4

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """What one kind of step costs.

    Args:
        seconds: Wall time of a batch of the mean size.
        step_bytes: Most memory that the largest batch takes beside models and optimizer state.
        logits_bytes: Part of it for logits and their gradient or log-likelihoods.
        optimizer_bytes: Optimizer state.
    """

    seconds: float
    step_bytes: int
    logits_bytes: int
    optimizer_bytes: int = 0


@dataclass(frozen=True)
class ClientCost:
    """What a client's turn costs.

    Args:
        stages: By the stage that its pass over the data ends with.
        state_bytes: File of what a client keeps between rounds; 0 where it keeps nothing.
        model_bytes: What of it is not the optimizers'.
        state_seconds: Time to pack and unpack it.
    """

    stages: dict[str, Cost] = field(default_factory=dict)
    state_bytes: int = 0
    model_bytes: int = 0
    state_seconds: float = 0.0


@dataclass(frozen=True)
class Sample:
    """Batches that stand for a stream.

    Args:
        largest: The one with the most places, padding included.
        typical: Those nearest to the mean.
        scale: Places of a mean batch over those of a typical one.
        num_batches: Batches that were looked at.
    """

    largest: Batch
    typical: list[Batch]
    scale: float
    num_batches: int


def rehearse_quality(trainer: Any, auxiliary: Auxiliary) -> int:
    """Compare the auxiliary model with the global one on a batch.

    Args:
        trainer: Gives Fabric, server and data.
        auxiliary: As derived.

    Returns:
        Most memory that it takes beside the models, in bytes; 0 where a run does not measure it.
    """
    data = trainer.data
    streams = {"server": data.server_dataloader, "public": data.public_dataloader}
    owned = [stream for split, stream in streams.items() if data.num_examples(split)]
    if not owned:
        return 0
    sample = sample_batches([owned[0](start_step=0, num_steps=QUALITY_BATCHES)])
    batch = trainer.fabric.to_device(sample.largest)
    backbone, prompt = trainer.server.require_model()
    with LiveTensors() as live, trainer.fabric.autocast():
        measure_quality(backbone, auxiliary.backbone, [batch], prompt.prefix(), auxiliary.slots)
    return live.peak_bytes


def rehearse_distillation(trainer: Any, auxiliary: Auxiliary) -> Cost | None:
    """Teach the auxiliary model for a few steps.

    Args:
        trainer: Gives Fabric, server, data and seed.
        auxiliary: As derived, before a client has it.

    Returns:
        The cost of a batch; None where nothing is taught.
    """
    server, spec = trainer.server, trainer.server.initial_distillation
    if spec is None or not spec.stage.steps:
        return None
    server.initial_distillation = replace(spec, stage=_single(spec.stage))
    stage = server.initial_distillation.stage
    optimization = Optimization.of(stage, auxiliary.trainable().values(), stage.steps)
    prompts = [server.require_model()[1].prefix()]

    def work(batches: Batches) -> None:
        options = {"seed": trainer.seed, "prompts": prompts}
        distill(trainer.fabric, server, auxiliary, optimization, batches, **options)

    loader = trainer.data.public_dataloader(start_step=0, num_steps=_BATCHES_LOOKED_AT)
    sample = sample_batches([loader])
    positions = 0
    if spec.logit_weight or spec.lm_weight:
        # the teacher's and the student's
        positions = 2 * min(_num_labels(sample.largest), spec.max_logit_tokens)
    cost = _try_out(work, sample, positions * auxiliary.backbone.vocab_size)
    server.initial_distillation = spec
    return replace(cost, optimizer_bytes=_state_bytes(optimization))


def rehearse_client(
    trainer: Any, client: ClientModule, participations: Mapping[int, int]
) -> ClientCost:
    """Let a client work through a few steps of each of its stages.

    Args:
        trainer: Gives Fabric, server, data and seed.
        client: With its auxiliary model installed.
        participations: How often each client takes part in the whole run, by id.
    """
    cohort = trainer.cohort(0)
    if not cohort:
        return ClientCost()
    client.receive(ServerBroadcast(0, trainer.server.payload()))
    sample = sample_batches(_client_loaders(trainer.data, cohort))
    num_logits = _num_labels(sample.largest) * client.require_model()[0].backbone.vocab_size
    stages, kept, costs = client.stages, dict[str, Any](), dict[str, Cost]()

    def work(active: Sequence[str], batches: Batches) -> None:
        nonlocal kept
        given = list(batches)
        steps = {name: len(given) if name in active else 0 for name in stages}
        client.stages = {
            name: replace(_single(stage), steps=steps[name]) for name, stage in stages.items()
        }
        times = participations[cohort[0]] + _ALL_STEPS
        turn = ClientTurn(cohort[0], 0, trainer.seed, times, lambda start, count: given)
        _, kept = train_client(trainer.fabric, client, kept, turn)

    for names in client.passes:
        active = [name for name in names if stages[name].steps]
        if active:
            cost = _try_out(partial(work, active), sample, num_logits)
            moments = tensor_bytes([kept[name] for name in active])
            costs[active[-1]] = replace(cost, optimizer_bytes=moments)
    client.stages = stages
    if not costs:
        return ClientCost()
    started = time.perf_counter()
    state = client.private_state()
    data = encode_state({"model": state, "training": kept})
    decode_state(data)
    return ClientCost(costs, len(data), tensor_bytes(state), time.perf_counter() - started)


def rehearse_server(trainer: Any) -> Cost | None:
    """Train the server for a few steps.

    Args:
        trainer: Gives Fabric, server, data, rounds and seed.

    Returns:
        The cost of a batch; None where the server does not train.
    """
    server, stage = trainer.server, trainer.server.training_stage
    if not stage.steps or not trainer.data.num_examples("server"):
        return None
    server.training_stage = _single(stage)
    total_steps = stage.steps * trainer.num_rounds + _ALL_STEPS
    optimization = Optimization.of(stage, server.tuned_parameters(), total_steps)

    def work(batches: Batches) -> None:
        options = {"seed": trainer.seed, "round_idx": 0}
        train_server(trainer.fabric, server, optimization, batches, **options)

    loader = trainer.data.server_dataloader(start_step=0, num_steps=_BATCHES_LOOKED_AT)
    sample = sample_batches([loader])
    num_logits = _num_labels(sample.largest) * server.require_deployed().vocab_size
    cost = _try_out(work, sample, num_logits)
    server.training_stage = stage
    return replace(cost, optimizer_bytes=_state_bytes(optimization))


def rehearse_evaluation(trainer: Any, split: str) -> tuple[Cost, int] | None:
    """Measure the server on a few batches of a split.

    Args:
        trainer: Gives Fabric, server and data.
        split: `selection` or `test`.

    Returns:
        The cost of a batch and the number of batches; None where there is no such split.
    """
    data, server = trainer.data, trainer.server
    if not data.num_examples(split):
        return None
    loader = {"selection": data.val_dataloader, "test": data.test_dataloader}[split]()
    lengths = np.array([example.num_packed_tokens for example in loader.dataset])
    sample = sample_batches([loader], lengths)
    num_logits = int((sample.largest["choice"] >= 0).sum()) * server.require_deployed().vocab_size
    server.eval()

    def work(batches: Batches) -> None:
        evaluate(trainer.fabric, server.validation_step, batches)

    return _try_out(work, sample, num_logits), sample.num_batches


def sample_batches(loaders: Sequence[DataLoader[Any]], lengths: np.ndarray | None = None) -> Sample:
    """Choose the largest batch and two typical ones of some streams.

    Args:
        loaders: At least one, with a batch.
        lengths: [examples] Tokens of every row of the only loader; None takes those of a prompt
            with its right completion.
    """
    candidates: list[tuple[int, DataLoader[Any], list[int]]] = []
    for loader in loaders:
        store: Any = loader.dataset
        rows = store.lengths() if lengths is None else lengths
        batches: Any = loader.batch_sampler
        candidates += [(len(batch) * int(rows[batch].max()), loader, batch) for batch in batches]
    mean = sum(size for size, _, _ in candidates) / len(candidates)
    typical = sorted(candidates, key=lambda found: abs(found[0] - mean))[:TIMED_STEPS]
    scale = mean * len(typical) / sum(size for size, _, _ in typical)
    largest = max(candidates, key=lambda found: found[0])
    return Sample(_load(largest), [_load(found) for found in typical], scale, len(candidates))


def _load(found: tuple[int, DataLoader[Any], list[int]]) -> Batch:
    _, loader, indices = found
    batch: Batch = loader.collate_fn([loader.dataset[index] for index in indices])
    return batch


def _client_loaders(data: Any, cohort: Sequence[int]) -> list[DataLoader[Any]]:
    """Streams of some clients and of the one with the longest example."""

    def stream(client_id: int) -> DataLoader[Any]:
        loader: DataLoader[Any] = data.client_dataloader(
            client_id, start_step=0, num_steps=_BATCHES_LOOKED_AT
        )
        return loader

    def longest(client_id: int) -> int:
        store: Any = stream(client_id).dataset
        return int(store.lengths().max())

    chosen = [max(range(data.num_clients), key=longest), *cohort[:_CLIENTS_LOOKED_AT]]
    return [stream(client_id) for client_id in dict.fromkeys(chosen)]


def _try_out(work: Callable[[Batches], None], sample: Sample, num_logits: int) -> Cost:
    """Do one kind of work on a few batches and look at clock and memory.

    Args:
        work: Does it; all calls share one optimizer, if it has one.
        sample: On what.
        num_logits: Logits of the largest batch.
    """
    work([sample.largest])
    with LiveTensors() as live:
        work([sample.largest])
    started = time.perf_counter()
    work(sample.typical)
    seconds = (time.perf_counter() - started) / len(sample.typical) * sample.scale
    # the scores, and then their gradient or log-likelihoods beside the normalised ones
    logits_bytes = min(live.peak_bytes, 2 * num_logits * _FLOAT_BYTES)
    return Cost(seconds, live.peak_bytes, logits_bytes)


def _num_labels(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def _single(stage: Stage) -> Stage:
    """Return the stage with a batch a step."""
    return replace(stage, accumulate_grad_batches=1)


def _state_bytes(optimization: Optimization) -> int:
    return tensor_bytes(optimization.optimizer.state_dict())
