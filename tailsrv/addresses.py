"""Writes and reads `HOST:PORT`. Pure: no name is looked up."""


class EndpointError(ValueError):
    """What was given is no HOST:PORT; the message says why, in one line."""


def endpoint(host: str, port: int) -> str:
    """Return host and port as people write them, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_endpoint(text: str) -> tuple[str, int]:
    """Return the host and the port that `text` names. Raises EndpointError."""
    host, colon, digits = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    if not colon or not bare:
        raise EndpointError(f"not HOST:PORT: {text!r}")
    if ":" in bare and not bracketed:
        raise EndpointError(f"not HOST:PORT: {text!r}; an IPv6 address takes brackets, [::1]:4321")
    if not (digits.isascii() and digits.isdigit()):
        raise EndpointError(f"not a port: {digits!r} in {text!r}")
    return check_port(bare, int(digits[:9]))


def check_port(host: str, port: int) -> tuple[str, int]:
    """Return both if one can connect to `port`. Raises EndpointError."""
    if not 1 <= port <= 65535:
        raise EndpointError(f"port must be from 1 to 65535, not {port}")
    return host, port
