"""The worker process: one epoll loop that accepts clients, reads their headers and sends them the log."""
