"""The short version of scripts/torture.py: processes killed, disks failing, files damaged.

In processes of their own, since the script forks.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "torture.py"
PARTS = (
    ("kill", "others", "readers", "two-runs"),
    ("power", "cadence"),
    ("disk", "corruption", "divergence"),
    ("exact", "signals"),
)


@pytest.mark.parametrize("sections", PARTS, ids="-".join)
def test_promises_are_kept(sections: tuple[str, ...]) -> None:
    command = [sys.executable, str(SCRIPT), "--short", *sections]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("kept  ") >= len(sections)
