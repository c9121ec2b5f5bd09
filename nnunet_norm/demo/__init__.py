"""The demo: a brain template, two norms, one picture of a seam gone."""
