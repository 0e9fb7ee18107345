"""What becomes of each system call that fails."""
