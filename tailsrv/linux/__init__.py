"""Wraps the Linux interfaces that the other packages use. It knows nothing of what they are for."""
