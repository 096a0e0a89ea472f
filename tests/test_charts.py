"""Every chart shows the figures of the runs, and is left out where there are none."""

from pathlib import Path
from typing import Any

import pytest

import runs
from fedsp.charts import (
    COMPARING,
    OF_ONE_RUN,
    communication,
    draw_all,
    metric_by_round,
    participation,
    prompt_drift,
    similarity_by_round,
    similarity_matrix,
    time_by_phase,
)
from fedsp.figures import interval_figure, make_figure
from fedsp.run_record import Run, read_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(runs.write_run(tmp_path / "cmp" / "fedsp" / "seed-0"))


@pytest.fixture
def empty(tmp_path: Path) -> Run:
    return read_run(runs.write_run(tmp_path / "empty", losses=(), finished=False))


def with_records(run: Run, *records: dict[str, Any]) -> Run:
    runs.write_lines(run.path / "rounds.jsonl", list(records))
    return read_run(run.path)


def traces(figure: Any) -> dict[str, tuple[list[Any], list[Any]]]:
    return {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data if trace.name}


def test_loss_by_round_shows_server_baseline_and_of_one_run_the_clients(run: Run) -> None:
    figure = metric_by_round([run], "loss")
    assert traces(figure) == {
        "fedsp: server": ([0, 1], [2.0, 1.5]),
        "fedsp: no clients": ([0, 1], [2.25, 1.75]),
        "clients, training": ([0, 1], [3.0, 2.5]),
    }
    (spread,) = (trace for trace in figure.data if trace.fill == "toself")
    assert list(spread.y) == [3.5, 3.0, 2.0, 2.5]


def test_seeds_of_a_method_share_colour_and_place_in_the_legend(run: Run, tmp_path: Path) -> None:
    second = read_run(runs.write_run(tmp_path / "cmp" / "fedsp" / "seed-1", seed=1))
    figure = metric_by_round([run, second], "loss")
    servers = [trace for trace in figure.data if trace.name == "fedsp: server"]
    assert [trace.showlegend for trace in servers] == [True, False]
    assert len({trace.line.color for trace in figure.data}) == 1
    assert "clients, training" not in traces(figure)


def test_a_metric_that_was_not_measured_has_no_chart(run: Run) -> None:
    assert metric_by_round([run], "accuracy") is None
    assert communication([run], "f1") is None


def test_communication_adds_up_with_and_without_the_hand_out(run: Run) -> None:
    figure = communication([run], "loss")
    each = 2 * (runs.UP + runs.DOWN)
    assert traces(figure)["fedsp"] == ([each, 2 * each], [2.0, 1.5])
    first, second = figure.layout.updatemenus[0].buttons
    assert first.args[0]["x"] == [[each, 2 * each]]
    assert second.args[0]["x"] == [[each + 2 * runs.HANDOUT, 2 * each + 2 * runs.HANDOUT]]


def test_time_is_split_by_phase(run: Run) -> None:
    bars = {trace.name: list(trace.x) for trace in time_by_phase([run]).data}
    assert bars == {"clients": [12], "server training": [6], "evaluation and the rest": [2]}


def test_drift_is_split_by_who_moved_the_prompt(run: Run) -> None:
    assert traces(prompt_drift([run])) == {
        "fedsp: whole round": ([0, 1], [0.2, 0.2]),
        "fedsp: clients": ([0, 1], [0.1, 0.1]),
        "fedsp: server": ([0, 1], [0.1, 0.1]),
    }


def test_similarity_is_shown_by_round_and_by_pair(run: Run) -> None:
    assert traces(similarity_by_round([run])) == {"fedsp": ([0, 1], [0.5, 0.5])}
    (field,) = similarity_matrix([run]).data
    assert [list(row) for row in field.z] == runs.COSINE
    assert list(field.x) == ["client 0", "client 1"]


def test_pairs_are_averaged_over_the_rounds_that_they_shared(run: Run) -> None:
    later = {"clients": [1, 2], "cosine": [[1.0, -0.5], [-0.5, 1.0]], "mean": -0.5}
    changed = with_records(run, runs.record(0), runs.record(1, similarity=later))
    (field,) = similarity_matrix([changed]).data
    assert [list(row) for row in field.z] == [[1, 0.5, None], [0.5, 1, -0.5], [None, -0.5, 1]]


def test_participation_marks_losses_absences_and_rejections(run: Run) -> None:
    later = {"cohort": [1], "clients": {"1": {"soft_prompt": {"loss": 2.5, "seconds": 1}}}}
    changed = with_records(run, runs.record(0), runs.record(1, rejected={"1": "<NaN>"}, **later))
    field, crosses = participation([changed]).data
    assert [list(row) for row in field.z] == [[3.0, None], [3.0, 2.5]]
    assert (list(crosses.x), list(crosses.y)) == ([1], ["client 1"])
    assert list(crosses.text) == ["&lt;NaN&gt;"]


def test_clients_that_tell_no_loss_still_took_part(run: Run) -> None:
    changed = with_records(run, runs.record(0, clients={}), runs.record(1, clients={}, cohort=[1]))
    (field,) = participation([changed]).data
    assert [list(row) for row in field.z] == [[1, None], [1, 1]]


def test_nothing_is_drawn_of_nothing(empty: Run) -> None:
    assert draw_all([*COMPARING, *OF_ONE_RUN], [empty]) == []


def test_a_run_with_everything_has_every_chart_of_loss(run: Run) -> None:
    names = [chart.name for chart, _ in draw_all([*COMPARING, *OF_ONE_RUN], [run])]
    assert names == [
        *("loss", "communication_loss", "time", "drift", "similarity"),
        *("participation", "similarity_matrix"),
    ]


@pytest.mark.parametrize(("last", "step"), [(12, 1), (13, None)])
def test_rounds_are_whole_numbers(last: int, step: int | None) -> None:
    from plotly.graph_objects import Scatter

    assert make_figure([Scatter(x=[0, last])], "round", "y").layout.xaxis.dtick == step


def test_intervals_are_error_bars(run: Run) -> None:
    (points,) = interval_figure(["a", "<b>"], [1.0, 2.0], [0.5, None], "test loss").data
    assert list(points.error_x.array) == [0.5, 0.0]
    assert list(points.y) == ["a", "&lt;b&gt;"]
