"""The operating system, as the other packages need it. Nothing in here knows of clients, the served file or workers."""
