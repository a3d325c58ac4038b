"""What params/<study>/claims.yaml may hold, as typed objects: the claims, their cells, and the noise for the power
table.

A cell is named by equalities on the columns of the scores: {method: td_dpo, beta: 0.01, tau: 0.5}. A key that is fixed
in advance by another (tau by beta) may be left out and is filled in; a cell that contradicts it is refused, so that
nobody chooses it on the judged score. The value `best` means: chosen on the study's validation metric.
"""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from lib.errors import StudyError
from lib.settings.schema import Frozen, plain
from lib.settings.yaml_file import load_yaml

Cell = dict[str, Annotated[float | int | str, BeforeValidator(plain)]]
Test = Literal["non_inferiority", "superiority", "equivalence", "variance_ratio", "cost_ratio", "absolute"]
BEST = "best"


class Fixed(Frozen):
    """Of `method`, the key `key` follows from the value of `by`: fixed before any score was seen."""

    method: str
    key: str
    by: str
    values: dict[float, float]


class Beside(Frozen):
    """A comparison reported beside the claim and deciding nothing; what is left out is as in the claim."""

    name: str
    treatment: Cell | None = None
    baseline: Cell | None = None


class Chance(Frozen):
    """What runs show that have learnt nothing: `metric` is no better than the highest of `no_better_than` and no worse
    than
    `no_worse_than`, what training began with (null: worse is chance too). A number, or a column of the members.

    `what`: its name in sentences. Where all runs of a claim about scores are at chance, its verdict is `vacuous`.
    """

    metric: str
    what: str
    no_better_than: tuple[float | str, ...] = Field(min_length=1)
    no_worse_than: float | str | None = None


class Noise(Frozen):
    """The experiment that the power table simulates. All standard deviations are on the score's scale.

    seed: between seeds of one cell; question: of a question for all methods (it cancels in pairs); interaction: of a
    question for one method, the same in every seed; answer: what is left, one answer in one seed; time: of one pair's
    log ratio of step times. spread: standard deviation across levels of the baseline, for claims about variance.
    """

    seed_sds: tuple[float, ...] = (0.05, 0.15)
    question_sd: float = 1.5
    interaction_sd: float = 0.3
    answer_sd: float = 1.2
    time_sd: float = 0.05
    time_pairs: int = 120
    spread: float = 2.0
    seeds: int = 3
    questions: int = 80
    simulations: int = 2000


class Claim(Frozen):
    """One published claim.

    margin: of the difference (non_inferiority, superiority, equivalence, absolute), the largest ratio of times
    (cost_ratio) or the largest point estimate of the ratio of variances (variance_ratio). claimed: the size that was
    claimed, on the same scale, planted in the power table. not_evaluated: why no record can decide it.
    """

    id: str
    sentence: str
    estimand: str
    test: Test
    treatment: Cell
    baseline: Cell | None = None
    baseline_name: str = (
        ""  # what the baseline is in sentences, where `metric` is not its own score (1.22 times REACTOR's)
    )
    across: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    metric: str = "score"
    margin: float
    claimed: float = 0.0
    reported: float | None = None
    no_divergence: bool = False
    premise: bool = False
    guard: float | None = None
    not_evaluated: str = ""
    note: str = ""
    scales: tuple[str, ...] = ("laptop", "paper")
    beside: tuple[Beside, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Claim:
        if self.test == "absolute":
            if self.reported is None:
                raise ValueError("test absolute needs `reported`, the figure that was reported")
        elif self.baseline is None:
            raise ValueError(f"test {self.test} needs a `baseline`")
        if (self.test == "variance_ratio") != bool(self.across):
            raise ValueError("`across` (a key and its levels) belongs to test variance_ratio and to no other")
        if len(self.across) > 1:
            raise ValueError("`across` takes one key")
        if self.margin < 0:
            raise ValueError("`margin` is not negative; what it bounds is said by `test`")
        return self


class Claims(Frozen):
    study: str
    names: dict[str, str] = Field(default_factory=dict)
    keys: tuple[str, ...] = ()
    diverged: dict[str, float] = Field(default_factory=lambda: {"score": 1.0, "accuracy": 0.5})
    choose_on: str | None = None
    chance: Chance | None = None
    fixed: tuple[Fixed, ...] = ()
    noise: Noise = Noise()
    claims: tuple[Claim, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Claims:
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) < len(ids):
            raise ValueError(f"claim ids are not unique: {', '.join(ids)}")
        for claim in self.claims:
            self.levels(claim, "treatment")
            if claim.baseline is not None:
                self.levels(claim, "baseline")
            for cell in [
                claim.treatment,
                claim.baseline,
                *(c for b in claim.beside for c in (b.treatment, b.baseline)),
            ]:
                if cell and BEST in cell.values() and self.choose_on is None:
                    raise ValueError(
                        f"claim {claim.id}: `best` needs `choose_on`, the validation metric it is chosen on"
                    )
        return self

    def filled(self, cell: Cell) -> Cell:
        """`cell` with the keys that are fixed in advance; raises ValueError where it contradicts them."""
        for fixed in self.fixed:
            if cell.get("method") != fixed.method or not isinstance(by := cell.get(fixed.by), float | int):
                continue
            if by not in fixed.values:
                raise ValueError(f"{fixed.key} of {fixed.method} is not fixed for {fixed.by} = {by:g}")
            value = fixed.values[by]
            if cell.get(fixed.key, value) != value:
                raise ValueError(
                    f"{fixed.method} at {fixed.by} = {by:g} has {fixed.key} = {cell[fixed.key]:g}, but "
                    f"{value:g} was fixed in advance"
                )
            cell = {**cell, fixed.key: value}
        return cell

    def levels(self, claim: Claim, side: Literal["treatment", "baseline"]) -> list[Cell]:
        """The cells of one side: one, or one for each level of `across`."""
        cell = getattr(claim, side)
        if not claim.across:
            # a cost is measured over all cells that match
            return [cell if claim.test == "cost_ratio" else self.filled(cell)]
        ((key, values),) = claim.across.items()
        return [self.filled({**cell, key: value}) for value in values]

    def label(self, cell: Cell) -> str:
        """`TD-DPO (beta 0.01, tau 0.5)`."""
        method = str(cell.get("method", ""))
        rest = ", ".join(
            f"{k} {v:g}" if isinstance(v, float | int) else f"{k} {v}" for k, v in cell.items() if k != "method"
        )
        name = self.names.get(method, method)
        return f"{name} ({rest})" if rest else name


def _known_keys(location: tuple) -> list[str]:
    """The keys of the section that an unknown key stands in: walks the types along the error's location."""
    model = Claims
    for part in location[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        found = [field.annotation] if field else []
        while found:
            kind = found.pop()
            if isinstance(kind, type) and not typing.get_args(kind) and issubclass(kind, BaseModel):
                model = kind
            found += typing.get_args(kind)
    return list(model.model_fields)


def load(path: str | Path) -> Claims:
    """Read a claims file. Raises StudyError naming file and key of every fault, with "did you mean" for unknown
    keys."""
    raw = load_yaml(path)
    try:
        return Claims.model_validate(raw)
    except ValidationError as error:
        # unknown keys first: a slip of the pen is why another key is missing
        errors = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
        faults = [_fault(item) for item in errors]
    key, found, expected, mend = faults[0]
    others = "".join(f"\n  {k}: {f}; expected {e}" for k, f, e, _ in faults[1:])
    raise StudyError(f"{path}: {key}", found + others, expected, mend)


def _fault(item: dict) -> tuple[str, str, str, str]:
    """(key, found, expected, mend) of one of pydantic's errors."""
    key = ".".join(map(str, item["loc"])) or "(top level)"
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        return key, "unknown key", f"one of {', '.join(known)}", f"did you mean {close[0]}?" if close else "remove it"
    if item["type"] == "missing":
        return key, "missing", "this key", f"write {key}: ..."
    if item["type"] == "value_error":
        return key, str(item["ctx"]["error"]), "a claim that can be decided", ""
    return key, repr(item["input"])[:80], item["msg"].removeprefix("Input should be "), ""
