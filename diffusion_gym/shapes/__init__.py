"""The world of `Shapes`: what its captions can say, and how its scenes are drawn."""
