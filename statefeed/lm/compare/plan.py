"""The recipes of the runs of a comparison: every rule with every seed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from statefeed.lm import identity
from statefeed.lm.config import RECURRENT, Config
from statefeed.lm.errors import UsageError, require

_SEEDS = 1000  # of one rule, more than anybody can train


def plan(config: Config, feedback: str, seeds: int, rates: str, folder: Path) -> list[Config]:
    """The recipe of every run of a comparison, ordered by seed, then by rule.

    Args:
        config: the common recipe.
        feedback: rules, separated by commas.
        seeds: number of runs of every rule.
        rates: learning rates as rule=rate, separated by commas; may be empty.
        folder: folder of the comparison.

    Raises:
        UsageError: a rule does not exist or is not supported by the cell, a rate is for a rule that is not compared, or
            there are no seeds.
    """
    require(1 <= seeds <= _SEEDS, f"--seeds must be between 1 and {_SEEDS:,}", seeds)
    require(
        config.model.cell in RECURRENT,
        f"a comparison of rules needs a cell out of {', '.join(RECURRENT)}",
        config.model.cell,
    )
    rules = list(dict.fromkeys(rule.strip() for rule in feedback.split(",")))
    require(all(rules), "--feedback must have a rule between its commas", repr(feedback))
    spellings: dict[str, str] = {}
    for rule in rules:
        try:
            identity.check_rules(config.model.cell, rule, config.model.forward)
        except ValueError as error:
            raise UsageError(f"--feedback {rule}: {error}") from error
        other = spellings.setdefault(identity.rule(config.model.cell, rule), rule)
        require(other == rule, "--feedback must name a rule once", f"{other} and {rule}, which are the same")
    rate_of = _rates(rates, rules)
    return [
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, feedback=_as_yaml(rule)),
            train=dataclasses.replace(
                config.train, seed=config.train.seed + k, lr=rate_of.get(rule, config.train.lr), alignment=True
            ),
            run=dataclasses.replace(
                config.run, dir=str(folder / f"{rule.replace('/', '_')}-seed{config.train.seed + k}")
            ),
        )
        for k in range(seeds)
        for rule in rules
    ]


def _as_yaml(rule: str) -> float | str:
    """A rule as YAML reads it: a number if it is one, otherwise text."""
    try:
        return float(rule)
    except ValueError:
        return rule


def _rates(text: str, rules: Sequence[str]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for word in filter(None, text.split(",")):
        rule, _, rate = word.strip().rpartition("=")
        require(rule in rules, f"--lr must name rules of --feedback ({', '.join(rules)})", word)
        require(rule not in rates, "--lr must name a rule once", text)
        try:
            rates[rule] = float(rate)
        except ValueError:
            raise UsageError(f"--lr must be rule=rate, such as dsf=2e-3, got {word}") from None
    return rates
