"""What reads a run folder: summary, page, figures, advice, sizes; `b2t report` and `b2t watch`."""
