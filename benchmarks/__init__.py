"""One script per figure of the README; each measures both sides in one run."""
