"""Every number once, with its interval."""
