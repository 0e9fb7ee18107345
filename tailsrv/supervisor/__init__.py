"""The supervisor process: keeps the listeners and the table of clients, and replaces workers; it serves no bytes itself."""
