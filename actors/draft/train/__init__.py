"""`joinwise train-draft`: distils a draft head from what its target answers. See docs/speculation.md."""
