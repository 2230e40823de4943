"""Where the queue of a study is kept: a journal in its folder, or a database that machines share.

Whatever goes wrong there is one line that names the place, without its password.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptlite.errors import ConfigError, MissingPackages, StorageError
from gptlite.words import mask_passwords, passwords

CONNECT = {
    "sqlite": {"timeout": 60},
    "postgresql": {
        **{"connect_timeout": 10, "tcp_user_timeout": 60_000},
        **{"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3},
    },
}
"""By kind of database: how long (s; the second ms) its client waits, which else is for hours."""
DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""The package that a module is in, where the names differ."""
TRIES = 20
"""Of opening a database: who comes first makes its tables, and who comes at once fails."""


def optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingPackages("gptlite study", "optuna", "scipy") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class StudyStorage:
    """A journal's file or a database's URL."""

    def __init__(self, journal: Path, url: str | None) -> None:
        self.journal, self.url = journal, url

    def __str__(self) -> str:
        return str(self.journal) if self.url is None else mask_passwords(self.url)

    def check(self) -> None:
        """ConfigError for what is no URL, and for packages that are not there."""
        optuna()
        if self.url is not None:
            self.connection_options(self.url)

    def open_study(self, name: str) -> Any:
        """The study of this name there, made if it is new.

        ConfigError for what is no URL, UserError without its driver, StorageError for the rest."""
        library, options = optuna(), {} if self.url is None else self.connection_options(self.url)
        try:
            found = library.create_study(
                storage=self.connect(options),
                study_name=name,
                load_if_exists=True,
                pruner=library.pruners.MedianPruner(4),
            )
            found.get_trials()
        except Exception as error:  # whatever the library of that database raises
            raise self.failure(error) from None
        return found

    def connect(self, options: dict[str, Any]) -> Any:
        storages = optuna().storages
        if self.url is None:
            file = storages.journal.JournalFileBackend(str(self.journal))
            return storages.JournalStorage(file)
        for _ in range(TRIES - 1):
            try:
                return storages.RDBStorage(self.url, engine_kwargs=options)
            except Exception as error:
                if not is_table_race(error):
                    raise
                time.sleep(0.1)
        return storages.RDBStorage(self.url, engine_kwargs=options)

    def connection_options(self, url: str) -> dict[str, Any]:
        """Of the connection; what the URL says itself stays."""
        import sqlalchemy

        try:
            parts = sqlalchemy.make_url(url)
            kind, driver = parts.get_backend_name(), parts.get_driver_name()
            parts.get_dialect().import_dbapi()
        except (sqlalchemy.exc.ArgumentError, ValueError) as error:
            raise ConfigError(f"--storage {self}: no database URL ({self.reason(error)})") from None
        except ImportError as error:
            package = DRIVERS.get(error.name or "", error.name or "")
            raise MissingPackages(f"--storage {self}:", package) from None
        known = CONNECT.get(kind, {}) if driver in ("pysqlite", "psycopg", "psycopg2") else {}
        given = {name: value for name, value in known.items() if name not in parts.query}
        # A file is opened anew each time: a kept connection nobody would close.
        pool = {"poolclass": sqlalchemy.NullPool} if kind == "sqlite" else {"pool_pre_ping": True}
        return {**pool, "connect_args": given}

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """StorageError where it is gone in the middle of a study; what a run raises is its own."""
        import sqlalchemy

        below = optuna().exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError
        try:
            yield
        except below as error:
            raise self.failure(error) from None

    def failure(self, error: Exception) -> StorageError:
        told = f"{self}: {self.reason(error)}"
        return StorageError(f"{told}; what is done is kept, and the same command goes on")

    def reason(self, error: BaseException) -> str:
        """The first line of what was first, unless it has the password."""
        while error.__cause__ is not None:
            error = error.__cause__
        lines = str(error).strip().splitlines() or [type(error).__name__]
        secrets = passwords(self.url or "")
        return type(error).__name__ if any(word in lines[0] for word in secrets) else lines[0]


def is_table_race(error: BaseException) -> bool:
    """Whether another one has made the same tables at the same time."""
    import sqlalchemy

    twice = "already exists" in f"{error} {error.__cause__}"
    return twice or isinstance(error, sqlalchemy.exc.IntegrityError)
