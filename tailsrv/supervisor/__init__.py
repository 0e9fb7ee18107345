"""The supervisor process: keeps the listeners and the client tables, and replaces workers.

Only the workers send bytes of the file.
"""
