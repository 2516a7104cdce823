"""The synthetic cohort: tissue, scanners, and slides with truth."""
