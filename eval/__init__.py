"""An encoder and labelled data become embeddings, probes, slide models, and numbers with intervals."""

if __name__ != "histoscale.eval":
    raise ImportError("import histoscale.eval, not eval")
