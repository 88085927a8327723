"""The parts of README.md and docs/ that are made of records and registries; `python -m tools.pages` writes all."""
