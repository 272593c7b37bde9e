"""Sets up what the tests run with: Python packages in `.venv-tests`, Node.js packages in
`tests/node/node_modules`. Prints the path of the Python. Run again, it does nothing
unless a version changed.

Node.js itself comes as a Python package, so that the tests use one version everywhere.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import host

NODE = host.ROOT / "tests" / "node"


def run() -> int:
    print(python())
    return 0


def python() -> Path:
    """The Python of the tests' environment, which is made if need be."""
    requirements = host.packages("tests")
    node_packages = (NODE / "package.json").read_text()
    venv = host.Venv(host.ROOT / ".venv-tests", requirements, node_packages)
    if not venv.is_current() or not (NODE / "node_modules").exists():
        with host.step(f"installing the tests' packages into {venv.path.name} (uv) and {NODE.name} (npm)"):
            venv.create()
            venv.install(requirements)
            install_node_packages(venv)
        venv.seal()
    return venv.python


def install_node_packages(venv: host.Venv) -> None:
    shutil.rmtree(NODE / "node_modules", ignore_errors=True)
    host.call(
        venv.path / "bin" / "npm", "install", "--prefix", NODE,
        "--no-package-lock", "--no-audit", "--no-fund", "--no-update-notifier", "--ignore-scripts", "--loglevel=error",
    )


if __name__ == "__main__":
    host.main(run)
