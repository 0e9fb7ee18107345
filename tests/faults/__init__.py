"""The effect of each system call that fails."""
