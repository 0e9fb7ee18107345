"""What tests of several folders share, by subject; pytest has `tests` in its path, so they say `from support.server import Server`."""
