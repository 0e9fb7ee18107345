"""What the tests of several folders share, one module per subject.

pytest has `tests` in its path, so tests write `from support.server import Server`.
"""
