"""Numbers that other people published, with their sources (README.md)."""
