"""The server of a live federation: the trainer's loop, whose clients are behind Flower."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsp.auxiliary import Auxiliary
from fedsp.client import ClientModule
from fedsp.display import tell
from fedsp.executors import Executor
from fedsp.federation_settings import FederationSettings
from fedsp.flower_link import FlowerLink
from fedsp.messages import encode_handout
from fedsp.opening import launch, participations
from fedsp.ranks import Ranks
from fedsp.relay import RelayExecutor
from fedsp.remote import Deal, Link, RemoteExecutor
from fedsp.terms import terms

if TYPE_CHECKING:
    from fedsp.cli import FederatedCLI


def run_server(run: "FederatedCLI", folder: Path, settings: FederationSettings) -> None:
    """Wait for the clients, run the rounds that are left, and tell the clients that it is over.

    Args:
        run: The configuration, instantiated.
        folder: The server's folder.
        settings: Who takes part, and how long is waited.

    Raises:
        FederationError: If the port is taken, or too few clients come.
        ValueError: If a setting is wrong.
    """
    trainer: Any = run.trainer
    trainer.folder.started_by = f"fedsp federation server {shlex.quote(str(folder))}"
    trainer.folder.path.mkdir(parents=True, exist_ok=True)  # where there was none, all starts anew
    launch(trainer.fabric)
    if not trainer.fabric.is_global_zero:
        trainer.make_executor = _relayed
        trainer.fit(run.model, run.client, run.datamodule, ckpt_path="last")
        return
    link = FlowerLink(folder, settings.meeting_point, settings.parties, tell)
    clients: list[RemoteExecutor] = []

    def make(trainer: Any, client: ClientModule, auxiliary: Auxiliary) -> Executor:
        clients.append(_remote(trainer, auxiliary, link, settings, tell))
        return _relayed(trainer, client, auxiliary, clients[-1])

    try:
        trainer.make_executor = make
        trainer.fit(run.model, run.client, run.datamodule, ckpt_path="last")
        for executor in clients:
            executor.finish()
    finally:
        link.close()


def _relayed(
    trainer: Any, client: ClientModule, auxiliary: Auxiliary, first: Executor | None = None
) -> Executor:
    """Return what talks to the clients, or hears of them from the first of several processes."""
    ranks = Ranks(trainer.fabric)
    return first if first is not None and ranks.size == 1 else RelayExecutor(first, ranks)


def _remote(
    trainer: Any,
    auxiliary: Auxiliary,
    link: Link,
    settings: FederationSettings,
    tell: Callable[[str], None],
) -> RemoteExecutor:
    deal = Deal(
        parties=settings.parties,
        handout=encode_handout(auxiliary.handout()),
        terms=terms(trainer.config),
        participations=participations(trainer),
    )
    return RemoteExecutor(link, deal, trainer.ledger, settings.patience, tell)
