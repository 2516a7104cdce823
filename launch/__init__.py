"""Commands: one module each, thin; they hold no science."""

if __name__ != "histoscale.launch":
    raise ImportError("import histoscale.launch, not launch")
