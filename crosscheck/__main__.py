"""`python -m crosscheck`: what belongs to the crosscheck and is not a test."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from crosscheck.cases import CASES, case_names, draw_params, read_case
from microgpt.checkpoint import save_params


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crosscheck", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    params = commands.add_parser("params", help="draw the parameters of cases anew and store them")
    params.add_argument("case", nargs="*", help="which cases (default: all)")
    options = parser.parse_args(arguments)
    for name in options.case or case_names():
        save_params(CASES / f"{name}.safetensors", draw_params(read_case(CASES / f"{name}.yaml")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
