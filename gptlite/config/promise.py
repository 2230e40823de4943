"""How long a config says that its run takes: in its first line, which is what people read.

"# 3 minutes on a laptop: ..." is a promise; a first line without such words promises nothing.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from gptlite.config.reader import find

TIME = re.compile(r"\b(\d+(?:\.\d+)?) (second|minute|hour)s?\b")
SECONDS = {"second": 1, "minute": 60, "hour": 3600}


class Promise(NamedTuple):
    seconds: float
    where: str
    """Who says so."""
    changed: str = ""
    """What was asked for besides, in words."""


def read_promise(configs: Sequence[str], changed: str) -> Promise | None:
    """What the first of these configs promises. They have been read before, so they are there."""
    with find(configs[0]).open(errors="replace") as file:
        found = TIME.search(file.readline())
    if found is None:
        return None
    return Promise(float(found[1]) * SECONDS[found[2]], configs[0], changed)
