"""tailsrv: like `tail -f`, as a server."""

__version__ = "0.1.0"
