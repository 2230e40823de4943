"""`python -m gptlite`, so that `torchrun -m gptlite train ...` works."""

from gptlite.cli.main import main

if __name__ == "__main__":
    main()
