"""A live federation on Kubernetes and Slurm: valid, of one mind with what `init` writes, and real.

Nothing of Slurm or Kubernetes is needed; `srun` and `fedsp` are replaced where only their arguments
or their ends are wanted.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from fedsp.federation_commands import COMMANDS, main
from shipped_files import ROOT
from stand_ins import RECORDER, directives, ended, linter, run, slurm, with_programs

KUBERNETES = ROOT / "deploy" / "kubernetes"
SBATCH = ROOT / "deploy" / "slurm" / "federation.sbatch"
# the oldest with all fields of the manifests out of beta, and the newest that the schemas know
VERSIONS = ("1.31", kubernetes_validate.latest_version())
ROLES = ("server", "client")


def manifest(role: str, party: str = "alpha") -> dict[str, Any]:
    """Return a manifest's objects by kind; for another party as its comment says."""
    text = (KUBERNETES / f"federation-{role}.yaml").read_text()
    documents = list(yaml.safe_load_all(text.replace("client-alpha", f"client-{party}")))
    by_kind = {document["kind"]: document for document in documents}
    assert len(by_kind) == len(documents)
    return by_kind


def pod(objects: dict[str, Any]) -> dict[str, Any]:
    workload = objects.get("Deployment") or objects["Job"]
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def container(objects: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(objects)["containers"]
    found: dict[str, Any] = only
    return found


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `fedsp federation init` writes it."""
    folder = tmp_path_factory.mktemp("federation") / "new"
    config = ROOT / "configs" / "federation.yaml"
    words = [folder, "--config", config, "--clients", "alpha", "beta", "--address", "fed.test:8443"]
    main(["init", *map(str, words)])
    return folder


# --- Kubernetes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("role", "party"), [("server", ""), ("client", "alpha"), ("client", "b")])
def test_the_manifests_fit_the_schemas_of_kubernetes(role: str, party: str, version: str) -> None:
    for document in manifest(role, party).values():
        kubernetes_validate.validate(document, version, strict=True)


def test_the_server_is_a_deployment_and_a_client_a_job() -> None:
    wanted = {"PersistentVolumeClaim", "NetworkPolicy"}
    assert manifest("server").keys() == wanted | {"Deployment", "Service"}
    assert manifest("client").keys() == wanted | {"Job"}
    # two servers would write into one run folder
    deployment = manifest("server")["Deployment"]["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})


@pytest.mark.parametrize("role", ROLES)
def test_the_objects_of_a_manifest_find_each_other(role: str) -> None:
    objects = manifest(role)
    workload = objects.get("Deployment") or objects["Job"]
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert objects["NetworkPolicy"]["spec"]["podSelector"] == {"matchLabels": labels}
    if role == "server":
        assert objects["Service"]["spec"]["selector"] == labels
        assert workload["spec"]["selector"] == {"matchLabels": labels}
    volumes = {volume["name"]: volume for volume in pod(objects)["volumes"]}
    claim = objects["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["data"]["persistentVolumeClaim"] == {"claimName": claim}
    assert {mount["name"] for mount in container(objects)["volumeMounts"]} == volumes.keys()


def test_the_server_has_one_port_and_the_clients_reach_no_other() -> None:
    server, client = manifest("server"), manifest("client")
    (port,) = container(server)["ports"]
    (service,) = server["Service"]["spec"]["ports"]
    assert service["port"] == port["containerPort"]
    assert service["targetPort"] == port["name"]
    assert container(server)["readinessProbe"]["tcpSocket"] == {"port": port["name"]}
    inward = server["NetworkPolicy"]["spec"]
    assert inward["ingress"] == [{"ports": [{"protocol": "TCP", "port": port["containerPort"]}]}]
    assert set(inward["policyTypes"]) == {"Ingress", "Egress"}
    assert "egress" not in inward
    outward = client["NetworkPolicy"]["spec"]
    assert set(outward["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in outward
    names, federation = outward["egress"]
    assert {rule["port"] for rule in names["ports"]} == {53}
    assert federation["ports"] == inward["ingress"][0]["ports"]


@pytest.mark.parametrize("role", ROLES)
def test_pods_have_no_rights_that_they_do_not_need(role: str) -> None:
    objects = manifest(role)
    assert not pod(objects)["automountServiceAccountToken"]
    person = pod(objects)["securityContext"]
    assert person["runAsNonRoot"]
    assert person["seccompProfile"] == {"type": "RuntimeDefault"}
    rights = container(objects)["securityContext"]
    assert not rights["allowPrivilegeEscalation"]
    assert rights["readOnlyRootFilesystem"]
    assert rights["capabilities"] == {"drop": ["ALL"]}


def as_kubectl(folder: Path) -> set[str]:
    """Return the keys that `kubectl create ... --from-file=FOLDER` makes: of files, not folders."""
    return {path.name for path in folder.iterdir() if path.is_file()}


def mounted(objects: dict[str, Any], volume: str) -> dict[str, str]:
    """Return a volume's files by the place where the container sees them."""
    mounts = [it for it in container(objects)["volumeMounts"] if it["name"] == volume]
    assert all(mount["readOnly"] for mount in mounts)
    return {mount["mountPath"]: mount.get("subPath", "") for mount in mounts}


@pytest.mark.parametrize(
    ("role", "volume", "folder"),
    [("server", "server", "server"), ("client", "package", "clients/alpha")],
)
def test_what_init_wrote_is_where_the_container_looks_for_it(
    role: str, volume: str, folder: str, federation: Path
) -> None:
    files = as_kubectl(federation / folder) - {"README.md"}
    objects = manifest(role)
    assert mounted(objects, volume) == {f"/federation/{name}": name for name in files}
    secret = {item["name"]: item for item in pod(objects)["volumes"]}[volume]["secret"]
    text = (KUBERNETES / f"federation-{role}.yaml").read_text()
    assert f"kubectl create secret generic {secret['secretName']} --from-file=" in text
    # the pod's group may read the keys, nobody else
    assert secret["defaultMode"] == 0o440


def test_the_parties_keys_are_where_the_server_looks_for_them(federation: Path) -> None:
    objects = manifest("server")
    assert as_kubectl(federation / "server" / "parties") == {"alpha.pub", "beta.pub"}
    assert mounted(objects, "parties") == {"/federation/parties": ""}
    name = {it["name"]: it for it in pod(objects)["volumes"]}["parties"]["configMap"]["name"]
    text = (KUBERNETES / "federation-server.yaml").read_text()
    assert f"kubectl create configmap {name} --from-file=DIR/server/parties" in text


def test_a_client_starts_the_command_that_exists() -> None:
    program, role, folder = container(manifest("client"))["args"]
    assert (program, role, folder) == ("federation", "client", "/federation")
    assert role in COMMANDS
    assert "command" not in container(manifest("client"))  # the image's entrypoint


# --- the server's pod: what a Deployment would start again ---------------------------------------


def server_script() -> list[str]:
    shell, options = container(manifest("server"))["command"]
    found = shutil.which(shell)
    assert found is not None
    return [found, options, *container(manifest("server"))["args"]]


@contextmanager
def server_pod(folder: Path, fedsp: str) -> Iterator["subprocess.Popen[str]"]:
    environment = with_programs(folder / "bin", fedsp=f"#!/usr/bin/env bash\n{fedsp}\n")
    words = server_script()
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            yield process
        finally:
            # also what the script left behind, as the end of a container does
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def appears(path: Path) -> bool:
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.exists()


def test_a_server_that_is_done_stays_until_its_pod_is_deleted(tmp_path: Path) -> None:
    with server_pod(tmp_path, 'printf "%s " "$@"') as process:
        assert process.stdout is not None
        # both lines come before anybody ends it
        line = process.stdout.readline()
        assert line.startswith("federation server /federation the federation is over")
        assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=20) == 0


def test_a_server_that_fails_is_started_again(tmp_path: Path) -> None:
    with server_pod(tmp_path, "exit 3") as process:
        assert process.wait(timeout=20) == 3


def test_a_server_whose_pod_is_moved_is_told_so(tmp_path: Path) -> None:
    told = f"trap 'touch {tmp_path}/told; exit 143' TERM; touch {tmp_path}/up; sleep 60 & wait"
    with server_pod(tmp_path, told) as process:
        assert appears(tmp_path / "up")
        process.terminate()
        assert process.wait(timeout=20) == 143
        assert (tmp_path / "told").exists()


def test_the_pods_script_is_good_shell() -> None:
    text = container(manifest("server"))["args"][0]
    done = ended([linter("shellcheck"), "--shell", "bash", "-"], text=text)
    assert (done.returncode, done.stdout) == (0, "")


# --- Slurm ----------------------------------------------------------------------------------------


def recorded_by_slurm(folder: Path, *words: object) -> list[str]:
    environment = with_programs(folder / "bin", srun=RECORDER) | slurm()
    run(["bash", SBATCH, *words], environment)
    return (folder / "bin" / "record").read_text().splitlines()


@pytest.mark.parametrize("role", ROLES)
def test_slurm_starts_one_side_with_its_options(role: str, tmp_path: Path) -> None:
    words = recorded_by_slurm(tmp_path, role, tmp_path / "folder", "--trainer.devices", 1)
    folder = str(tmp_path / "folder")
    assert words == ["fedsp", "federation", role, folder, "--trainer.devices", "1"]
    assert role in COMMANDS


@pytest.mark.parametrize("words", [[], ["server"], ["judge", "folder"]])
def test_anything_else_is_refused_before_srun(words: list[str], tmp_path: Path) -> None:
    environment = with_programs(tmp_path / "bin", srun=RECORDER) | slurm()
    done = ended(["bash", SBATCH, *words], environment)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch deploy/slurm/federation.sbatch {server|client}")
    assert not (tmp_path / "bin" / "record").exists()


def test_one_side_is_one_process_that_is_requeued() -> None:
    wanted = directives(SBATCH)
    assert (wanted["nodes"], wanted["ntasks"]) == ("1", "1")
    assert "requeue" in wanted
    assert wanted["signal"] == "B:USR1@180"


@pytest.mark.parametrize("status", [0, 3])
def test_the_job_ends_with_the_status_of_its_side(status: int, tmp_path: Path) -> None:
    environment = with_programs(tmp_path / "bin", srun=f"#!/bin/sh\nexit {status}\n") | slurm()
    assert ended(["bash", SBATCH, "client", tmp_path], environment).returncode == status


def test_a_job_whose_time_is_up_requeues_itself(tmp_path: Path) -> None:
    # what Slurm does: it signals the batch script, and `scontrol requeue` ends the step
    srun = '#!/usr/bin/env bash\necho $$ > "$RECORD"\nkill -USR1 "$PPID"\nexec sleep 60\n'
    scontrol = '#!/usr/bin/env bash\necho "asked: $*"\nkill -TERM "$(cat "$RECORD")"\n'
    environment = with_programs(tmp_path / "bin", srun=srun, scontrol=scontrol) | slurm()
    done = ended(["bash", SBATCH, "server", tmp_path], environment)
    assert "asked: requeue 7" in done.stdout
    assert done.returncode == 128 + signal.SIGTERM


SCRIPTS = [*sorted((ROOT / "deploy").rglob("*.sbatch")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_linter_has_nothing_to_say_of_a_script(script: Path) -> None:
    done = ended([linter("shellcheck"), script])
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_say_it() -> None:
    done = ended([linter("shellcheck"), "-"], text="#!/bin/bash\nrm -r $1/run\n")
    assert done.returncode == 1
    assert "SC2086" in done.stdout
