"""The Dockerfile: linted, of one mind with the package, and read by the script that tries it."""

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

import fedsp
from shipped_files import ROOT
from stand_ins import RECORDER, ended, linter, with_programs

DOCKERFILE = ROOT / "Dockerfile"
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "check_dockerfile.py"))


def instructions() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = SCRIPT["read_dockerfile"](DOCKERFILE.read_text())
    return found


def last_stage() -> list[tuple[str, str]]:
    steps = instructions()
    start = max(index for index, (name, _) in enumerate(steps) if name == "FROM")
    return steps[start:]


def the_step(name: str, words: str) -> str:
    (found,) = [text for step, text in instructions() if step == name and words in text]
    return found


def patterns() -> list[str]:
    found: list[str] = SCRIPT["read_patterns"](ROOT / ".dockerignore")
    return found


def test_the_linter_has_nothing_to_say() -> None:
    done = ended([linter("hadolint"), "--failure-threshold", "style", DOCKERFILE])
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_say_it() -> None:
    spoilt = DOCKERFILE.read_text().replace("USER 1000:1000", "USER root\nRUN cd /tmp")
    done = ended([linter("hadolint"), "-"], text=spoilt)
    assert done.returncode == 1
    assert {"DL3002", "DL3003"} <= set(re.findall(r"DL\d+", done.stdout))


def test_the_labels_are_those_of_the_package() -> None:
    labels = dict(re.findall(r'image\.([a-z.]+)="([^"]*)"', the_step("LABEL", "opencontainers")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert labels["version"] == fedsp.__version__
    assert labels["licenses"] == project["license"]
    assert labels["base.name"] == f"docker.io/library/{last_stage()[0][1]}"


def test_the_image_has_no_root_no_compiler_and_nothing_of_the_checkout() -> None:
    names = [name for name, _ in last_stage()]
    assert names.index("USER") > names.index("RUN")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", dict(last_stage())["USER"])
    assert [text for name, text in last_stage() if name == "COPY"] == [
        "--from=build /opt/fedsp /opt/fedsp"
    ]
    assert "apt" not in DOCKERFILE.read_text()


def test_the_image_has_what_a_federation_needs_and_no_development_tools() -> None:
    wanted = re.search(r'"\.\[([a-z,]+)\]"', the_step("RUN", "-c constraints.txt"))
    assert wanted is not None
    extras = wanted[1].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"flower", "privacy"} <= set(extras) <= {*project["optional-dependencies"]} - {"dev"}


def recorded(folder: Path, torch: str) -> list[str]:
    """Return what pip is asked for by the step that chooses a torch."""
    environment = with_programs(folder / "bin", pip=RECORDER) | {"TORCH": torch}
    done = ended(["sh", "-c", the_step("RUN", "whl/cpu")], environment)
    assert done.returncode == 0, done.stderr
    record = folder / "bin" / "record"
    return record.read_text().splitlines() if record.exists() else []


def test_the_build_argument_chooses_the_torch(tmp_path: Path) -> None:
    (cpu,) = re.findall(r"^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    words = recorded(tmp_path, "cpu")
    assert words[-1] == cpu
    assert "--no-deps" in words
    (tmp_path / "gpu").mkdir()
    assert recorded(tmp_path / "gpu", "cuda") == []  # the registry's, with everything else


def test_another_build_argument_is_refused(tmp_path: Path) -> None:
    environment = with_programs(tmp_path / "bin", pip=RECORDER) | {"TORCH": "rocm"}
    done = ended(["sh", "-c", the_step("RUN", "whl/cpu")], environment)
    assert done.returncode == 1
    assert done.stderr == "the build argument TORCH must be cpu or cuda, got rocm\n"


@pytest.mark.parametrize(
    ("path", "is_sent"),
    [
        ("src/fedsp/trainer.py", True),
        ("src/fedsp/assets/docstring-nano/model.safetensors", True),
        ("configs/method/fedsp.yaml", True),
        ("constraints.txt", True),
        ("src/fedsp/__pycache__/trainer.cpython-311.pyc", False),
        ("src/fedsp/stray.pyc", False),
        (".git/config", False),
        ("federation/authority/ca.key", False),
        ("node.key", False),
        ("runs/mine/ledger.jsonl", False),
        ("docs/src/note.md", False),
    ],
)
def test_only_what_the_image_needs_is_sent_to_the_engine(path: str, is_sent: bool) -> None:
    assert SCRIPT["is_sent"](path, patterns()) is is_sent


def test_everything_that_is_copied_is_sent() -> None:
    copies = [text.split()[:-1] for name, text in instructions() if name == "COPY"]
    sources = [source for words in copies for source in words if "--from" not in words[0]]
    assert {"src", "configs", "pyproject.toml", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert SCRIPT["is_sent"](source, patterns())


def test_the_script_reads_a_dockerfile_as_an_engine_does() -> None:
    text = "# no\nFROM a AS b\nRUN one && \\\n    # no\n    two\nENV A=1 \\\n    B=2\n"
    wanted = [("FROM", "a AS b"), ("RUN", "one &&  two"), ("ENV", "A=1  B=2")]
    assert SCRIPT["read_dockerfile"](text) == wanted
