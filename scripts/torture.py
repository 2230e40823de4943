#!/usr/bin/env python
"""What is promised of saving, resuming and bad files, tried many times; see tests/torture/.

.venv/bin/python scripts/torture.py [SECTION ...] [--short] [--seed N] [--write]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "torture"))
    from torture_suite import main

    main()
