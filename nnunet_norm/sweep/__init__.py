"""A grid of models: trained on this machine or a cluster, watched, and reported on."""
