"""Ranks under torchrun, killed at moments of all kinds; see tests/torture/killed_ranks.py.

python scripts/torture_ranks.py 40
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "torture"))
    from killed_ranks import main

    main()
