"""Run the command line: ``python -m aiqueue``."""

from .cli import main

if __name__ == "__main__":
    main()
