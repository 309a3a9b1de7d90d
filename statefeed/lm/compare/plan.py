"""The runs of a comparison: every rule with every seed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from statefeed.lm import identity
from statefeed.lm.config import RECURRENT, Config
from statefeed.lm.errors import UsageError, require

_SEEDS = 1000  # of one rule, more than anybody can train


def plan(config: Config, feedback: str, seeds: int, rates: str, folder: Path) -> list[Config]:
    """The recipe of every run of a comparison, all rules of one seed before those of the next.

    Args:
        config: what they have in common.
        feedback: rules, separated by commas.
        seeds: runs of every rule.
        rates: rule=rate, separated by commas, or nothing.
        folder: of the comparison.

    Raises:
        UsageError: for a rule that does not exist or does not fit the cell, a rate for a rule that is not compared, or
            fewer seeds than one.
    """
    require(1 <= seeds <= _SEEDS, f"--seeds must be between 1 and {_SEEDS:,}", seeds)
    require(
        config.model.cell in RECURRENT,
        f"a comparison of rules needs a cell out of {', '.join(RECURRENT)}",
        config.model.cell,
    )
    rules = list(dict.fromkeys(rule.strip() for rule in feedback.split(",")))
    require(all(rules), "--feedback must have a rule between its commas", repr(feedback))
    spelled: dict[str, str] = {}
    for rule in rules:
        try:
            identity.check_rules(config.model.cell, rule)
        except ValueError as error:
            raise UsageError(f"--feedback {rule}: {error}") from error
        other = spelled.setdefault(identity.rule(config.model.cell, rule), rule)
        require(other == rule, "--feedback must name a rule once", f"{other} and {rule}, which are the same")
    own = _rates(rates, rules)
    return [
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, feedback=_as_read(rule)),
            train=dataclasses.replace(
                config.train, seed=config.train.seed + k, lr=own.get(rule, config.train.lr), alignment=True
            ),
            run=dataclasses.replace(
                config.run, dir=str(folder / f"{rule.replace('/', '_')}-seed{config.train.seed + k}")
            ),
        )
        for k in range(seeds)
        for rule in rules
    ]


def _as_read(rule: str) -> float | str:
    """A rule as a recipe has it once it was read from YAML, where a number is a number."""
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
