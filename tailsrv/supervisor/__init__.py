"""The supervisor process: it keeps the listeners and the client tables, and replaces workers.

It sends no bytes of the file itself; workers do that.
"""
