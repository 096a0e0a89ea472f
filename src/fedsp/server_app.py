"""The server of a live federation: the trainer's loop, whose clients are behind Flower."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsp.auxiliary import Auxiliary
from fedsp.client import ClientModule
from fedsp.federation_settings import FederationSettings
from fedsp.flower_link import FlowerLink
from fedsp.messages import encode_handout
from fedsp.opening import participations
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
    if trainer.fabric.world_size > 1:
        raise ValueError(
            "`fedsp federation server` trains in one process: `trainer.devices` and "
            f"`trainer.num_nodes` must be 1, got {trainer.fabric.world_size} processes."
        )
    trainer.folder.path.mkdir(parents=True, exist_ok=True)  # where there was none, all starts anew
    tell = partial(print, flush=True)
    link = FlowerLink(folder, settings.meeting_point, settings.parties, tell)
    try:
        trainer.make_executor = partial(_executor, link=link, settings=settings, tell=tell)
        trainer.fit(run.model, run.client, run.datamodule, ckpt_path="last")
        trainer.federation.executor.finish()
    finally:
        link.close()


def _executor(
    trainer: Any,
    client: ClientModule,
    auxiliary: Auxiliary,
    *,
    link: Link,
    settings: FederationSettings,
    tell: Any,
) -> RemoteExecutor:
    deal = Deal(
        parties=settings.parties,
        handout=encode_handout(auxiliary.handout()),
        terms=terms(trainer.config),
        participations=participations(trainer),
    )
    return RemoteExecutor(link, deal, trainer.ledger, settings.patience, tell)
