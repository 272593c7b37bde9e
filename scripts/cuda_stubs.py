"""Stand-ins for the CUDA libraries that the index's torch is linked against.

torch from the package index is the CUDA build: it does not load without some two
gigabytes of NVIDIA libraries, of which a machine without a GPU never runs a line.
This makes an empty library for each one that is missing, with the symbols and
symbol versions that torch asks for. Every function answers "no device"
(cudaErrorNoDevice, 100), so that `torch.cuda.is_available()` is False.

usage: cuda_stubs.py SITE_PACKAGES        (needs gcc, readelf)
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

# cudaErrorNoDevice.
NO_DEVICE = 100

# Functions for which an int is not an answer: they return a string or a handle
# that the caller reads, or are called while a library is loaded.
SPECIAL = {
    "cudaGetErrorString": 'const char *cudaGetErrorString(void) { return "no CUDA device"; }',
    "cudaGetErrorName": 'const char *cudaGetErrorName(void) { return "cudaErrorNoDevice"; }',
    "cudaGetLastError": "int cudaGetLastError(void) { return 0; }",
    "cudaPeekAtLastError": "int cudaPeekAtLastError(void) { return 0; }",
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int *n) { *n = 0; return 100; }",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }",
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int *v) { *v = 0; return 0; }",
    "__cudaRegisterFatBinary": "static long handle[8];\n"
    "void *__cudaRegisterFatBinary(void) { return handle; }",
    "ncclGetErrorString": 'const char *ncclGetErrorString(void) { return "no CUDA device"; }',
    "ncclGetVersion": "int ncclGetVersion(int *v) { *v = 22900; return 0; }",
    "cudnnGetVersion": "long cudnnGetVersion(void) { return 92000; }",
    "cudnnGetCudartVersion": "long cudnnGetCudartVersion(void) { return 13000; }",
}

# Part of the platform, never stood in for. libcuda belongs to the driver and is
# only ever opened at run time.
PLATFORM = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|cuda))\.so\b")

NEEDED = re.compile(r"\(NEEDED\).*\[(.+)\]")
VERSION_FILE = re.compile(r"Version: \d+\s+File: (\S+)\s+Cnt:")
VERSION_NAME = re.compile(r"Name: (\S+)\s+Flags:.*Version: \d+")


@dataclass
class Library:
    """The dynamic symbols of one shared object."""

    needed: set[str] = field(default_factory=set)
    defined: set[str] = field(default_factory=set)
    # (symbol, version or ""), strong references only.
    undefined: set[tuple[str, str]] = field(default_factory=set)
    # Version name -> the library that must provide it.
    provider: dict[str, str] = field(default_factory=dict)


def read_library(path: Path) -> Library:
    library = Library()
    listing = subprocess.run(
        ["readelf", "-W", "-d", "-V", "--dyn-syms", str(path)],
        check=True, capture_output=True, text=True,
    ).stdout
    file = None
    for line in listing.splitlines():
        if found := NEEDED.search(line):
            library.needed.add(found[1])
        elif found := VERSION_FILE.search(line):
            file = found[1]
        elif file and (found := VERSION_NAME.search(line)):
            library.provider[found[1]] = file
        else:
            read_symbol(line.split(), library)
    return library


def read_symbol(columns: list[str], library: Library) -> None:
    """One row of `--dyn-syms`: number, value, size, type, binding, visibility, section, name."""
    if len(columns) < 8 or columns[4] not in ("GLOBAL", "WEAK", "UNIQUE"):
        return
    name, _, version = columns[7].partition("@")
    if columns[6] != "UND":
        library.defined.add(name)
    elif columns[4] == "GLOBAL":
        library.undefined.add((name, version.lstrip("@")))


def plan(torch: Path) -> dict[str, dict[str, set[str]]]:
    """What is missing: library -> version name ("" for none) -> functions."""
    shared_objects = sorted({*torch.glob("lib/lib*.so*"), *torch.glob("*.so")})
    present = {path.name for path in shared_objects}
    libraries = [read_library(path) for path in shared_objects]
    defined = set().union(*(library.defined for library in libraries))

    missing: dict[str, dict[str, set[str]]] = {}
    for library in libraries:
        for name in library.needed - present:
            if not PLATFORM.match(name):
                missing.setdefault(name, defaultdict(set))
    if not missing:
        return {}

    for library in libraries:
        absent = sorted(library.needed & missing.keys())
        for symbol, version in library.undefined:
            if symbol in defined:
                continue
            provider = library.provider.get(version)
            if provider in missing:
                missing[provider][version].add(symbol)
            elif not version and absent and is_nvidia(symbol):
                missing[absent[0]][""].add(symbol)
    return missing


def is_nvidia(symbol: str) -> bool:
    """Whether an unversioned symbol is one of NVIDIA's, and not the interpreter's or libc's."""
    return re.match(r"(__)?(cu|nv|nccl|cupti|Cupti)", symbol) is not None


def build(name: str, versions: dict[str, set[str]], folder: Path, scratch: Path) -> None:
    """Compiles one stand-in into `folder`."""
    source, script = scratch / f"{name}.c", scratch / f"{name}.map"
    functions = sorted(set().union(*versions.values())) if versions else []
    source.write_text(
        "\n".join(
            SPECIAL.get(function, f"int {function}(void) {{ return {NO_DEVICE}; }}")
            for function in functions
        )
        + "\n"
    )
    command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{name}"]
    named = {version: names for version, names in versions.items() if version}
    if named:
        script.write_text(
            "".join(
                f"{version} {{ global: {' '.join(f'{n};' for n in sorted(names))} }};\n"
                for version, names in sorted(named.items())
            )
        )
        command.append(f"-Wl,--version-script={script}")
    subprocess.run([*command, "-o", str(folder / name), str(source)], check=True)


def install(site_packages: Path) -> int:
    """Builds every missing library into torch/lib, where torch looks first; returns how many."""
    torch = site_packages / "torch"
    missing = plan(torch)
    with tempfile.TemporaryDirectory() as scratch:
        for name, versions in missing.items():
            build(name, versions, torch / "lib", Path(scratch))
    return len(missing)


if __name__ == "__main__":
    print(f"{install(Path(sys.argv[1]))} libraries")
