"""Methods of other authors, and controls of ours, that Avalanche does not have."""
