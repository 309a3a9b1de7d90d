"""Pairs of runs that differ in the rule, or in the model: one seed, one program."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from statefeed.lm.compare.results import Result

Program: TypeAlias = tuple[Any, ...]

# What identifies the program of a run, and of every part of it after a resume under another one.
_PROGRAM = ("statefeed", "torch", "commit", "dirty")


class Pairs(NamedTuple):
    """The pairs of one rule with the baseline.

    Attributes:
        runs: a run of the rule and one of the baseline, by seed.
        omitted: why other seeds are in no pair, in words.
    """

    runs: tuple[tuple[Result, Result], ...]
    omitted: tuple[str, ...]


def program(result: Result) -> Program | None:
    """What identifies the code that made a run: version, commit, torch and forward pass; None if it is not known.

    An installed package has no commit, and its version stands for it. A record without the key `commit` does not say
    which program made the run. Machine and threads are not part of it: they change a run by rounding.
    """
    metadata = result.metadata
    if "commit" not in metadata:
        return None
    parts = [metadata]
    for changed in metadata.get("continued") or []:
        parts.append({**parts[-1], **changed})
    codes = dict.fromkeys(tuple(part.get(key) for key in _PROGRAM) for part in parts)
    return (result.get("model.forward"), *codes)


def pair(runs: Sequence[Result], baseline: Sequence[Result]) -> Pairs:
    """Pair the runs of a rule with those of the baseline, by seed and program.

    All pairs are of one program, that of most pairs: runs of two programs are not seeds of one. Unfinished runs are in
    no pair. A diverged run is in its pair, with infinite perplexity. Of two runs of one seed and program the first
    counts.

    Args:
        runs: of one rule or model, one task and one learning rate.
        baseline: of the baseline, one task and one learning rate.
    """
    rivals = _indexed(baseline)
    seeds = {result.get("train.seed") for result in baseline}
    omitted: dict[int, str] = {}
    found: dict[tuple[Program, int], tuple[Result, Result]] = {}
    for result in sorted(runs, key=lambda result: int(result.get("train.seed"))):
        seed, code = result.get("train.seed"), program(result)
        if result.outcome == "unfinished":
            omitted[seed] = "unfinished"
        elif code is None:
            omitted[seed] = "its record has no commit"
        elif (rival := rivals.get((code, seed))) is not None:
            found.setdefault((code, seed), (result, rival))
        elif seed not in seeds:
            omitted[seed] = "no run of the baseline"
        else:
            omitted[seed] = "the baseline's run is unfinished or of another commit"
    omitted |= dict.fromkeys(sorted(seeds - {result.get("train.seed") for result in runs}), "not run under the rule")
    if not found:
        return Pairs((), _reasons(omitted))
    ((most, _),) = Counter(code for code, _ in found).most_common(1)
    omitted |= {seed: "a pair of another commit than those counted" for code, seed in found if code != most}
    chosen = {seed: runs for (code, seed), runs in found.items() if code == most}
    return Pairs(tuple(chosen.values()), _reasons({seed: why for seed, why in omitted.items() if seed not in chosen}))


def _indexed(baseline: Sequence[Result]) -> dict[tuple[Program, int], Result]:
    """The runs of the baseline that have ended, by program and seed."""
    found: dict[tuple[Program, int], Result] = {}
    for result in baseline:
        code = program(result)
        if code is not None and result.outcome != "unfinished":
            found.setdefault((code, result.get("train.seed")), result)
    return found


def _reasons(omitted: dict[int, str]) -> tuple[str, ...]:
    """One entry for every reason, with its seeds.

    >>> _reasons({1: "unfinished", 3: "unfinished", 2: "no run of the baseline"})
    ('seeds 1, 3: unfinished', 'seed 2: no run of the baseline')
    """
    seeds: dict[str, list[str]] = {}
    for seed, why in omitted.items():
        seeds.setdefault(why, []).append(str(seed))
    return tuple(f"seed{'s' * (len(of) > 1)} {', '.join(of)}: {why}" for why, of in seeds.items())
