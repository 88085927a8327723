"""The page of a run: `page` puts together what the other files draw."""
