"""Bytes of a slide become pixels: headers, codecs, regions, and OpenSlide for the rest."""
