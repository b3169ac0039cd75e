"""The small bundled model and how it was made."""
