"""Tensors on disk: one .safetensors file, or several with an index as Hugging Face has it.

Where ranks hold parts of tensors, each file's tensors are put together when it is written.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptlite import storage
from gptlite.core.world import World
from gptlite.errors import CheckpointError

FILE_BYTES = 4 << 30
"""Of tensors in a file, and so what a save holds in memory at a time where ranks have parts."""
MOST_HEADER_BYTES = 1 << 22
"""Names and shapes of a .safetensors file; a thousand layers need half of it."""


def size_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values())


def whole_files(
    tensors: Mapping[str, Mapping[str, Tensor]], world: World
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and tensors of one file after the other, each made only when it is asked for."""
    for name, part in tensors.items():
        groups: list[list[str]] = [[]]
        size = 0
        for key, tensor in part.items():
            size += (n_bytes := tensor.numel() * tensor.element_size())
            if groups[-1] and size > FILE_BYTES:
                groups.append([])
                size = n_bytes
            groups[-1].append(key)
        for number, keys in enumerate(groups, 1):
            yield (
                part_name(name, number, len(groups)),
                {key: world.full(part[key]).contiguous() for key in keys},
            )


def part_name(name: str, number: int, total: int) -> str:
    return name if total == 1 else name.replace(".", f"-{number:05}-of-{total:05}.", 1)


def is_part(file: str, name: str) -> bool:
    """Whether a file of a checkpoint holds tensors, or their index, of the file of that name."""
    stem, _, kind = name.partition(".")
    return bool(re.fullmatch(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.{kind}|{name}\.index\.json", file))


def write_indexes(work: Path, where: Mapping[str, list[str]], names: Iterable[str]) -> list[str]:
    """As Hugging Face has them, for tensors in several files; the names of those written."""
    written = []
    for name in names:
        several = [file for file in where if is_part(file, name) and file != name]
        if several:
            index = work / f"{name}.index.json"
            text = json.dumps({"weight_map": {key: f for f in several for key in where[f]}})
            storage.disk.fill(index, partial(Path.write_text, data=text))
            storage.disk.sync(index)
            written.append(index.name)
    return written


def files_of(path: Path) -> list[Path]:
    """The file itself, or those that its index names."""
    index = path.with_name(f"{path.name}.index.json")
    if path.exists() or not index.exists():
        return [path]
    try:
        names = set(
            json.loads(storage.read_regular(index, MOST_HEADER_BYTES))["weight_map"].values()
        )
        if all(is_part(name, path.name) for name in names):
            return [path.with_name(name) for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"{index}: damaged")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of the several it was written as.

    Raises CheckpointError.
    """
    return {key: value for file in files_of(path) for key, value in read_file(file).items()}


def read_file(path: Path) -> dict[str, Tensor]:
    try:
        with os.fdopen(storage.open_regular(path), "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MOST_HEADER_BYTES:
            raise CheckpointError(f"{path}: bad checkpoint (header of {header} bytes)")
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        # RuntimeError is torch's, where the file is pruned before it opens it once more.
        raise CheckpointError(f"{path}: bad checkpoint ({error})") from None
    if broken := not_finite(tensors):
        raise CheckpointError(f"{path}: not finite in {', '.join(broken[:5])}")
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors with NaN or infinity in what is here of them.

    Of eight bits or less torch cannot always say.
    """
    wide = {name: tensor for name, tensor in tensors.items() if tensor.element_size() > 1}
    here = {name: t.to_local() if hasattr(t, "to_local") else t for name, t in wide.items()}
    return [name for name, tensor in here.items() if not tensor.isfinite().all()]
