"""What an experiment asks for, and the trainings (its cells) that it takes.

    pretrain/METHOD[/SEED]          one a method and seed (or one a method), on the source;
                                    one where no seed changes it (`imagenet`)
    finetune/METHOD/RATIO/SEED      from that encoder, or from random weights, on the target

All cells of one seed share their labelled patients, and a smaller ratio's lie in a larger one's;
every cell is judged on the same test split. A key names a cell for good: an experiment that is
extended finds its finished cells again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from models.recipe import (
    AnyClassify,
    AnyForm,
    AnyPretrain,
    ClassifyRecipe,
    ClassifyRecipe2d,
    FinetuneRecipe,
    LabelledShare,
    Part,
    PretrainRecipe,
    PretrainRecipe2d,
    recipe_form,
)

MAX_CELLS = 2000
AnyFinetune = FinetuneRecipe | AnyClassify
MethodName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
Ratio = Annotated[float, Field(gt=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Pretrain = Annotated[
    Annotated[PretrainRecipe, Tag("pretrain")] | Annotated[PretrainRecipe2d, Tag("pretrain_2d")],
    Discriminator(recipe_form),
    AnyForm(),
]
Finetune = Annotated[
    Annotated[FinetuneRecipe, Tag("finetune")]
    | Annotated[ClassifyRecipe, Tag("classify")]
    | Annotated[ClassifyRecipe2d, Tag("classify_2d")],
    Discriminator(recipe_form),
    AnyForm(),
]


class Method(Part):
    """One way to start a fine-tuning."""

    name: MethodName
    pretrain: Pretrain | None = None
    """How its encoder is made; None trains from scratch."""
    learning_rate: PositiveFloat | None = None
    """Of its fine-tuning, where it was tuned apart; None is the fine-tuning's own."""

    @property
    def is_drawn(self) -> bool:
        """Whether it starts from an encoder that another seed would have made another."""
        return self.pretrain is not None and self.pretrain.method.is_random


class Budget(Part):
    """Steps that every method gets; None leaves what the recipes say."""

    pretrain_steps: PositiveInt | None = None
    finetune_steps: PositiveInt | None = None


class Plan(Part):
    """Methods times label ratios times seeds, on one target."""

    methods: Annotated[tuple[Method, ...], Field(min_length=1, max_length=32)]
    """The first is the one in question: it is compared with every other."""
    finetune: Finetune
    """The same for every cell, but for `labelled`, the seed, and what `Method` and `Budget` say."""
    ratios: Annotated[tuple[Ratio, ...], Field(min_length=1, max_length=32)] = (0.1, 0.2, 0.5, 1.0)
    """Shares of the labelled training patients."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=32)] = (0, 1, 2)
    pretrain_per: Literal["seed", "method"] = "seed"
    """Whether each seed has a pretraining of its own. `method` is cheaper, and what is found then
    holds for those encoders and not for the methods in general."""
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [method.name for method in self.methods]
        for what, given in (("methods", names), ("ratios", self.ratios), ("seeds", self.seeds)):
            if len(set(given)) < len(given):
                raise ValueError(f"{what} names one twice")
        if len({ratio_name(ratio) for ratio in self.ratios}) < len(self.ratios):
            raise ValueError("two ratios differ by less than a hundredth of a percent")
        if self.finetune.labelled != LabelledShare():
            raise ValueError("finetune.labelled is set by ratios and seeds; leave it out")
        for method in self.methods:
            if method.pretrain is not None and method.pretrain.network != self.finetune.network:
                raise ValueError(
                    f"the network of {method.name}'s pretraining is not that of the fine-tuning"
                )
        if (number := len(cells(self))) > MAX_CELLS:
            raise ValueError(f"the plan takes {number} trainings; at most {MAX_CELLS} are allowed")
        return self

    def method(self, name: str) -> Method:
        """The method of that name."""
        return next(method for method in self.methods if method.name == name)


@dataclass(frozen=True, slots=True)
class Cell:
    """One training of an experiment."""

    key: str
    kind: Literal["pretrain", "finetune"]
    method: str
    ratio: float | None
    seed: int | None
    """None: the one pretraining of a method, with its recipe's own seed."""
    parent: str | None
    """Key of the pretraining that must have succeeded before."""


def cells(plan: Plan) -> tuple[Cell, ...]:
    """Every training that the plan takes: pretrainings first, small ratios before large ones."""
    pretrainings: dict[str, Cell] = {}
    finetunings = []
    for seed in plan.seeds:
        for ratio in sorted(plan.ratios):
            for method in plan.methods:
                parent = None
                if method.pretrain is not None:
                    is_per_seed = plan.pretrain_per == "seed" and method.is_drawn
                    before = _pretraining(method.name, seed if is_per_seed else None)
                    pretrainings.setdefault(before.key, before)
                    parent = before.key
                key = f"finetune/{method.name}/{ratio_name(ratio)}/{seed}"
                finetunings.append(Cell(key, "finetune", method.name, ratio, seed, parent))
    return (*pretrainings.values(), *finetunings)


def recipe_of(plan: Plan, cell: Cell) -> AnyPretrain | AnyFinetune:
    """The recipe of a cell."""
    method = plan.method(cell.method)
    if cell.kind == "pretrain":
        assert method.pretrain is not None
        pretrain_fields = {
            "num_steps": plan.budget.pretrain_steps or method.pretrain.num_steps,
            "seed": method.pretrain.seed if cell.seed is None else cell.seed,
        }
        return method.pretrain.model_copy(update=pretrain_fields)
    recipe = plan.finetune
    fields = {
        "num_steps": plan.budget.finetune_steps or recipe.num_steps,
        "learning_rate": method.learning_rate or recipe.learning_rate,
        "labelled": LabelledShare(ratio=cell.ratio or 1.0, seed=cell.seed or 0),
        "seed": cell.seed,
    }
    return recipe.model_copy(update=fields)


def extended(
    plan: Plan,
    *,
    methods: tuple[Method, ...] = (),
    ratios: tuple[float, ...] = (),
    seeds: tuple[int, ...] = (),
) -> Plan:
    """The plan with more of everything; what it has already stays what it is.

    Raises:
        ValueError: A method of that name is there with another recipe, or the plan is too large.
    """
    known = {method.name: method for method in plan.methods}
    for method in methods:
        if known.setdefault(method.name, method) != method:
            raise ValueError(f"{method.name} is there already, with another recipe")
    fields = {
        **dict(plan),
        "methods": tuple(known.values()),
        "ratios": tuple(dict.fromkeys((*plan.ratios, *ratios))),
        "seeds": tuple(dict.fromkeys((*plan.seeds, *seeds))),
    }
    return Plan.model_validate(fields)


def ratio_name(ratio: float) -> str:
    """`10%`, `2.5%`: as keys, tables and axes have it."""
    return f"{round(100.0 * ratio, 2):g}%"


def _pretraining(method: str, seed: int | None) -> Cell:
    key = f"pretrain/{method}" if seed is None else f"pretrain/{method}/{seed}"
    return Cell(key, "pretrain", method, None, seed, None)
