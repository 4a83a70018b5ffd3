"""The entry of the command line: signals are handled before anything else is imported."""

import sys

from microgpt.runs import launch, signals


def main() -> int:
    """Run a command; returns the exit status."""
    launch.begin()
    signals.begin("microgpt")
    from microgpt.cli.commands import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
