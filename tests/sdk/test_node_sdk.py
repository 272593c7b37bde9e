"""The OpenAI Node SDK as a client. The tests themselves are in tests/node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

NODE = Path(sys.executable).parent / "node"
TESTS = Path(__file__).resolve().parent.parent / "node" / "sdk.test.mjs"


def test_the_node_sdk_is_served(candidate):
    done = subprocess.run(
        [NODE, "--test", "--test-reporter=tap", TESTS],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"STATOR_URL": candidate.url},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    assert "# fail 0" in done.stdout
