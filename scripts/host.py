"""What the set-up scripts know about the machine they run on.

Steps are announced on stderr; a failed step ends the script with what to do
about it. Nothing here knows vLLM.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ROOT / "scripts" / "versions.ini"
TOOLS = ROOT / ".stator" / "tools"

# Debian and Ubuntu package that brings each program.
APT_PACKAGES = {
    "etcd": "etcd-server", "gcc": "gcc libc6-dev", "nats-server": "nats-server", "openssl": "openssl",
    "pip": "python3-pip", "readelf": "binutils",
}


class SetupError(Exception):
    """A step that cannot go on; the message says what would help."""


def say(text: str) -> None:
    print(f"==> {text}", file=sys.stderr, flush=True)


@contextmanager
def step(text: str):
    """Announces a step and, when it took more than a second, how long it took."""
    say(text)
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    if took > 1:
        print(f"    {took:.0f} s", file=sys.stderr, flush=True)


def main(run) -> None:
    """Runs a script's `run()`; turns expected failures into one line and status 1."""
    try:
        sys.exit(run())
    except SetupError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        command = " ".join(str(part) for part in error.cmd[:6])
        sys.exit(f"error: `{command} ...` ended with status {error.returncode}")
    except KeyboardInterrupt:
        sys.exit(130)


def packages(section: str) -> list[str]:
    """The pinned requirements of one section of versions.ini."""
    return _versions()[section]["packages"].split()


def pinned_version(section: str, name: str) -> str:
    """The version that a section pins a package to."""
    pins = dict(requirement.split("==") for requirement in packages(section))
    return pins[name]


def _versions() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(VERSIONS)
    return parser


def environment() -> dict[str, str]:
    """The environment for everything that the set-up starts.

    Byte code must be written: without it each start of an engine compiles vLLM
    again, which takes a minute. uv ignores pip's name for the package index, so
    it is passed on under uv's.
    """
    env = dict(os.environ)
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env.pop("VIRTUAL_ENV", None)
    index = env.get("PIP_INDEX_URL")
    if index and not (env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL")):
        env["UV_DEFAULT_INDEX"] = index
    return env


def call(*command: str | Path, quiet: bool = False) -> None:
    """Runs a command; its output goes to stderr. Raises `CalledProcessError`."""
    if not quiet:
        subprocess.run(command, check=True, env=environment(), stdout=sys.stderr)
        return
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        sys.stderr.buffer.write(done.stdout)
        done.check_returncode()


def need_programs(*programs: str) -> None:
    """Makes sure that programs are on the path, through apt where that is possible."""
    missing = [program for program in programs if not shutil.which(program)]
    if "cargo" in missing:
        raise SetupError("cargo not found; install Rust first (rustup, or apt-get install cargo)")
    if missing:
        apt_install(missing)


def apt_install(programs: list[str]) -> None:
    wanted = sorted({name for p in programs for name in APT_PACKAGES[p].split()})
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise SetupError(
            f"{', '.join(programs)} not found; on Debian or Ubuntu: "
            f"sudo apt-get install -y {' '.join(wanted)}"
        )
    with step(f"installing {' '.join(wanted)} (apt)"):
        call("apt-get", "update", "-qq", quiet=True)
        call("apt-get", "install", "-qq", "-y", "--no-install-recommends", *wanted, quiet=True)


def uv() -> list[str]:
    """The command that runs uv; installs it beside the sources where there is none."""
    if shutil.which("uv"):
        return ["uv"]
    own = TOOLS / "bin" / "uv"
    if not own.exists():
        pip = [sys.executable, "-m", "pip"]
        if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
            apt_install(["pip"])
            pip = ["/usr/bin/python3", "-m", "pip"]
        with step("installing uv (pip)"):
            # `--target` leaves the system's Python alone.
            call(*pip, "install", "-q", "--root-user-action=ignore", "--target", TOOLS, *packages("tools"))
    return [str(own)]


def python_for_venv() -> str:
    """Which Python an environment is made from: this one if it is in range, else uv's choice."""
    bounds = _versions()["python"]
    low, high = bounds["at_least"], bounds["below"]
    numbers = lambda text: tuple(int(part) for part in text.split("."))  # noqa: E731
    if numbers(low) <= sys.version_info[:2] < numbers(high):
        return os.path.realpath(sys.executable)
    return f">={low},<{high}"


class Venv:
    """An environment with a stamp: what it was made from. Made anew when that changes."""

    def __init__(self, path: Path, *inputs: object) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self._stamp = path / "stator-setup.json"
        self._inputs = hashlib.sha256(repr(inputs).encode()).hexdigest()

    def is_current(self) -> bool:
        try:
            return json.loads(self._stamp.read_text())["inputs"] == self._inputs
        except (OSError, ValueError, KeyError):
            return False

    def create(self) -> None:
        self._stamp.unlink(missing_ok=True)
        call(*uv(), "venv", "-q", "--clear", "--python", python_for_venv(), self.path)

    def install(self, requirements: list[str], *options: str) -> None:
        listing = self.path / "requirements.txt"
        listing.write_text("\n".join(requirements) + "\n")
        # With a terminal uv draws its own progress.
        quiet = [] if sys.stderr.isatty() else ["-q"]
        call(*uv(), "pip", "install", *quiet, "--python", self.python, *options, "-r", listing)

    def site_packages(self) -> Path:
        done = subprocess.run(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        )
        return Path(done.stdout.strip())

    def seal(self) -> None:
        """Writes the stamp, as the last step."""
        self._stamp.write_text(json.dumps({"inputs": self._inputs}) + "\n")
