"""The Slurm script and the Kubernetes manifest: valid, of one mind, and what they start is real.

Nothing of Slurm or Kubernetes is needed. `srun` and `torchrun` are replaced where only their
arguments are wanted; the slow tests start the processes that they would start, on the CPU.
"""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import get_args_parser

from commands import changed, command, make_config, write_config
from processes import free_port
from shipped_files import ROOT
from stand_ins import RECORDER, directives, run, slurm, with_programs

SBATCH = ROOT / "deploy" / "slurm" / "fedsp.sbatch"
MANIFEST = ROOT / "deploy" / "kubernetes" / "fedsp-simulation.yaml"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
# the oldest with all fields of the manifest out of beta, and the newest that the schemas know
KUBERNETES = ("1.31", kubernetes_validate.latest_version())
# Stands in for `srun`: two tasks on this machine, as Slurm would describe them.
SRUN = """#!/usr/bin/env bash
shift
export SLURM_NTASKS=2 SLURM_NODEID=0
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & other=$!
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"
wait "$other"
"""
FEDSP = f'#!/usr/bin/env bash\nexec {sys.executable} -m fedsp "$@"\n'
TORCHRUN = f'#!/usr/bin/env bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'


@cache
def manifest() -> dict[str, Any]:
    """Return the objects of the manifest by kind."""
    documents = list(yaml.safe_load_all(MANIFEST.read_text()))
    by_kind = {document["kind"]: document for document in documents}
    assert len(by_kind) == len(documents)
    return by_kind


def pod() -> dict[str, Any]:
    return manifest()["Job"]["spec"]["template"]["spec"]


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return only


def variables() -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container()["env"]}


def pod_script(environment: dict[str, str]) -> list[str]:
    """Return the container's command; the shell comes from this machine's own path."""
    shell, options = container()["command"]
    found = shutil.which(shell, path=environment["PATH"])
    assert found is not None
    return [found, options, *container()["args"]]


def parsed(arguments: list[str]) -> Any:
    """Return the trainer's options as the command line understands them; a wrong one fails."""
    printed = command(*arguments, "--print_config")
    assert printed.status == 0, printed
    return yaml.safe_load(printed.out)["trainer"]


# --- Slurm ----------------------------------------------------------------------------------------


def recorded_by_slurm(folder: Path, run_dir: Path) -> list[str]:
    environment = with_programs(folder / "bin", srun=RECORDER) | slurm()
    run(["bash", SBATCH, QUICKSTART, run_dir, "--trainer.num_rounds", 3], environment)
    words = (folder / "bin" / "record").read_text().splitlines()
    assert words[:2] == ["--kill-on-bad-exit=1", "fedsp"]
    return words[2:]


def test_the_slurm_script_is_valid_shell_with_its_directives_on_top() -> None:
    run(["bash", "-n", SBATCH], dict(os.environ))
    lines = SBATCH.read_text().splitlines()
    first_command = next(idx for idx, line in enumerate(lines) if not line.startswith("#"))
    # Slurm reads no directive after the first command
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    wanted = directives(SBATCH)
    assert wanted["ntasks-per-node"] == wanted["gpus-per-node"]
    assert "requeue" in wanted


def test_slurm_starts_fit_with_options_that_exist(tmp_path: Path) -> None:
    arguments = recorded_by_slurm(tmp_path, tmp_path / "run")
    assert "--ckpt_path" not in arguments
    trainer = parsed(arguments)
    wanted = {"accelerator": "gpu", "strategy": "ddp", "precision": "bf16-mixed", "num_rounds": 3}
    wanted |= {"devices": "4", "num_nodes": 2, "run_dir": str(tmp_path / "run")}
    assert {name: trainer[name] for name in wanted} == wanted


def test_a_requeued_slurm_job_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    arguments = recorded_by_slurm(tmp_path, tmp_path / "run")
    assert arguments[-2:] == ["--ckpt_path", "last"]
    parsed(arguments)


@pytest.mark.parametrize("status", [0, 3])
def test_the_slurm_job_ends_with_the_status_of_the_run(status: int, tmp_path: Path) -> None:
    environment = with_programs(tmp_path / "bin", srun=f"#!/bin/sh\nexit {status}\n") | slurm()
    words = ["bash", SBATCH, QUICKSTART, tmp_path / "run"]
    assert subprocess.run(words, env=environment, cwd=ROOT, check=False).returncode == status


def test_a_slurm_job_whose_time_is_up_requeues_itself(tmp_path: Path) -> None:
    # what Slurm does: it signals the batch script, and `scontrol requeue` ends the step
    srun = '#!/usr/bin/env bash\necho $$ > "$RECORD"\nkill -USR1 "$PPID"\nexec sleep 60\n'
    scontrol = '#!/usr/bin/env bash\necho "asked: $*"\nkill -TERM "$(cat "$RECORD")"\n'
    environment = with_programs(tmp_path / "bin", srun=srun, scontrol=scontrol) | slurm()
    done = subprocess.run(
        ["bash", SBATCH, QUICKSTART, tmp_path / "run"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "asked: requeue 7" in done.stdout
    assert done.returncode == 128 + 15


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_slurm_script_runs_a_federation(tmp_path: Path) -> None:
    config = write_config(tmp_path / "mine.yaml", make_config(tmp_path))
    environment = with_programs(tmp_path / "bin", srun=SRUN, fedsp=FEDSP)
    environment |= slurm(SLURM_JOB_NUM_NODES="1", SLURM_NTASKS_PER_NODE="2")
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    on_cpu = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    words = ["bash", SBATCH, config, tmp_path / "run", *on_cpu]
    run(words, environment)
    assert (tmp_path / "run" / "results.json").exists()
    run([*words, "--trainer.num_rounds", 3], environment)
    assert (tmp_path / "run" / "csv" / "metrics.csv").read_text().count("\n") == 4


# --- Kubernetes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("kind", ["ConfigMap", "Service", "PersistentVolumeClaim", "Job"])
def test_the_manifest_fits_the_schemas_of_kubernetes(kind: str, version: str) -> None:
    kubernetes_validate.validate(manifest()[kind], version, strict=True)


def test_a_misspelt_field_does_not_fit_the_schemas() -> None:
    job = yaml.safe_load(yaml.safe_dump(manifest()["Job"]))
    job["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="resource"):
        kubernetes_validate.validate(job, KUBERNETES[-1], strict=True)


def test_the_objects_of_the_manifest_find_each_other() -> None:
    job, service, settings = manifest()["Job"], manifest()["Service"], variables()
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod()["subdomain"] == service["metadata"]["name"]
    # the first pod of an indexed Job is named after it
    assert settings["RENDEZVOUS"] == f"{name}-0.{service['metadata']['name']}"
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert volumes["config"]["configMap"]["name"] == manifest()["ConfigMap"]["metadata"]["name"]
    claim = manifest()["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    (config,) = manifest()["ConfigMap"]["data"]
    assert settings["CONFIG"] == f"{mounts['config']}/{config}"
    for shared in ("RUN_DIR", "FEDSP_CACHE", "HF_HOME"):
        assert settings[shared].startswith(mounts["data"] + "/")
    port = str(service["spec"]["ports"][0]["port"])
    assert f"--master_port {port} " in container()["args"][0]


def test_machines_and_gpus_are_the_same_numbers_everywhere() -> None:
    spec, settings = manifest()["Job"]["spec"], variables()
    assert spec["completions"] == spec["parallelism"] == int(settings["NUM_NODES"])
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == int(settings["GPUS_PER_NODE"])


def test_pods_have_no_rights_that_they_do_not_need() -> None:
    assert pod()["securityContext"]["runAsNonRoot"]
    assert not pod()["automountServiceAccountToken"]
    rights = container()["securityContext"]
    assert not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("restarted", [False, True])
def test_a_pod_starts_torchrun_and_fit_with_options_that_exist(
    restarted: bool, tmp_path: Path
) -> None:
    config = tmp_path / "fedsp.yaml"
    config.write_text(manifest()["ConfigMap"]["data"]["fedsp.yaml"])
    run_dir = tmp_path / "run"
    if restarted:
        run_dir.mkdir()
    environment = with_programs(tmp_path / "bin", torchrun=RECORDER) | variables()
    environment |= {"CONFIG": str(config), "RUN_DIR": str(run_dir), "JOB_COMPLETION_INDEX": "1"}
    run(pod_script(environment), environment)
    words = (tmp_path / "bin" / "record").read_text().splitlines()
    split = words.index("fedsp")
    launcher = torchrun_options(words[: split + 1])
    assert (launcher.nnodes, launcher.nproc_per_node, launcher.node_rank) == ("2", "4", 1)
    assert (launcher.module, launcher.training_script) == (True, "fedsp")
    trainer = parsed(words[split + 1 :])
    assert (trainer["devices"], trainer["num_nodes"]) == ("4", 2)
    assert (trainer["accelerator"], trainer["strategy"]) == ("gpu", "ddp")
    assert (words[-2:] == ["--ckpt_path", "last"]) == restarted


def torchrun_options(words: list[str]) -> Any:
    return get_args_parser().parse_args(words)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_pods_run_a_federation_and_go_on_when_started_again(tmp_path: Path) -> None:
    parallel = {"trainer.accelerator": "cpu", "trainer.strategy": "ddp"}
    config = write_config(tmp_path / "mine.yaml", changed(make_config(tmp_path), parallel))
    environment = with_programs(tmp_path / "bin", torchrun=TORCHRUN)
    environment |= {"NUM_NODES": "2", "GPUS_PER_NODE": "1", "CONFIG": str(config)}
    environment |= {"RUN_DIR": str(tmp_path / "run"), "RENDEZVOUS": "127.0.0.1"}
    script = pod_script(environment)
    for rounds in ("2", "3"):
        words = [word.replace("29500", str(free_port())) for word in script]
        last, more = '"${resume[@]}"', f" --trainer.num_rounds {rounds}"
        words = [word.replace(last, last + more) for word in words]
        pods = [
            subprocess.Popen(words, env=environment | {"JOB_COMPLETION_INDEX": str(index)})
            for index in range(2)
        ]
        assert [process.wait(timeout=200) for process in pods] == [0, 0]
        metrics = tmp_path / "run" / "csv" / "metrics.csv"
        assert metrics.read_text().count("\n") == int(rounds) + 1
