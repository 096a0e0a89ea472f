"""A client of a live federation: a site that answers what Flower brings."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsp.display import tell
from fedsp.federation_settings import FederationSettings
from fedsp.flower_node import FlowerNode
from fedsp.site import ClientSite

if TYPE_CHECKING:
    from fedsp.cli import FederatedCLI


def run_client(run: "FederatedCLI", folder: Path, settings: FederationSettings) -> None:
    """Work for the server until the federation is over.

    Args:
        run: The configuration, instantiated.
        folder: The client's folder.
        settings: Where the server is, and who this client is.

    Raises:
        FederationError: If the server refuses this client.
        ValueError: If a setting or the data is wrong.
    """
    trainer: Any = run.trainer
    model: Any = run.model
    data: Any = run.datamodule
    client_id = settings.parties.index(str(settings.party))
    site = ClientSite(trainer, model, run.client, data, client_id, tell)
    try:
        node = FlowerNode(folder, settings.meeting_point, tell)
        node.serve(site.answer, lambda: site.has_ended)
    finally:
        site.close()
    if site.failure is not None:
        raise site.failure
