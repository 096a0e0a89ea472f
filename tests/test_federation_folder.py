"""`fedsp federation init` and what it writes, `renew`, and what the commands say of wrong input."""

import contextlib
import io
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsp.credentials import CredentialError, check_client, check_server
from fedsp.federation_commands import main
from fedsp.federation_settings import Address, FederationSettings, check_names, read_settings
from fedsp.pretrained import BackboneSpec, load_outline, load_tokenizer
from shipped_files import ROOT

ADDRESS = "127.0.0.1:18443"
CONFIG = ROOT / "configs" / "federation.yaml"


def federation(*words: object) -> tuple[int, str]:
    """Run `fedsp federation WORDS` in this process: exit status and all that it said."""
    said, status = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            status = int(end.code or 0)
    return status, said.getvalue()


def init(folder: Path, *more: object) -> tuple[int, str]:
    names = ["--clients", "alpha", "beta"]
    return federation("init", folder, "--config", CONFIG, *names, "--address", ADDRESS, *more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "fed"
    status, said = init(folder, "--trainer.num_rounds", 7)
    assert (status, f"federation: {folder}" in said) == (0, True), said
    return folder


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_both_sides_can_start_with_what_was_written(made: Path) -> None:
    server, client = made / "server", made / "clients" / "alpha"
    check_server(server, ADDRESS)
    check_client(client, ADDRESS)
    assert (server / "parties" / "alpha.pub").read_bytes() == (client / "node.pub").read_bytes()
    assert read_settings(server, "server").parties == ["alpha", "beta"]
    assert read_settings(client, "client").party == "alpha"


def test_private_keys_are_nobody_elses(made: Path) -> None:
    keys = list(made.rglob("*.key"))
    assert sorted(path.name for path in keys) == ["ca.key", "node.key", "node.key", "server.key"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert not list((made / "clients").rglob("ca.key"))
    assert not list((made / "server").rglob("ca.key"))


def test_the_servers_configuration_is_the_given_one_without_clients(made: Path) -> None:
    given, server = read(CONFIG), read(made / "server" / "config.yaml")
    assert server["trainer"]["num_rounds"] == 7
    assert "run_dir" not in server["trainer"]
    data = server["data"]["init_args"]
    assert data["clients"] is None
    assert data["partitioner"]["init_args"] == {"parties": ["alpha", "beta"], "own": None}
    assert data["server"] == given["data"]["init_args"]["server"] | {
        "init_args": data["server"]["init_args"]
    }


def test_a_client_learns_nothing_that_is_the_servers_own(made: Path) -> None:
    folder = made / "clients" / "beta"
    config = read(folder / "config.yaml")
    assert config["data"]["init_args"]["partitioner"]["init_args"]["own"] == "beta"
    for split in ("clients", "server", "public", "selection", "test"):
        assert config["data"]["init_args"][split] is None
    model = config["model"]["init_args"]
    assert set(model) == {"backbone", "auxiliary", "tuned_weights", "soft_prompt"}
    assert "name_or_path" not in model["backbone"]
    assert config["client"] == read(made / "server" / "config.yaml")["client"]
    # a package can be carried anywhere: no path of this machine is in it
    for path in folder.rglob("*"):
        if path.is_file():
            assert str(made).encode() not in path.read_bytes(), path


def test_the_model_is_there_without_its_weights(made: Path) -> None:
    folder = made / "clients" / "alpha" / "model"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    mine, theirs = BackboneSpec(str(folder)), BackboneSpec()
    shapes = [
        {name: parameter.shape for name, parameter in load_outline(spec).named_parameters()}
        for spec in (mine, theirs)
    ]
    assert shapes[0] == shapes[1]
    text = "def mean(x):"
    assert load_tokenizer(mine)(text)["input_ids"] == load_tokenizer(theirs)(text)["input_ids"]


def test_a_secret_seed_stays_with_the_server(tmp_path: Path) -> None:
    privacy = {
        "class_path": "fedsp.privacy.CentralPrivacy",
        "init_args": {
            "noise_multiplier": 1.0,
            "delta": 1e-5,
            "clipping": {"class_path": "fedsp.clipping.FixedClipping", "init_args": {"norm": 1.0}},
        },
    }
    over = tmp_path / "private.yaml"
    over.write_text(yaml.safe_dump({"trainer": {"privacy": privacy, "seed": 12345}}))
    status, said = init(tmp_path / "fed", "--config", over)
    assert status == 0, said
    assert read(tmp_path / "fed" / "server" / "config.yaml")["trainer"]["seed"] == 12345
    assert "12345" not in (tmp_path / "fed" / "clients" / "alpha" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--clients", "Alpha"], "`--clients` must name parties by up to 32 of a-z, 0-9"),
        (["--clients", "a", "a"], "`--clients` must name every party once"),
        (["--address", "nowhere"], "`--address` must be HOST:PORT, such as"),
        (["--address", "host:99999"], "`--address` must be HOST:PORT, such as"),
        (["--trainer.num_round", "3"], "trainer.num_round"),
        (["--data.test", "0.1"], "`data.test` must be a source of its own or null in a live"),
        (
            ["--data.selection", "5"],
            "`data.selection` must be a source of its own or null in a live",
        ),
    ],
)
def test_wrong_words_leave_nothing_behind(tmp_path: Path, words: list[str], reason: str) -> None:
    status, said = init(tmp_path / "fed", *words)
    assert status != 0
    assert reason in said
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    status, said = init(tmp_path)
    assert (status, "needs a new or empty folder" in said) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_new_certificate_takes_the_old_ones_place(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    shutil.copytree(made, folder)
    status, said = federation("renew", folder)
    assert (status, "renewed: copy server.key and server.crt" in said) == (0, True)
    before = (folder / "server" / "server.crt").read_bytes()
    for name in ("server.key", "server.crt"):
        shutil.copy(folder / "renewed" / name, folder / "server" / name)
    assert (folder / "server" / "server.crt").read_bytes() != before
    check_server(folder / "server", ADDRESS)
    status, said = federation("renew", folder)
    assert (status, "which is in use" in said) == (1, True)


@pytest.mark.parametrize(
    ("command", "where", "reason"),
    [
        ("server", ".", "`fedsp federation server` needs a server's folder"),
        ("client", "server", "is a server's folder: start `fedsp federation server` there"),
        ("server", "clients/alpha", "is a client's folder: start `fedsp federation client` there"),
        ("renew", "clients", "needs a server's folder"),
    ],
)
def test_the_wrong_folder_is_named(made: Path, command: str, where: str, reason: str) -> None:
    status, said = federation(command, made / where)
    assert (status, reason in said) == (1, True), said


def test_a_key_that_others_can_read_stops_the_start(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    shutil.copytree(made, folder)
    (folder / "server" / "server.key").chmod(0o644)
    status, said = federation("server", folder / "server")
    assert status == 1
    assert said.startswith("fedsp: error: ")
    assert "server.key" in said
    with pytest.raises(CredentialError):
        check_server(folder / "server", ADDRESS)


@pytest.mark.parametrize("role", ["server", "clients/alpha"])
def test_without_flower_the_extra_is_named(
    made: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsp.federation_commands.find_spec", lambda name: None)
    status, said = federation(role.partition("/")[0].removesuffix("s"), made / role)
    assert (status, said.splitlines()[-1]) == (
        1,
        "fedsp: error: A live federation needs Flower, which is not installed: "
        'pip install "fedsp[flower]".',
    )


def test_help_and_unknown_commands() -> None:
    status, said = federation("--help")
    assert status == 0
    for name in ("init", "server", "client", "renew"):
        assert name in said
    assert federation("init", "--help")[0] == 0
    status, said = federation("start")
    assert (status, "expected init, server, client, renew, got 'start'" in said) == (2, True)


@pytest.mark.parametrize(
    ("text", "host", "port", "is_loopback"),
    [
        ("fed.example.org:8443", "fed.example.org", 8443, False),
        ("10.0.0.7:1", "10.0.0.7", 1, False),
        ("127.0.0.1:8443", "127.0.0.1", 8443, True),
        ("localhost:8443", "localhost", 8443, True),
        ("[::1]:8443", "::1", 8443, True),
    ],
)
def test_addresses(text: str, host: str, port: int, is_loopback: bool) -> None:
    address = Address.parse(text, "--address")
    assert (address.host, address.port, address.is_loopback) == (host, port, is_loopback)
    assert str(address) == text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"min_clients": 3}, r"`min_clients` must be in \[1, 2\] or null, got 3"),
        ({"min_clients": 0}, r"`min_clients` must be in \[1, 2\] or null, got 0"),
        ({"join_seconds": 0}, "`join_seconds` must be above 0, got 0"),
        ({"round_seconds": -1}, "`round_seconds` must be above 0, got -1"),
        ({"parties": []}, "`parties` must name parties"),
        ({"address": "x"}, "`address` must be HOST:PORT"),
        ({"surplus": 1}, "expected address, parties and others of"),
        ({"join_seconds": "soon"}, "federation.yaml"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    FederationSettings(ADDRESS, ["alpha", "beta"]).save(tmp_path)
    file = tmp_path / "federation.yaml"
    file.write_text(yaml.safe_dump(read(file) | change))
    with pytest.raises(ValueError, match=reason):
        read_settings(tmp_path, "server")


def test_names_are_fit_for_folders() -> None:
    check_names(["a", "b-1", "x" * 32], "parties")
    for name in ("", "-a", "a-", "a_b", "a/b", "..", "x" * 33, "ü"):
        with pytest.raises(ValueError, match="must name parties by"):
            check_names([name], "parties")
