"""The language model: its network, its head with the loss, and the sequence layers it is compared with."""

from statefeed.lm.model.language_model import LanguageModel, State, detach_states

__all__ = ["LanguageModel", "State", "detach_states"]
