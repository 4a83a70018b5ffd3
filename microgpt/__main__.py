"""The entry of the command line: signals are handled before anything else is imported."""

import sys

from microgpt.launch import attach
from microgpt.signals import begin


def main() -> int:
    """Run a command; returns the exit status."""
    begin("microgpt")
    attach()
    from microgpt.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
