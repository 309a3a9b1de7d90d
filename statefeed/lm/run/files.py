"""Names of the files in a run folder."""

from statefeed.lm.recipe import CONFIG as CONFIG
from statefeed.lm.recipe import RECORD as RECORD

TOKENIZER, WEIGHTS = "tokenizer.json", "weights.safetensors"
METRICS, CURVES, CHECKPOINTS, BOARD = "metrics.jsonl", "curves.png", "checkpoints", "tensorboard"
