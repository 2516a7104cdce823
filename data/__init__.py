"""Slides anywhere, or ready tiles, become a catalog, then batches of uint8 patches, then views on the device."""

if __name__ != "histoscale.data":
    raise ImportError("import histoscale.data, not data")
