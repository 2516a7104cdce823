"""Stain normalisation of slides: one file a method; fitted on a sample of a slide's tissue, never on a patch."""
