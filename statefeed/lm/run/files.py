"""The names of the files in a run folder."""

CONFIG, RECORD, TOKENIZER, WEIGHTS = "config.yaml", "record.json", "tokenizer.json", "weights.safetensors"
METRICS, CURVES, CHECKPOINTS, BOARD = "metrics.jsonl", "curves.png", "checkpoints", "tensorboard"
