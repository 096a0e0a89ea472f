"""Carry out the Dockerfile's steps where no container engine runs: in a clean root, by `chroot`.

    apt-get install debootstrap
    sudo python scripts/check_dockerfile.py /var/tmp/fedsp-image [--wheels FOLDER]

A minimal Debian 12 with its Python 3.11, made by debootstrap, stands in for `python:3.11-slim`.
What was built is then used as compose.yaml wants it, without capabilities, as the image's user, on
a read-only root: help, health check, a round of the quickstart, and a federation of three, audited.
Pip's settings in the environment (PIP_...) reach the steps; the image is the one for CPUs.
"""

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import IO, Any

import yaml

ROOT = Path(__file__).parents[1]
BASE = "python:3.11-slim"
PACKAGES = {"alpha": "datasets", "beta": "numpy", "gamma": "torchmetrics"}
SECONDS = 900
FEWER_STEPS = ("--model.initial_distillation.stage.steps", "20")
# what an engine gives every container, and a clean root lacks
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
WITHOUT_RIGHTS = ("--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")


@dataclass(frozen=True)
class Mount:
    """A folder or file of this machine, seen from inside."""

    source: Path
    target: str
    is_writable: bool = False


@dataclass
class Image:
    """A root folder, and what the Dockerfile says of how it is used."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(ENVIRONMENT))
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    programs: dict[str, list[str]] = field(default_factory=dict)

    @property
    def entrypoint(self) -> list[str]:
        """What every command is put behind."""
        return self.programs["ENTRYPOINT"]

    def expand(self, text: str) -> str:
        """Put the values of ENV and ARG in the place of their names."""
        return Template(text).safe_substitute({**self.environment, **self.arguments})


def read_dockerfile(text: str) -> list[tuple[str, str]]:
    """Return the instructions, each with the text behind it."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, _, rest in pairs]


def is_sent(path: str, patterns: Sequence[str]) -> bool:
    """Say whether a file of the checkout is in the build context: the last pattern decides."""
    parts = path.split("/")
    places = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    sent = True
    for pattern in patterns:
        wanted = pattern.removeprefix("!").removeprefix("**/")
        tried = parts if "**/" in pattern else places
        if any(
            fnmatch.fnmatchcase(place, wanted)
            for place in tried
            if "/" not in place or "/" in wanted
        ):
            sent = pattern.startswith("!")
    return sent


def read_patterns(file: Path) -> list[str]:
    """Return the lines of a .dockerignore that mean something."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def inside(
    image: Image, words: Sequence[str], mounts: Sequence[Mount] = (), *, sealed: bool = False
) -> list[str]:
    """Return the command that runs `words` in the image, in namespaces of its own.

    Args:
        image: Where.
        words: The program and its arguments.
        mounts: What else is seen there.
        sealed: As compose.yaml runs it: nothing but `mounts`, /tmp and /dev/shm can be written, and
            nothing is allowed that needs a right.
    """
    root = shlex.quote(str(image.root))
    script = ["set -e", f"mount --bind {root} {root}", f"mount -t proc proc {root}/proc"]
    if sealed:
        script += [f"mount -t tmpfs tmpfs {root}{place}" for place in ("/tmp", "/dev/shm")]
    for mount in mounts:
        target = shlex.quote(f"{image.root}{mount.target}")
        script.append(f"mount --bind {shlex.quote(str(mount.source))} {target}")
        if not mount.is_writable:
            script.append(f"mount -o remount,bind,ro {target}")
    if sealed:
        script.append(f"mount -o remount,bind,ro {root}")
    user, _, group = image.user.partition(":")
    rights = ["setpriv", f"--reuid={user}", f"--regid={group or user}"]
    rights += WITHOUT_RIGHTS if sealed else ["--clear-groups"]
    settings = [f"{name}={value}" for name, value in image.environment.items()]
    program = [*rights, "env", "-i", f"--chdir={image.workdir}", *settings, *words]
    script.append(f"exec chroot {root} {shlex.join(program)}")
    return ["unshare", "--mount", "--pid", "--fork", "sh", "-c", "\n".join(script)]


def start(command: Sequence[str], log: IO[bytes] | None = None) -> "subprocess.Popen[bytes]":
    """Start a command that `end` can end, whatever it has started."""
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a command, if it runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: Sequence[str]) -> None:
    """Run a command that has to succeed.

    Raises:
        SystemExit: If it does not, or takes too long.
    """
    process = start(command)
    try:
        if status := process.wait(timeout=SECONDS):
            sys.exit(f"exit status {status}")
    finally:
        end(process)


class Builder:
    """Carries out the instructions, stage by stage."""

    def __init__(self, folder: Path, base: Path, wheels: Path | None) -> None:
        """Start with nothing built.

        Args:
            folder: Where the roots are made.
            base: Stands in for the base image.
            wheels: A folder for `pip --find-links`, or None.
        """
        self.folder, self.base = folder, base
        self.stages: dict[str, Image] = {}
        self.mounts = [Mount(Path(path), path) for path in ("/etc/resolv.conf", "/etc/ssl/certs")]
        self.pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        if wheels is not None:
            self.mounts.append(Mount(wheels.resolve(), "/mnt"))
            self.pip["PIP_FIND_LINKS"] = "/mnt"

    def build(self, instructions: Sequence[tuple[str, str]]) -> Image:
        """Return the last stage's image."""
        for name, text in instructions:
            if name == "FROM":
                image = self._begin(text)
            else:
                self._carry_out(image, name, text)
        return image

    def _begin(self, text: str) -> Image:
        base, _, name = text.partition(" AS ")
        if base != BASE:
            sys.exit(f"a stage must be FROM {BASE}, got {text}")
        image = Image(self.folder / f"stage-{len(self.stages)}")
        shutil.rmtree(image.root, ignore_errors=True)
        subprocess.run(["cp", "-a", self.base, image.root], check=True)
        self.stages[name or "final"] = image
        return image

    def _carry_out(self, image: Image, name: str, text: str) -> None:
        print(f"{name} {text}"[:150], flush=True)
        match name:
            case "ARG":
                argument, _, default = text.partition("=")
                image.arguments[argument] = default
            case "ENV":
                pairs = [word.partition("=") for word in shlex.split(text)]
                image.environment |= {key: image.expand(value) for key, _, value in pairs}
            case "WORKDIR":
                image.workdir = text
                (image.root / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = text
            case "RUN":
                self._run(image, text)
            case "COPY":
                self._copy(image, text.split())
            case "ENTRYPOINT" | "CMD":
                image.programs[name] = json.loads(text)
            case "HEALTHCHECK":
                image.programs[name] = json.loads(text.partition("CMD ")[2])
            case "LABEL":
                pass  # says something of the image, and changes nothing in it
            case _:
                sys.exit(f"{name} is not known here: teach it to {Path(__file__).name}")

    def _run(self, image: Image, text: str) -> None:
        """RUN sees arguments, and what pip has to know of this machine; the image keeps neither."""
        settings = {**image.environment, **image.arguments, **self.pip}
        step = Image(image.root, settings, workdir=image.workdir, user=image.user)
        run(inside(step, ["sh", "-c", text], self.mounts))

    def _copy(self, image: Image, words: list[str]) -> None:
        stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
        *sources, target = words
        to = image.root / (Path(image.workdir) / target).as_posix().lstrip("/")
        context = self.stages[stage].root if stage else ROOT
        patterns = [] if stage else read_patterns(ROOT / ".dockerignore")
        for source in sources:
            path = context / source.lstrip("/")
            if stage:
                subprocess.run(["cp", "-a", f"{path}/.", to], check=True)
                continue
            files = [path] if path.is_file() else [it for it in path.rglob("*") if it.is_file()]
            for file in files:
                if is_sent(file.relative_to(ROOT).as_posix(), patterns):
                    place = to / file.relative_to(path if path.is_dir() else path.parent)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, place)


def make_base(folder: Path) -> Path:
    """Return a minimal Debian with Python, made anew only where there is none."""
    base = folder / "base"
    if not (base / "usr/local/bin/python").is_symlink():
        # python3.11-venv wants python3-distutils by a name that debootstrap does not resolve
        packages = "--include=python3.11,python3.11-venv,python3-distutils,ca-certificates"
        subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", base], check=True)
        (base / "usr/local/bin/python").symlink_to("/usr/bin/python3.11")
    return base


def check_program(image: Image, folder: Path) -> None:
    """Ask for help, ask for health, run a round of the quickstart."""
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir()
    shutil.chown(runs, *map(int, image.user.split(":")))
    (image.root / "runs").mkdir(exist_ok=True)
    fedsp = image.entrypoint
    config = next(image.root.glob("opt/fedsp/lib/*/site-packages/fedsp/configs/quickstart.yaml"))
    fit = ["fit", "--config", f"/{config.relative_to(image.root)}", "--trainer.callbacks", "null"]
    fit += ["--trainer.num_rounds", "1", "--trainer.run_dir", "/runs/quickstart", *FEWER_STEPS]
    for words in ([*fedsp, *image.programs["CMD"]], image.programs["HEALTHCHECK"], [*fedsp, *fit]):
        print("+", shlex.join(words), flush=True)
        run(inside(image, words, [Mount(runs, "/runs", True)], sealed=True))
    if not (runs / "quickstart" / "results.json").is_file():
        sys.exit("the quickstart left no results.json")


def check_federation(image: Image, folder: Path) -> None:
    """Run the services of compose.yaml, and audit what they leave."""
    root = folder / "federation"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    shutil.chown(root, *map(int, image.user.split(":")))
    for place in ("federation", "cache"):
        (image.root / place).mkdir(exist_ok=True)
    (image.root / "etc/hosts").touch()  # an engine makes it
    config = next(image.root.glob("opt/fedsp/lib/*/site-packages/fedsp/configs/federation.yaml"))
    whole = [Mount(root, "/federation", True)]
    init = ["federation", "init", "/federation/new", "--address", "server:8443"]
    init += ["--config", f"/{config.relative_to(image.root)}", "--clients", *PACKAGES]
    init += ["--trainer.num_rounds", "1", *FEWER_STEPS]
    run(inside(image, [*image.entrypoint, *init], whole, sealed=True))
    made = root / "new"
    if (made / "compose.yaml").read_text() != (ROOT / "compose.yaml").read_text():
        sys.exit("`fedsp federation init` writes another compose.yaml than the checkout's")
    services = yaml.safe_load((made / "compose.yaml").read_text())["services"]
    running = {
        name: start_service(image, made, name, service) for name, service in services.items()
    }
    try:
        while running["server"].poll() is None and not is_healthy(image, made, services["server"]):
            time.sleep(1)
        print(f"server: {'healthy' if running['server'].poll() is None else 'ended'}", flush=True)
        for name, process in running.items():
            status = process.wait(timeout=SECONDS)
            print(f"{name}: exit status {status}", flush=True)
            if status:
                sys.exit((root / f"{name}.log").read_text())
    finally:
        for process in running.values():
            end(process)
    run(inside(image, [*image.entrypoint, "audit", "/federation/new"], whole, sealed=True))


def service_mounts(made: Path, name: str, service: Mapping[str, Any]) -> list[Mount]:
    """Return the mounts of a service, its cache and the names that it can resolve included."""
    hosts, cache = made.parent / "hosts", made.parent / f"cache-{name}"
    hosts.write_text("127.0.0.1 localhost server\n")
    cache.mkdir(exist_ok=True)
    cache.chmod(0o1777)
    mounts = [Mount(hosts, "/etc/hosts")]
    for volume in service["volumes"]:
        source, target, *mode = volume.split(":")
        path = made / source if source.startswith("./") else cache
        mounts.append(Mount(path, target, mode != ["ro"]))
    return mounts


def start_service(
    image: Image, made: Path, name: str, service: Mapping[str, Any]
) -> "subprocess.Popen[bytes]":
    """Start a service; what it says goes to a log of its own."""
    words = [*image.entrypoint, *service["command"]]
    party = name.removeprefix("client-")
    if party in PACKAGES:
        source = "--data.clients"
        words += [f"{source}=fedsp.sources.Docstrings", f"{source}.packages=[{PACKAGES[party]}]"]
        words += [f"{source}.max_rows_per_package=300"]
    command = inside(image, words, service_mounts(made, name, service), sealed=True)
    with (made.parent / f"{name}.log").open("wb") as log:
        return start(command, log)


def is_healthy(image: Image, made: Path, service: Mapping[str, Any]) -> bool:
    """Ask as an engine does; the same network, so the port is the server's."""
    words = service["healthcheck"]["test"][1:]
    command = inside(image, words, service_mounts(made, "server", service), sealed=True)
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def size_mb(folder: Path) -> int:
    """Return what a folder takes on the disk."""
    done = subprocess.run(["du", "-sm", folder], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def main() -> None:
    """Build, then check."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the roots are made: 8 GB")
    parser.add_argument("--wheels", type=Path, help="folder for pip, such as one with a torch")
    given = parser.parse_args()
    if os.geteuid():
        sys.exit("debootstrap, mount and chroot need root")
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    base = make_base(folder)
    image = Builder(folder, base, given.wheels).build(
        read_dockerfile((ROOT / "Dockerfile").read_text())
    )
    image.environment["OMP_NUM_THREADS"] = "1"  # as for four programs on one machine
    print(f"image: {size_mb(image.root)} MB, {size_mb(base)} MB of them the base", flush=True)
    check_program(image, folder)
    check_federation(image, folder)
    print("check_dockerfile: all passed")


if __name__ == "__main__":
    main()
