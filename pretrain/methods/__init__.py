"""Self-supervised objectives: student and teacher outputs become named loss terms."""
