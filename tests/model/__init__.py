"""A model of the whole: what clients may receive, whatever happens."""
