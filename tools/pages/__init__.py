"""The tables of README.md and docs/ that are made of records, between markers; `python -m tools.pages` writes all."""
