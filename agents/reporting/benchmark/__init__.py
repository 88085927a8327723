"""The page of a benchmark: `page` puts together what the other files draw, each also as a file beside it."""
