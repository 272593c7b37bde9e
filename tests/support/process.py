"""Child processes of the tests: started with a log, awaited by a state, ended by pid."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A real engine needs 16 s on an idle machine and minutes on a busy one.
START_SECONDS = 300

# What a process may take to drain before it is killed.
STOP_SECONDS = 30

# How often a state is looked at.
POLL_SECONDS = 0.05


# Below the range out of which systems serve "any port", so that nothing takes one between the asking and the
# binding. Test runs side by side begin at different places.
PORTS = itertools.cycle(range(10_240, 30_240))
for _ in range(os.getpid() * 331 % 20_000):
    next(PORTS)


def free_port() -> int:
    """A TCP port on the loopback address that nobody listens on now; not the same one twice."""
    for port in PORTS:
        with socket.socket() as probe:
            # As the servers do: a connection that was closed a moment ago is not in the way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def free_row(count: int) -> int:
    """The first of some free ports that follow each other."""
    row: list[int] = []
    while len(row) < count:
        port = free_port()
        row = [*row, port] if row and port == row[-1] + 1 else [port]
    return row[0]


def wait_until(what: str, state: Callable[[], object], seconds: float = START_SECONDS):
    """Waits for `state()` to be true and returns it; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = state()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for this: {what}")
        time.sleep(POLL_SECONDS)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """The processes below one, children before grandchildren."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, []))
    for child in found:
        found.extend(children.get(child, []))
    return found


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """Stops processes for a while; those that were killed meanwhile stay dead."""
    send(signal.SIGSTOP, *pids)
    try:
        yield
    finally:
        send(signal.SIGCONT, *pids)


def send(number: signal.Signals, *pids: int) -> None:
    """Sends a signal to processes that may be gone already."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


class Process:
    """One child in a session of its own. Its output goes to `log`."""

    def __init__(self, name: str, command: list[str | Path], log: Path, env: dict[str, str] | None = None):
        self.name = name
        self.log = log
        # Without byte code each engine would compile vLLM again.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        # Errors are told in a line; panics keep their backtrace.
        environment |= {"RUST_LIB_BACKTRACE": "0"} | (env or {})
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )
        self.pid = self._child.pid

    def status(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._child.poll()

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def wait_until(self, what: str, state: Callable[[], object], seconds: float = START_SECONDS):
        """Like `wait_until`, and fails at once if the process ends before."""

        def state_or_death() -> object:
            if self.status() is not None:
                raise RuntimeError(f"{self.name} ended with status {self.status()} before {what}\n{self.tail()}")
            return state()

        try:
            return wait_until(what, state_or_death, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.tail()}") from None

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Waits for the end and returns the exit status."""
        return self._child.wait(seconds)

    def signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, to this process only."""
        self._child.kill()
        self._child.wait()

    def stop(self) -> int | None:
        """SIGTERM, then SIGKILL to it and what it started when it does not end by itself."""
        if self.status() is None:
            below = descendants(self.pid)
            self._child.terminate()
            try:
                self._child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                for pid in (self.pid, *below):
                    kill(pid)
                self._child.wait()
        return self.status()

    def tail(self, lines: int = 40) -> str:
        return f"--- {self.log}\n" + "\n".join(self.text().splitlines()[-lines:])


def kill(pid: int) -> None:
    """SIGKILL to a process that may be gone already."""
    send(signal.SIGKILL, pid)
