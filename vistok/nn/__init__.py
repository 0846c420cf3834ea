"""Building blocks that every model shares; each exists once."""
