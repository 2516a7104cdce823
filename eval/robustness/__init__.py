"""Does an encoder see biology, or the hospital, the stain and the scanner? One measure a file: features in, numbers out."""
