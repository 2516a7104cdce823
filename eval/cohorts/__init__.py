"""Public cohorts of slides: what their label files say, as rows of a manifest."""
