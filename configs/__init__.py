"""The Hydra tree: every value is here, one group per decision."""

if __name__ != "histoscale.configs":
    raise ImportError("import histoscale.configs, not configs")
