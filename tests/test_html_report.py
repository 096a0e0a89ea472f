"""The page is complete in itself, says what the folder says, and opens in a real browser."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import runs
from fedsp.html_report import page, write_report
from fedsp.run_record import Run, read_run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
CHARTS = ("loss", "communication_loss", "time", "drift", "similarity", "test_loss")
OF_A_RUN = ("loss", "participation", "similarity_matrix")


class Page(HTMLParser):
    """Collects elements with their attributes and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.words.append(data.strip())


@pytest.fixture
def two(tmp_path: Path) -> list[Run]:
    """Two methods, the first with two seeds."""
    other = {"trainer": {"num_rounds": 3}}
    folders = [
        runs.write_run(tmp_path / "fedsp" / "seed-0", test_loss=1.0),
        runs.write_run(tmp_path / "fedsp" / "seed-1", test_loss=3.0, seed=1),
        runs.write_run(tmp_path / "<b>&\"'" / "seed-0", test_loss=2.0, changes=other),
    ]
    return [read_run(folder) for folder in folders]


def test_nothing_is_fetched_and_plotly_is_there_once(two: list[Run]) -> None:
    text = page(two)
    elements = Page(text).elements
    assert not [it for it in elements if it[0] in ("link", "img", "iframe")]
    assert not [it for it in elements if "src" in it[1] or "href" in it[1]]
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    (policy,) = (it[1]["content"] for it in elements if it[1].get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy


def test_every_chart_has_a_heading_of_its_own(two: list[Run]) -> None:
    elements = Page(page(two)).elements
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = [*CHARTS, *(f"{name}_{idx}" for name in OF_A_RUN for idx in range(3))]
    assert set(ids) == {*wanted, *(f"{name}_title" for name in wanted)}
    labels = {attrs["aria-labelledby"] for tag, attrs in elements if tag == "figure"}
    assert labels == {f"{name}_title" for name in wanted}


def test_the_tables_hold_means_differences_and_the_ledger(two: list[Run]) -> None:
    words = Page(page(two)).words
    assert "2.0000 ± 12.7062" in words  # of 1 and 3: t is 12.706, the standard error 1
    row = words.index("trainer.num_rounds")
    assert [word for word in words[row + 1 :] if word][:2] == ["2", "3"]
    assert words.count("client update") == 3
    assert words.count("In every finished round the ledger adds up to the metrics.") == 3


@pytest.mark.parametrize(
    ("added", "words"),
    [
        (
            (1, 0, "down", "server_broadcast", 1),
            "The ledger and the metrics differ in round 1.",
        ),
        (
            (0, 1, "up", "client_update", 1),
            "In every finished round the ledger adds up to the metrics. Answers that came late, "
            "after round 0 was measured, are beyond them.",
        ),
    ],
)
def test_a_ledger_with_more_than_the_metrics_says_whether_that_is_wrong(
    tmp_path: Path, added: tuple[int, int, str, str, int], words: str
) -> None:
    folder = runs.write_run(tmp_path / "run")
    runs.write_lines(folder / "ledger.jsonl", [*runs.payloads(2), runs.payload(*added)])
    assert words in Page(page([read_run(folder)])).words


def test_names_are_text_and_never_markup(two: list[Run]) -> None:
    text = page(two)
    assert "<b>" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "&lt;b&gt;&amp;" in text


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "run", losses=(), finished=False)
    (folder / "rounds.jsonl").unlink()
    text = " ".join(Page(page([read_run(folder)])).words)
    assert "The run is not finished: there is no results.json" in text
    assert "No round is finished" in text


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_draws_every_chart_without_a_word_of_complaint(
    two: list[Run], tmp_path: Path
) -> None:
    write_report(two, tmp_path / "report.html")
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr"),
        *("--window-size=1280,2000", "--virtual-time-budget=20000", "--dump-dom"),
        (tmp_path / "report.html").as_uri(),
    ]
    environment = {**os.environ, "HOME": str(tmp_path)}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=True, env=environment
    )
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    drawn = len(re.findall(r'class="[^"]*js-plotly-plot', result.stdout))
    assert drawn == len(CHARTS) + 3 * len(OF_A_RUN)
    assert result.stdout.count('class="main-svg"') >= drawn
