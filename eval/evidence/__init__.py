"""What a second reader is shown of one slide: maps, files for viewers, measures of trust, and a page with a verdict form."""
