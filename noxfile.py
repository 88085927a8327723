"""The wheel in a new environment and the fast tests, on each Python that is there: `nox` (`pip install nox`).

A Python that is not on the path is skipped, and the end of the output says so. Of pyenv's, these are on it:
`PYENV_VERSION=3.11.7:3.12.1:3.13.0 nox -s wheel`.
"""

import nox

PYTHONS = ["3.11", "3.12", "3.13"]
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Build, install and try the wheel outside the clone, with the SB3 extra."""
    session.install("build", "setuptools>=77", "tyro")
    session.run("python", "-m", "tools.package", "build")
    session.run("python", "-m", "tools.package", "try")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The fast tests, at the versions of constraints.txt."""
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs, env={"OMP_NUM_THREADS": "1"})
