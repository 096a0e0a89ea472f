"""A server in two processes, of which one talks to the clients, comes to one process's prompt."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedsp.executors import Executor, Reply
from fedsp.messages import ClientUpdate, decode_broadcast, encode
from fedsp.ranks import Ranks
from fedsp.relay import RelayExecutor
from parties import server_data, write_party_rows
from processes import assert_close, run_ranks
from tiny import make_client, make_server, make_trainer


class Answers(Executor):
    """Clients that move the prompt by their own number, the last of them slowly."""

    def __init__(self, trainer: Any, fails: bool) -> None:
        self.trainer, self.fails = trainer, fails

    def run(
        self,
        round_idx: int,
        cohort: Sequence[int],
        broadcast: bytes,
        on_start: Callable[[int], None],
    ) -> Iterator[Reply]:
        contract = self.trainer.rules.contract(self.trainer.server.payload())
        payload = decode_broadcast(broadcast, contract).payload
        for client_id in cohort:
            on_start(client_id)
            if self.fails and client_id == 2:
                raise OSError("the line is dead")
            time.sleep(0.3 * (client_id == 2))
            moved = {name: tensor + 0.01 * (client_id + 1) for name, tensor in payload.items()}
            update = ClientUpdate(round_idx, client_id, moved, 10 + client_id)
            yield Reply(client_id, encode(update, "float32"), {})

    def state_dict(self) -> dict[str, Any]:
        return {"handed_out": [0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"handed_out": [0]}

    def commit(self) -> None:
        pass

    def most_answers(self) -> int:
        return 7

    def metrics(self) -> dict[str, float]:
        return {"round/absent_clients": 1.0}


def rounds(folder: Path, run_dir: Path, devices: int, fails: bool = False) -> dict[str, Any]:
    """Run as one of `devices` ranks."""
    import fedsp.relay

    fedsp.relay.TICK_SECONDS = 0.1  # several ticks pass while the last client works
    paths = write_party_rows(folder / f"rows-{devices}-{time.monotonic_ns()}")
    trainer = make_trainer(run_dir, devices=devices)

    def make(trainer: Any, client: Any, auxiliary: Any) -> Executor:
        ranks = Ranks(trainer.fabric)
        first = Answers(trainer, fails) if ranks.rank == 0 else None
        return first if devices == 1 and first is not None else RelayExecutor(first, ranks)

    trainer.make_executor = make
    trainer.fit(make_server(folder / "tiny"), make_client(), server_data(folder / "tiny", paths))
    payload = trainer.server.payload()
    return {
        "absent": [metrics["round/absent_clients"] for metrics in trainer.history.rounds],
        "clients": [metrics["round/clients"] for metrics in trainer.history.rounds],
        "answers": trainer.federation.executor.most_answers(),
        "payload": {name: tensor.flatten().tolist() for name, tensor in payload.items()},
    }


def test_all_processes_hear_what_the_first_one_hears(tmp_path: Path) -> None:
    alone = rounds(tmp_path, tmp_path / "one", 1)
    first, second = run_ranks(rounds, tmp_path / "out", tmp_path, tmp_path / "two", 2)
    assert first == second
    assert_close(first, alone)
    assert alone["clients"] == [3.0] * 3
    assert alone["answers"] == 7


@pytest.mark.filterwarnings("ignore")
def test_a_dead_line_ends_all_processes(tmp_path: Path) -> None:
    results = run_ranks(rounds, tmp_path / "out", tmp_path, tmp_path / "two", 2, True, fails=True)
    assert results[0]["error"] == "OSError: the line is dead"
    assert "the line is dead" in results[1]["error"]
