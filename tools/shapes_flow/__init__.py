"""Makes `ShapesFlow`, the embedded flow-matching model: `python -m tools.shapes_flow --help`."""
