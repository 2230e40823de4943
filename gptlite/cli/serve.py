"""`gptlite serve`: an HTTP service and a page over trained runs."""

from functools import partial
from typing import Annotated

import typer

from gptlite.cli.options import CheckpointOption, Verbose, complete_runs
from gptlite.errors import ConfigError, MissingPackages
from gptlite.terminal import tell, user_errors

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ADDRESS, LIMITS = "Address", "Limits"
PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def serve(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            show_default="the latest under runs/, if there is one",
            help="Run directories.",
            autocompletion=complete_runs,
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            metavar="PORT",
            rich_help_panel=ADDRESS,
            help="Port to listen at; 0 takes any that is free.",
        ),
    ] = 8000,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel=ADDRESS,
            help="Address to listen at; one that other machines reach needs --token.",
        ),
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            rich_help_panel=ADDRESS,
            help="Secret that every request must send. The environment variable GPTLITE_TOKEN "
            "does the same and stays out of the list of processes.",
            envvar="GPTLITE_TOKEN",
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            max=1024,
            metavar="COMPLETIONS",
            rich_help_panel=LIMITS,
            help="Completions that a model writes at once.",
        ),
    ] = 32,
    queue: Annotated[
        int,
        typer.Option(
            min=1,
            max=100_000,
            metavar="REQUESTS",
            rich_help_panel=LIMITS,
            help="Requests that may wait; further ones are answered with status 429.",
        ),
    ] = 64,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=1_000_000,
            metavar="TOKENS",
            rich_help_panel=LIMITS,
            help="Longest completion, in tokens.",
        ),
    ] = 4096,
    max_body: Annotated[
        int,
        typer.Option(
            min=1000,
            max=1 << 30,
            metavar="BYTES",
            rich_help_panel=LIMITS,
            help="Largest request, in bytes.",
        ),
    ] = 1_000_000,
    timeout: Annotated[
        float,
        typer.Option(
            min=1,
            max=86_400,
            metavar="SECONDS",
            rich_help_panel=LIMITS,
            help="Longest time for an answer, in seconds.",
        ),
    ] = 600.0,
    checkpoint: CheckpointOption = "best",
    verbose: Verbose = False,
) -> None:
    """Serve trained runs over HTTP: OpenAI's API, and a page to write, watch and see dropout."""
    with user_errors(verbose):
        if host not in LOOPBACK and not token:
            raise ConfigError(f"--host {host}: others could ask; give a --token as well")
        if token is not None and not (token and token.isascii() and token.isprintable()):
            raise ConfigError("--token: give printable ASCII characters")
        try:
            from gptlite.serve import server
            from gptlite.serve.app import Limits, Service, make_app
        except ModuleNotFoundError as error:
            if error.name not in PACKAGES:
                raise
            raise MissingPackages("gptlite serve", *PACKAGES) from None
        from gptlite.cli.printing import tell_notes
        from gptlite.runs.directory import RUNS, existing_run

        directories = [existing_run(name, "") for name in runs or []]
        if not runs and any(RUNS.glob("*/config.yaml")):
            directories = [existing_run(None)]
        named = server.name_models(directories)

        def say(bound: int) -> None:
            shown = f"[{host}]" if ":" in host else host
            names = ", ".join(named) or "no model yet"
            print(f"serving {names} at http://{shown}:{bound}/  (Ctrl-C ends)", flush=True)

        limits = Limits(max_tokens, max_body, timeout)
        with server.demo_folder() as train_demo:
            service = Service(
                dict(named),
                limits=limits,
                most_waiting=queue,
                train_demo=train_demo,
                load_demo=server.load_demo,
            )
            service.engine.start()
            service.engine.load(partial(server.load_models, named, checkpoint, batch, tell))
            for model in service.engine.models.values():
                tell_notes(model.trained)
            # Elsewhere the names are not known, and the token is what protects.
            hosts = server.OWN_NAMES if host in LOOPBACK else None
            app = make_app(service, hosts=hosts, token=token)
            server.serve_app(app, host, port, say)
