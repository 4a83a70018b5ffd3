"""The tests with every supported Python and NumPy: python -m tests.matrix [ARGUMENTS OF PYTEST]

Looks for python3.10 to python3.13 in pyenv and on the PATH, makes an environment for each pair in a
temporary folder, and prints a table. Exits with 1 if a pair failed. In full it takes half an hour;
--python 3.12 --numpy 1.26 -- tests/commands/test_cli.py -k resume runs one pair and a few tests.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NUMPYS = {"1.26": "numpy==1.26.*", "newest": "numpy"}
NO_WHEELS = {("3.13", "1.26"): "NumPy 1.26 has no wheels for Python 3.13"}


def found(version: str) -> str | None:
    """An interpreter of that version."""
    installed = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return str(installed[-1]) if installed else shutil.which(f"python{version}")


def outcome(version: str, numpy: str, folder: Path, arguments: Sequence[str]) -> str:
    """What the tests say with that Python and that NumPy."""
    if (version, numpy) in NO_WHEELS:
        return NO_WHEELS[version, numpy]
    interpreter = found(version)
    if interpreter is None:
        return f"no python{version} here"
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    python = str(folder / scripts / "python")
    commands = (
        [interpreter, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "-q", "-e", str(ROOT), NUMPYS[numpy]],
        [python, "-c", "import numpy; print(numpy.__version__)"],
        [python, "-m", "pytest", "-q", *arguments],
    )
    printed = []
    for command in commands:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
        if ran.returncode:
            said = [*ran.stdout.splitlines(), *ran.stderr.splitlines()]
            return f"FAILED: {said[-1] if said else ' '.join(command)}"
        printed += ran.stdout.splitlines()[-1:]
    return f"{printed[-2]}: {printed[-1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--python", action="append", choices=PYTHONS)
    parser.add_argument("--numpy", action="append", choices=list(NUMPYS))
    parser.add_argument("pytest", nargs="*", metavar="ARGUMENT", help="of pytest, after --")
    options = parser.parse_args(arguments)
    failed = False
    print(f"{'Python':8}{'NumPy':8}tests")
    for version in options.python or PYTHONS:
        for numpy in options.numpy or NUMPYS:
            with tempfile.TemporaryDirectory() as folder:
                said = outcome(version, numpy, Path(folder), options.pytest)
            failed = failed or said.startswith("FAILED")
            print(f"{version:8}{numpy:8}{said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
