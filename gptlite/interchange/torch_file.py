"""What a `.pt` file of torch holds, read without unpickling: no code of the file can run.

Such a file is a zip of raw numbers and one pickle that says what they are. The pickle is taken
apart as a list of instructions, of which only those that make plain values are followed; a call is
never made: a tensor's becomes a StoredTensor, an ordered dict's a dict, any other an Opaque.
Ours, not torch.load(weights_only=True): that unpickles by an allow-list, and no pickle is the rule.
"""

import math
import os
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptlite import storage
from gptlite.errors import CheckpointError

MOST_PICKLE_BYTES = 1 << 26
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}


class Opaque(NamedTuple):
    """What a file says is made by a call that is not made here."""

    name: str


class StoredTensor(NamedTuple):
    """A tensor's place among the raw numbers."""

    storage: tuple[Any, ...]
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Mark:
    """Where a list of arguments begins on the stack."""


def read_torch_file(path: Path) -> Any:
    """The value that torch.save wrote, its tensors read. Raises CheckpointError."""
    try:
        with (
            os.fdopen(storage.open_regular(path, links=True), "rb") as file,
            zipfile.ZipFile(file) as archive,
        ):
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            value = plain_values(read_entry(archive, names["data.pkl"], MOST_PICKLE_BYTES))
            return make_tensors(value, lambda key: read_entry(archive, names[f"data/{key}"]))
    except (OSError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or f"not a file that torch saved ({error})"
        raise CheckpointError(f"{path}: {why}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged, or not plain values ({error!r:.100})") from None


def read_pickle(path: Path) -> Any:
    """The plain values of a pickle file, such as nanoGPT's meta.pkl. Raises CheckpointError."""
    try:
        with os.fdopen(storage.open_regular(path, links=True), "rb") as file:
            raw = file.read(MOST_PICKLE_BYTES + 1)
        if len(raw) > MOST_PICKLE_BYTES:
            raise ValueError(f"larger than {MOST_PICKLE_BYTES} bytes")
        return plain_values(raw)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged, or not plain values ({error!r:.100})") from None


def read_entry(archive: zipfile.ZipFile, name: str, most: int | None = None) -> bytes:
    """The bytes of an entry; torch never compresses them, so that they cannot swell."""
    about = archive.getinfo(name)
    if about.compress_type != zipfile.ZIP_STORED or (most and about.file_size > most):
        raise ValueError(f"{name}: compressed, or larger than it should be")
    return archive.read(name)


def plain_values(pickled: bytes) -> Any:
    """The value that a pickle describes, as far as no call is needed to make it."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "STOP":
            return stack.pop()
        if name in SCALARS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in PUTS:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in GETS:
            stack.append(memo[argument])
        elif name not in NO_VALUE:
            apply_instruction(name, argument, stack)
    raise ValueError("no end")


def apply_instruction(name: str, argument: Any, stack: list[Any]) -> None:
    """An instruction that makes one value of those on top of the stack."""
    if name == "GLOBAL":
        stack.append(Opaque(argument.replace(" ", ".")))
    elif name == "STACK_GLOBAL":
        stack[-2:] = [Opaque(f"{stack[-2]}.{stack[-1]}")]
    elif name in ("REDUCE", "NEWOBJ"):
        stack[-2:] = [stand_in(stack[-2], stack[-1])]
    elif name == "BUILD":  # what is set on an object; ours are plain
        stack.pop()
    elif name == "TUPLE":
        stack.append(tuple(above_mark(stack)))
    elif name in TUPLES:
        stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
    elif name in ITEMS:
        values = stack[-ITEMS[name] :]
        del stack[-ITEMS[name] :]
        add_items(stack[-1], values)
    elif name in ("APPENDS", "SETITEMS"):
        values = above_mark(stack)
        add_items(stack[-1], values)
    else:
        raise ValueError(f"an instruction {name}")


def above_mark(stack: list[Any]) -> list[Any]:
    at = max(i for i, value in enumerate(stack) if value is MARK)
    values = stack[at + 1 :]
    del stack[at:]
    return values


def add_items(target: Any, values: list[Any]) -> None:
    if isinstance(target, dict):
        target.update(zip(values[::2], values[1::2], strict=True))
    elif isinstance(target, list):
        target += values
    elif not isinstance(target, Opaque):
        raise TypeError(f"items of a {type(target).__name__}")


MARK = Mark()
SCALARS = {
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINFLOAT", "BINBYTES", "SHORT_BINBYTES"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": MARK, "EMPTY_TUPLE": ()}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
PUTS = {"MEMOIZE", "BINPUT", "LONG_BINPUT"}
GETS = {"BINGET", "LONG_BINGET"}
NO_VALUE = {"PROTO", "FRAME", "BINPERSID"}
"""BINPERSID says that the tuple on top stands for raw numbers; who reads a StoredTensor knows."""
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
ITEMS = {"APPEND": 1, "SETITEM": 2}


def stand_in(function: Any, arguments: Any) -> Any:
    """What stands for a call: only these three have a meaning here."""
    if not isinstance(function, Opaque):
        raise TypeError("a call of what is no name")
    if function.name == "collections.OrderedDict":
        return {}
    if function.name == "torch._utils._rebuild_tensor_v2":
        return StoredTensor(*arguments[:4])
    if function.name == "torch._utils._rebuild_parameter":
        return arguments[0]
    return function


def make_tensors(value: Any, raw: Callable[[str], bytes]) -> Any:
    """The value with a tensor for every StoredTensor; what is named twice is made once."""
    flat: dict[str, Tensor] = {}
    done: dict[int, Any] = {}

    def tensor(place: StoredTensor) -> Tensor:
        _, kind, key, *_ = place.storage
        dtype = DTYPES[kind.name.removeprefix("torch.")]
        if 0 in place.size:
            return torch.zeros(place.size, dtype=dtype)
        if key not in flat:
            flat[key] = torch.frombuffer(bytearray(raw(key)), dtype=dtype)
        last = place.offset + sum(
            (n - 1) * s for n, s in zip(place.size, place.stride, strict=True)
        )
        negative = min(*place.size, *place.stride, place.offset, 0) < 0
        if negative or max(last + 1, math.prod(place.size)) > len(flat[key]):
            raise ValueError("a tensor outside of its numbers")
        return flat[key].as_strided(place.size, place.stride, place.offset)

    def walk(part: Any) -> Any:
        if id(part) in done:
            return done[id(part)]
        if isinstance(part, StoredTensor):
            done[id(part)] = tensor(part)
        elif isinstance(part, dict):
            done[id(part)] = {name: walk(inside) for name, inside in part.items()}
        elif type(part) is list:
            done[id(part)] = [walk(inside) for inside in part]
        else:
            return part
        return done[id(part)]

    return walk(value)
