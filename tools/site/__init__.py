"""The documentation site: `python -m tools.site` builds it into build/site/html, strictly."""
