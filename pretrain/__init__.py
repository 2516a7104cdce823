"""Patches become a self-supervised student and teacher, checkpoints, and a release."""

if __name__ != "histoscale.pretrain":
    raise ImportError("import histoscale.pretrain, not pretrain")
