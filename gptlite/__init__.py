"""gptlite: small GPTs trained end to end from YAML, with dropout as a named, measured thing."""

__version__ = "0.1.0"
