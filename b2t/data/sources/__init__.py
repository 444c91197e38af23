"""One module per file format that `b2t prepare` reads."""
