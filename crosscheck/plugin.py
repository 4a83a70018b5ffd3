"""The plugin of pytest for `pytest crosscheck` and `--candidate mine.py`.

pytest loads the plugin wherever this package is installed. A run with neither of the two is not
changed, and imports no other module of this package.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("candidate", "functions of a GPT, checked (microgpt-crosscheck)")
    group.addoption("--candidate", type=Path, metavar="FILE", help="check the functions in this"
                    " file or package, instead of running tests")  # fmt: skip
    group.addoption("--hint", action="count", default=0, help="with --candidate: what it looks"
                    " like; given twice, the equation as well")  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Let `pytest crosscheck` run the installed tests if there is no file or folder of that name.

    The tests of another copy of this package are refused before pytest imports them.
    """
    for given in (".", *args, *early_config.known_args_namespace.file_or_dir):
        _refuse_another_copy(Path(given.partition("::")[0]).resolve())
    if Path("crosscheck").exists():
        return
    for given in (args, early_config.known_args_namespace.file_or_dir):
        if "crosscheck" in given:
            given[given.index("crosscheck")] = str(Path(__file__).parent)


def _refuse_another_copy(path: Path) -> None:
    """Raise pytest.UsageError if the path lies in another copy of this package."""
    if not any(
        (folder / "crosscheck" / "__init__.py").exists() for folder in (path, *path.parents)
    ):
        return
    from microgpt.cli.whereabouts import refuse_another_copy
    from microgpt.errors import MicrogptError

    try:
        refuse_another_copy(path)
    except MicrogptError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """The exit status of the verdict on a candidate; None without --candidate: pytest goes on."""
    path: Path | None = config.getoption("--candidate")
    if path is None:
        return None
    from crosscheck.check import run
    from microgpt.cli.shell import guarded
    from microgpt.errors import MicrogptError

    def judged() -> int:
        if config.getoption("--html", None):
            raise MicrogptError(
                "--html draws the tensors of whole runs, and a candidate is judged function by"
                " function; leave --html out"
            )
        return run(path, config.getoption("--hint"), True, 5.0)

    capture = config.pluginmanager.getplugin("capturemanager")
    if capture:
        capture.suspend_global_capture(in_=True)
    try:
        return guarded("pytest --candidate", judged)
    finally:
        if capture:
            capture.resume_global_capture()
