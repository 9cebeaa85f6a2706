"""The settings of sampling, apart from what applies them, so that `--help` needs no torch."""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from configurator import (
    FractionAbove0,
    NonEmpty,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
)

Temperature = Annotated[
    float,
    Range("0, or at least 0.001 and finite", lambda value: value == 0 or 1e-3 <= value < math.inf),
]


@dataclass(frozen=True)
class Sampling:
    # how tokens are drawn
    max_new_tokens: PositiveInt = 200  # tokens to write, unless the text ends before
    temperature: Temperature = 0.8  # below 1 is safer, above is wilder; 0: the likeliest token
    top_k: PositiveInt | None = None  # draw from the k likeliest tokens only
    top_p: FractionAbove0 | None = 0.95  # draw from the likeliest that together reach this share
    min_p: FractionAbove0 | None = None  # drop tokens less likely than this share of the likeliest
    repetition_penalty: PositiveFloat = 1.0  # above 1 makes tokens that are in the text less likely
    stop: tuple[NonEmpty, ...] = ()  # end the text before any of these strings
    stop_tokens: tuple[NonNegativeInt, ...] = ()  # end the text at any of these ids
    seed: NonNegativeInt | None = None  # the same seed draws the same text; None: new each time

    def for_drawing(self) -> "Sampling":
        """These settings with the same value for all that do not change how an id is drawn."""
        return replace(self, max_new_tokens=1, stop=(), stop_tokens=(), seed=None)
