"""Makes `Shapes`, the embedded model: `python -m tools.shapes --help`."""
