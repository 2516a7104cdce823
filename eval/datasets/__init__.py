"""One file a labelled data set: layout, classes, splits, checks."""
