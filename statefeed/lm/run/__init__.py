"""One run: training, evaluation and generation, and everything a run folder holds."""
