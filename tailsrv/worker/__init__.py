"""The worker process: an epoll loop that accepts clients, reads headers and sends the file."""
