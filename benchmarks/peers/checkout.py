"""A checkout of another build, to be imported in place of the installed one."""

from pathlib import Path


def importable(checkout: Path, folder: Path) -> Path:
    """A folder, filled here, from which a checkout's package is imported, also of one whose agents lie beside it."""
    package = folder / "diffusion_gym"
    package.mkdir(parents=True)
    for entry in (checkout / "diffusion_gym").iterdir():
        (package / entry.name).symlink_to(entry.resolve())
    for name in ("agents", "wrappers"):
        if not (package / name).exists():
            (package / name).symlink_to((checkout / name).resolve())
    return folder
