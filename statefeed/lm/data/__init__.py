"""Text as the model reads it: corpora, tokens, their cache, and batches."""
