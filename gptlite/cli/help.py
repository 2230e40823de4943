"""How `--help` looks: options in groups, each with a word for its value, its range and its default.

The group of an option is its `rich_help_panel`, which typer's own plain help does not show; options
without one come last. Nothing is cut: what is too long for the terminal is wrapped.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from gptlite.cli.options import EXAMPLES

WIDEST = 100
"""Columns of the text, however wide the terminal."""
Command = TypeVar("Command", bound=Callable[..., None])


class PlainCommand(TyperCommand):
    def collect_usage_pieces(self, context: Any) -> list[str]:
        return usage(self, context)

    def format_options(self, context: Any, formatter: Any) -> None:
        write_groups(self, context, formatter)


class PlainGroup(TyperGroup):
    def format_options(self, context: Any, formatter: Any) -> None:
        write_groups(self, context, formatter)
        summaries = [(name, summary(command)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(summaries)


def make_app(name: str, help: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        help=help,
        cls=PlainGroup,
        context_settings={"max_content_width": WIDEST},
        add_completion=True,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def add_command(app: typer.Typer, name: str, examples: str = "") -> Callable[[Command], Command]:
    """A command of this name, with the examples of `examples` or of itself below its options."""
    lines = EXAMPLES.get(examples or name, ())
    # The mark keeps the lines from being wrapped.
    epilogue = "Examples:\n\n\b\n" + "\n".join(f"  {line}" for line in lines) if lines else None
    return app.command(name, cls=PlainCommand, epilog=epilogue)


def summary(command: Any) -> str:
    """The first paragraph of a command's help."""
    return " ".join((command.help or "").partition("\n\n")[0].split())


def usage(command: Any, context: Any) -> list[str]:
    """What stands behind a command: `[OPTIONS] FILE`."""
    words = ["[OPTIONS]"]
    for parameter in command.get_params(context):
        if parameter.param_type_name == "argument":
            name = name_of(parameter)
            words.append(name if parameter.required else f"[{name}]")
    return words


def write_groups(command: Any, context: Any, formatter: Any) -> None:
    for title, rows in group_parameters(command, context).items():
        with formatter.section(title):
            formatter.write_dl(rows)


def group_parameters(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """By group, each parameter with what is said of it."""
    groups: dict[str, list[tuple[str, str]]] = {}
    rest = []
    for parameter in command.get_params(context):
        row = (name_of(parameter), " ".join(remarks(parameter)))
        if parameter.param_type_name == "argument":
            groups.setdefault("Arguments", []).append(row)
        elif group := getattr(parameter, "rich_help_panel", None):
            groups.setdefault(group, []).append(row)
        else:
            rest.append(row)
    alone = not groups.keys() - {"Arguments"}
    return {**groups, "Options" if alone else "Other options": rest}


def name_of(parameter: Any) -> str:
    """As it is typed: `-c, --config CONFIG`, `RUN...`."""
    value = parameter.metavar or ""
    if parameter.param_type_name == "argument":
        return value + "..." * (parameter.nargs != 1)
    flags = ", ".join(sorted(parameter.opts, key=len))
    return flags if parameter.is_flag else f"{flags} {value}"


def remarks(parameter: Any) -> Iterator[str]:
    """What it does, then in brackets what it must be and what it is unless given."""
    yield parameter.help or ""
    facts = ["required"] if parameter.required else []
    low, high = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if low is not None:
        facts.append(f"at least {show(low)}" if high is None else f"{show(low)} to {show(high)}")
    told = parameter.show_default  # in words, where the value says nothing
    default = told if isinstance(told, str) else parameter.default
    if default is not None and default is not False and default != "":
        facts.append(f"default: {show(default)}")
    if facts:
        yield f"[{'; '.join(facts)}]"


def show(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if abs(value) >= 100_000 else f"{value:g}"
