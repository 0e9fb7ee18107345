"""A model of the whole server: what clients may receive, whatever happens."""
