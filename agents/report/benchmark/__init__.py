"""The page of a benchmark: `page` puts together what the other files collect, each chart also as a file beside it."""
