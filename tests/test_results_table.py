"""The table of docs/results.md is what results/*.csv say."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "results_table.py"
_spec = importlib.util.spec_from_file_location("results_table", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(table)


def test_the_page_is_up_to_date() -> None:
    page = (table.ROOT / "docs" / "results.md").read_text()
    rows = table.read_rows(table.ROOT / "results")
    assert table.replace_table(page, table.markdown_table(rows)) == page, "make results-table"


def test_rows_become_a_line_a_method_with_its_interval(tmp_path: Path) -> None:
    (tmp_path / "sciq.csv").write_text(
        "experiment,method,seed,test_loss,test_f1,handout_bytes\n"
        "sciq,fedsp,0,1.0,0.5,1000\nsciq,fedsp,1,3.0,,1000\nsciq,local,0,2.0,0.25,\n"
    )
    assert table.markdown_table(table.read_rows(tmp_path)).splitlines() == [
        "| experiment | method | seeds | test loss | test f1 | test loss less the first's, by seed "
        "| hand-out |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| sciq | fedsp | 2 | 2.0000 ± 12.7062 | 50.0 % |  | 1.00 kB |",
        "| sciq | local | 1 | 2.0000 | 25.0 % | +1.0000 |  |",
    ]


@pytest.mark.parametrize("page", ["none", table.BEGIN, f"{table.END}{table.BEGIN}"])
def test_a_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="expected <!-- results-table:begin -->"):
        table.replace_table(page, "x")
