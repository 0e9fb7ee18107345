"""Code that an interpreter runs at its start, as sitecustomize."""
