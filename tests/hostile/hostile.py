"""Files made to harm: what they hold, and how each reaches a command. watched.py runs them."""

import base64
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptlite import storage
from gptlite.core.weights import FILES
from gptlite.errors import ConfigError

STEP = Path("copy/checkpoints/step-00000002")
SECRET = Path("../secret")
"""Outside the folder of a case; nothing may change it. Never a file of the system: a case that
finds a hole must not do harm."""
SING = "__import__('os').makedirs('canary', exist_ok=True)"
SHELL = b"S'echo > canary'\n"
MANY_LAYERS = "model:\n  n_layer: 1000000000\n"


class Case(NamedTuple):
    name: str
    command: list[str]
    lay: Callable[[], object]
    """Makes the file, in an empty folder that holds `copy`, a run of its own."""
    codes: tuple[int, ...] = (3,)
    says: str = ""
    """A pattern that stderr must hold."""
    lines: int | None = 1


# Pickles


class Sings:
    """Unpickling one of these leaves a file behind: the canary."""

    def __reduce__(self) -> Any:
        return eval, (SING,)


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(**members: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return file.getvalue()


def numpy_objects() -> bytes:
    about = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + about.ljust(117) + b"\n"
    return head + pickle.dumps([Sings()])


PLAIN_PICKLES = {
    "reduce": b"cos\nsystem\n(" + SHELL + b"tR.",
    "instance": b"(" + SHELL + b"ios\nsystem\n.",
    "object": b"(cos\nsystem\n" + SHELL + b"o.",
    "setitem": b"csys\nmodules\nS'gptlite_canary'\ncos\nsystem\n(" + SHELL + b"tRs.",
    "append": b"(lcos\nsystem\n(" + SHELL + b"tRa.",
    "build": b"ctypes\nSimpleNamespace\n(tR(dS'a'\ncos\nsystem\n(" + SHELL + b"tRsb.",
    "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(" + SHELL + b"tR.",
    "popen": b"csubprocess\ngetoutput\n(" + SHELL + b"tR.",
    **{f"protocol {n}": pickle.dumps({"model": [Sings()]}, protocol=n) for n in range(6)},
    "nested": pickle.dumps([[{"a": (Sings(), {1: Sings()})}]]),
    # One byte of data and its length, which to safetensors say: a header of 398 bytes. The others
    # begin with a number so large that it is refused before anything tries to load the file.
    "short header": b"\x8e" + struct.pack("<Q", 1) + b"x0" + b"cos\nsystem\n(" + SHELL + b"tR.",
}
"""Each sings when it is loaded; a test makes sure."""

_OLD_TORCH = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
PICKLES = {
    **PLAIN_PICKLES,
    "torch zip": zipped(**{"a/data.pkl": PLAIN_PICKLES["nested"], "a/version": b"3\n"}),
    "torchscript": zipped(**{"a/data.pkl": PLAIN_PICKLES["reduce"], "a/code/m.py": SING.encode()}),
    "torch of old": _OLD_TORCH + PLAIN_PICKLES["nested"],
    "torch tar": tarred(pickle=PLAIN_PICKLES["reduce"], storages=b"", tensors=b""),
    "numpy objects": numpy_objects(),
    "numpy zip": zipped(**{"arr_0.npy": numpy_objects()}),
    "zip way out": zipped(**{"../canary": b"sings", "../../canary": b"sings"}),
    "tar way out": tarred(**{"../canary": b"sings"}),
    "zip bomb": zipped(**{"a/data.pkl": bytes(100_000_000)}),
}
SIZES = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "bias": True, "dropout": 0.0}
CACHE = ["--set", "data.cache_dir=cache"]
NEW = ["train", "-c", "copy/config.yaml", "--out-dir", "new"]
WAYS: dict[str, list[str]] = {
    "run": ["generate", "--run", "{}"],
    "checkpoint": ["generate", "--run", "copy", "--checkpoint", "{}"],
    "resume": ["train", "--resume", "{}"],
    "config": ["config", "check", "--config", "{}"],
    "prompt": ["generate", "--run", "copy", "--prompt-file", "{}"],
    "split": ["eval", "--run", "copy", "--split", "{}"],
    "init": [*NEW, "--set", "init_from={}"],
    "import": ["import", "{}", "--out", "new"],
    "meta": ["import", "ckpt.pt", "--meta", "{}", "--out", "new"],
    "source": ["prepare", "-c", "copy/config.yaml", "--set", "data.source={}", *CACHE],
}


NANOGPT = zipped(
    **{"a/data.pkl": pickle.dumps({"model": {}, "model_args": {**SIZES, "vocab_size": 3}}, 2)}
)
"""A checkpoint whose tokenizer is in the meta.pkl beside it."""
MODEL_BYTES = 1 << 18
"""As large as a model might be: a smaller file is refused by arithmetic before it is opened."""


def pickles() -> Iterator[Case]:
    endings = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".zip")
    for number, (name, content) in enumerate(PICKLES.items()):
        file = f"evil{endings[number % len(endings)]}"

        def lay(file: str = file, content: bytes = content) -> None:
            Path(file).write_bytes(content)
            Path("ckpt.pt").write_bytes(NANOGPT)

        for way, words in WAYS.items():
            codes = (2, 3) if way in ("import", "meta") else (2,)
            command = [word.format(file) for word in words]
            says = "never loaded" if way == "init" else ""
            yield Case(f"{name} as {way}", command, lay, codes, says, None)
        for part in FILES:

            def instead(part: str = part, content: bytes = content) -> None:
                write_sealed(part, content.ljust(MODEL_BYTES, b"\0"))  # no pickle reads its end

            generate, resume = used()[0], ["train", "--resume", "copy"]
            command = generate if part == FILES[0] else resume
            yield Case(f"{name} as {part}", command, instead, (3,), "bad checkpoint", None)
    beside = ["prepare", "-c", "copy/config.yaml", "--set", "data.source=ids"]
    yield Case("meta.pkl", [*beside, "--set", "tokenizer.kind=byte"], nanogpt, (0,))
    yield Case("DCP", ["train", "--resume", "dcp"], distributed, (2,), "not a gptlite checkpoint")


def nanogpt() -> None:
    Path("ids").mkdir()
    for name in ("train", "val"):
        Path("ids", f"{name}.bin").write_bytes(b"a\0b\0" * 50)
    Path("ids/meta.pkl").write_bytes(PLAIN_PICKLES["reduce"])


def distributed() -> None:
    Path("dcp").mkdir()
    Path("dcp/.metadata").write_bytes(PLAIN_PICKLES["nested"])
    Path("dcp/__0_0.distcp").write_bytes(PICKLES["torch zip"])


# Checkpoints


def used() -> tuple[list[str], list[str]]:
    """Commands that read the weights of a checkpoint by its name."""
    step = ["--run", "copy", "--checkpoint", "step-2"]
    return ["generate", *step, "--max-new-tokens", "1"], ["eval", *step]


def reseal(**values: Any) -> None:
    """Change state.json and seal it again, as who means harm can."""
    path = STEP / "state.json"
    path.write_text(storage.seal({**storage.unseal(path.read_text()), **values}))


def write_sealed(part: str, content: bytes) -> None:
    (STEP / part).write_bytes(content)
    saved = storage.unseal((STEP / "state.json").read_text())["files"]
    reseal(files={**saved, part: storage.file_digest(STEP / part)})


def header(text: str | bytes, data: bytes = bytes(64), length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(dtype: str = "F32", shape: Any = (4,), at: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


EMPTY = json.dumps(tensor("U8", [0], [0, 0]))


def described(**tensors: Any) -> bytes:
    return header(json.dumps(tensors))


HEADERS: dict[str, Callable[[], bytes]] = {
    "no bytes": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "length 0": lambda: header("", length=0),
    "length 2^63": lambda: header("{}", length=2**63),
    "length 2^64 - 1": lambda: header("{}", length=2**64 - 1),
    "length beyond": lambda: header("{}", length=3000),
    "99 MB": lambda: header(b" " * 99_000_000),
    "not UTF-8": lambda: header(b'{"\xff\xfe": 1}'),
    "not JSON": lambda: header("{]"),
    "a list": lambda: header("[]"),
    "deep": lambda: header("[" * 100_000),
    "deep tensor": lambda: header('{"a":' * 50_000),
    "twice": lambda: header(f'{{"a": {json.dumps(tensor())}, "a": {json.dumps(tensor())}}}'),
    "overlap": lambda: described(a=tensor(), b=tensor(at=(8, 24))),
    "hole": lambda: described(a=tensor(), b=tensor(at=(48, 64))),
    "past the end": lambda: described(a=tensor(shape=(100,), at=(0, 400))),
    "too short": lambda: described(a=tensor(shape=(5,))),
    "backwards": lambda: described(a=tensor(at=(16, 0))),
    "overflow": lambda: described(a=tensor(shape=(2**62, 2**62))),
    "2^64": lambda: described(a=tensor(shape=(2**64,))),
    "negative": lambda: described(a=tensor(shape=(-4,))),
    "empty and vast": lambda: described(
        a=tensor(shape=(2**62, 0), at=(0, 0)), b=tensor("U8", [64], [0, 64])
    ),
    "half an element": lambda: described(a=tensor(shape=(1.5,))),
    "dtype nobody has": lambda: described(a=tensor("F33")),
    "dtype torch lacks": lambda: described(a=tensor("F6_E2M3", [4], [0, 3])),
    "eight bits": lambda: described(a=tensor("F8_E4M3", [64], [0, 64])),
    "four bits": lambda: described(a=tensor("F4", [128], [0, 64])),
    "complex": lambda: described(a=tensor("C64", [8], [0, 64])),
    "no tensors": lambda: header("{}", data=b""),
    "metadata": lambda: header('{"__metadata__": {"a": [1]}}'),
    "a million tensors": lambda: header(
        "{" + ",".join(f'"{i}":{EMPTY}' for i in range(10**6)) + "}"
    ),
    "many empty tensors": lambda: described(
        **{str(i): tensor("U8", [0], [0, 0]) for i in range(50_000)}
    ),
}


def headers() -> Iterator[Case]:
    for name, make in HEADERS.items():

        def lay(make: Callable[[], bytes] = make) -> None:
            write_sealed(FILES[0], make())

        for command in used():
            yield Case(f"header: {name}: {command[0]}", command, lay, says="bad checkpoint|not fit")


# What stands in place of a file


def change(part: str, how: Callable[[Path], object]) -> Callable[[], None]:
    def lay() -> None:
        how(Path("copy") / part)

    return lay


def replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def swap(path: Path) -> None:
        path.rename("aside")
        make(path)

    return swap


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes() or b"empty")
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def link_to(target: str) -> Callable[[Path], None]:
    return replace(lambda path: path.symlink_to(target))


INSTEAD: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": flip,
    "longer": grow,
    "a link to itself moved": replace(lambda path: path.symlink_to(Path("aside").resolve())),
    "a link to a secret": replace(lambda path: path.symlink_to(SECRET.resolve())),
    "a link to a device": link_to("/dev/zero"),
    "a link to nothing": link_to("nothing"),
    "a circle": replace(lambda path: path.symlink_to(path.name)),
    "a pipe": replace(os.mkfifo),
    "a folder": replace(Path.mkdir),
    "unreadable": lambda path: path.chmod(0),
}
OF_ROOT = ("unreadable",)
"""What does not stop root."""


def instead() -> Iterator[Case]:
    step = STEP.relative_to("copy")
    for name, how in INSTEAD.items():
        if name in OF_ROOT and os.geteuid() == 0:
            continue
        for part in (*FILES, "state.json"):
            for command in (*used(), ["train", "--resume", "copy"]):
                lay = change(f"{step}/{part}", how)
                lines = None if command[0] == "train" else 1
                yield Case(f"{part}: {name}: {command[0]}", command, lay, (3,), part, lines)
        lay = change("tokenizer/tokenizer.json", how)
        yield Case(f"tokenizer: {name}", used()[0], lay, (3,), "tokenizer.json")
        for part in ("best", "last", "../metrics.jsonl", "../summary.json", "../plan.json"):
            command = ["generate", "--run", "copy", "--max-new-tokens", "1"]
            yield Case(
                f"{part}: {name}", command, change(f"checkpoints/{part}", how), (0,), "", None
            )
        for part in (
            ".lock",
            "metrics.jsonl",
            "train.log",
            "summary.json",
            "env.json",
            "plan.json",
        ):
            command = ["train", "--resume", "copy"]
            lay = change(part, how)
            yield Case(f"resume, {part}: {name}", command, lay, (0, 2, 5), "", None)
    for command in (*used(), ["train", "--resume", "copy"]):
        lay = change(str(step), replace(lambda path: path.symlink_to(Path("aside").resolve())))
        yield Case(f"step folder a link: {command[0]}", command, lay, (3,), str(step), None)


POINTERS = {
    "way out": "../../x",
    "absolute": "/nowhere/step-00000002",
    "long": "step-00000002" + "0" * 100_000,
    "other digits": "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0662",
    "escape": "\x1b[31mstep-00000002",
    "two": "step-00000002\nstep-00000001",
    "not there": "step-00000009",
}


def pointers() -> Iterator[Case]:
    for name, text in POINTERS.items():
        for which in ("best", "last"):
            lay = change(f"checkpoints/{which}", lambda path, text=text: path.write_text(text))
            command = [*used()[0][:3], "--checkpoint", which]
            yield Case(f"{which}: {name}", command, lay, (0,), "", None)


# Configs and tokenizers


def configs() -> Iterator[Case]:
    for key, value in {
        "n_layer": 10**9,
        "n_layer: 1e5": 100_000,
        "n_embd": 10**6,
        "context_length": 10**12,
        "n_head": 8,
    }.items():

        def lay(key: str = key.split(":")[0], value: int = value) -> None:
            path = Path("copy/config.yaml")
            text = path.read_text()
            start = text.index(f"  {key}: ")
            end = text.index("\n", start)
            path.write_text(f"{text[:start]}  {key}: {value}{text[end:]}")

        says = "would need|not fit|differs"
        yield Case(f"config: {key}", used()[0], lay, (2, 3), says)

        def sealed_as_well(lay: Callable[[], None] = lay) -> None:
            """The checkpoint says the same as the config."""
            from gptlite.runs.origin import load_run

            lay()
            try:
                run = load_run(["copy/config.yaml"], [])
            except ConfigError:
                return
            reseal(config=run.model_dump(mode="json"))

        if key != "n_head":  # sealed as well, it is simply another model
            for command in (used()[0], ["train", "--resume", "copy"]):
                name = f"config and state: {key}: {command[0]}"
                yield Case(name, command, sealed_as_well, (2, 3), says)


def ranks(more: dict[bytes, Any] | None = None) -> dict[str, Any]:
    every = {bytes([i]): i for i in range(256)}
    return {base64.b64encode(k).decode(): v for k, v in {**every, **(more or {})}.items()}


def bpe(**values: Any) -> dict[str, Any]:
    from gptlite.data.tokenizers import GPT2_PATTERN

    plain = {"kind": "bpe", "name": "bpe", "pattern": GPT2_PATTERN, "eot": 256, "ranks": ranks()}
    return {**plain, **values}


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: {},
    "kind a list": lambda: {"kind": []},
    "kind nobody has": lambda: {"kind": "pickle"},
    "byte eot 1": lambda: {"kind": "byte", "eot": 1},
    "byte eot a list": lambda: {"kind": "byte", "eot": []},
    "char twice": lambda: {"kind": "char", "characters": "aa", "eot": True, "unknown": "error"},
    "char a list": lambda: {"kind": "char", "characters": ["a"], "eot": True, "unknown": "error"},
    "char unknown": lambda: {"kind": "char", "characters": "a", "eot": True, "unknown": "exec"},
    "char surrogate": lambda: {
        **{"kind": "char", "characters": "a\ud800", "eot": True, "unknown": "error"}
    },
    "huge id": lambda: bpe(eot=2**62),
    "id beyond 64 bits": lambda: bpe(eot=2**80),
    "negative id": lambda: bpe(eot=-1),
    "id true": lambda: bpe(eot=True),
    "id a text": lambda: bpe(eot="256"),
    "same ids": lambda: bpe(ranks=ranks({b"ab": 5})),
    "eot of a byte": lambda: bpe(eot=5),
    "not base64": lambda: bpe(ranks={**ranks(), "!": 257}),
    "empty token": lambda: bpe(ranks=ranks({b"": 257})),
    "no ranks": lambda: bpe(ranks={}),
    "ranks a list": lambda: bpe(ranks=[1]),
    "pattern that is none": lambda: bpe(pattern="("),
    "pattern a number": lambda: bpe(pattern=3),
    "pattern a megabyte": lambda: bpe(pattern="a" * 1_000_000),
    "pattern of repeats": lambda: bpe(pattern="(?:a{1000}){1000}"),
    "pattern without end": lambda: bpe(pattern=r"(?:(?:\w| )+)+(?!.)(?=x)(?<!y)"),
    "pattern that looks back": lambda: bpe(pattern=r"(a|b|ab)*\1(?=c)"),
    "pattern of nothing": lambda: bpe(pattern=""),
    "pattern that skips": lambda: bpe(pattern="x"),
    "name a number": lambda: bpe(name=3),
    "name with an escape": lambda: bpe(name="\x1b[31m"),
}


def tokenizers() -> Iterator[Case]:
    from gptlite.data.tokenizers import TOKENIZERS as KINDS

    assert set(KINDS) == {"byte", "char", "bpe", "tiktoken"}
    for name, make in TOKENIZERS.items():

        def lay(make: Callable[[], Any] = make) -> None:
            document = make()
            Path("copy/tokenizer/tokenizer.json").write_text(storage.seal(document))
            plain = json.dumps(document, sort_keys=True).encode()
            reseal(tokenizer_sha256=hashlib.sha256(plain).hexdigest())

        command = [*used()[0], "--prompt", "the end of the letter " * 20]
        yield Case(f"tokenizer: {name}", command, lay, (3,), "tokenizer|not fit")


def cases() -> Iterator[Case]:
    for each in (pickles, headers, instead, pointers, configs, tokenizers):
        yield from each()
