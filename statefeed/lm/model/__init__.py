"""The language model: network, loss of the head, and baseline sequence layers."""

from statefeed.lm.model.blocks import State
from statefeed.lm.model.language_model import LanguageModel, detach_states

__all__ = ["LanguageModel", "State", "detach_states"]
