"""What SECURITY.md says of Flower's secure aggregation holds for the Flower that is installed."""

import flwr.clientapp.mod
import flwr.serverapp
import flwr.serverapp.strategy
import pytest
from flwr.app import Context, RecordDict
from flwr.server.workflow import SecAggPlusWorkflow


def test_secure_aggregation_works_with_flowers_old_server_loop_only() -> None:
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    workflow = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2)
    with pytest.raises(TypeError, match="Expect a LegacyContext, but get Context"):
        workflow(None, context)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "module",
    [flwr.clientapp.mod, flwr.serverapp, flwr.serverapp.strategy],
    ids=lambda it: it.__name__,
)
def test_flowers_present_interface_has_no_secure_aggregation(module: object) -> None:
    assert not [name for name in dir(module) if "secagg" in name.lower().replace("_", "")]
