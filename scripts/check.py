"""Checks the sources: formatting, lints, documentation, and dependencies.

cargo-deny takes minutes to build, so it is used where it is installed
(`cargo install cargo-deny`) and skipped, with a line that says so, where it is not.
"""

from __future__ import annotations

import shutil
import subprocess

import host

CHECKS = {
    "formatting": ["cargo", "fmt", "--all", "--check"],
    "lints": ["cargo", "clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
    "documentation": ["cargo", "doc", "--workspace", "--no-deps", "--quiet"],
    "dependencies": ["cargo", "deny", "check"],
}


def run() -> int:
    host.need_programs("gcc", "cargo")
    env = host.environment() | {"RUSTDOCFLAGS": "-D warnings"}
    failed = []
    for name, command in CHECKS.items():
        if command[1] == "deny" and not shutil.which("cargo-deny"):
            host.say(f"{name}: skipped, cargo-deny is not installed")
            continue
        with host.step(name):
            if subprocess.run(command, cwd=host.ROOT, env=env).returncode != 0:
                failed.append(name)
    if failed:
        host.say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    host.main(run)
