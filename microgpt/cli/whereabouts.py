"""Which scalar/ and vectorized/ Python imports, so that the edited copy is the checked one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from microgpt.errors import MicrogptError, printable

IMPLEMENTATIONS = ("scalar", "vectorized")


def imported_from(package: str) -> Path:
    """The folder of the package that Python imports, found without running the package."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MicrogptError(f"{package}/ is not installed; pip install --editable the checkout")
    return Path(spec.origin).resolve().parent.parent


def described() -> str:
    """One line: which scalar/ and vectorized/ are imported."""
    scalar, vectorized = map(imported_from, IMPLEMENTATIONS)
    if scalar == vectorized:
        return printable(f"scalar/ and vectorized/ in {scalar}")
    return printable(f"scalar/ in {scalar}, vectorized/ in {vectorized}")


def checkout(folder: Path) -> Path | None:
    """The checkout in which a folder lies, or None."""
    for parent in (folder.resolve(), *folder.resolve().parents):
        packages = (*IMPLEMENTATIONS, "crosscheck")
        beside = all((parent / package / "__init__.py").is_file() for package in packages)
        if beside and (parent / "pyproject.toml").is_file():
            return parent
    return None


def refuse_another_copy(folder: Path | None = None) -> None:
    """Raise MicrogptError in a checkout whose packages are not those that are imported."""
    here = checkout(folder or Path.cwd())
    for package in (*IMPLEMENTATIONS, "crosscheck") if here else ():
        there = imported_from(package)
        if there != here:
            raise MicrogptError(
                printable(
                    f"{package}/ would come from {there}, and you are in the checkout {here};"
                    f" run `pip install --editable {here}`, or leave that folder"
                )
            )
