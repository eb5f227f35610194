"""Which weight gets how many bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tfgptopt.quantization.specs import Spec, check_spec
from tfgptopt.targets import Target


@dataclass(frozen=True)
class BitAllocation:
    """A spec for each weight, by its path; `None` leaves it as floats.

    It can be given wherever a spec can. `tfgptopt.quantization.allocate` finds one for a budget.

    Args:
        specs: Mapping from the path of a weight to `Int8()`, `Int4()` or `None`. Weights that are
            not in it stay floats.

    Raises:
        ValueError: If it is empty or a value is no spec.
    """

    specs: Mapping[str, Spec | None]

    def __post_init__(self) -> None:
        if not self.specs:
            raise ValueError("`specs` must name at least one weight. Received: {}")
        for spec in self.specs.values():
            if spec is not None:
                check_spec(spec)

    def match(self, targets: list[Target]) -> list[tuple[Target, Spec | None]]:
        """Returns weights with their specs.

        Raises:
            ValueError: If none of the weights is named.
        """
        unknown = set(self.specs) - {target.path for target in targets}
        if unknown:
            raise ValueError(
                f"The allocation names {sorted(unknown)[0]}, which is none of the model's weights, "
                f"such as {targets[0].path}. It was made for another model."
            )
        return [(target, self.specs.get(target.path)) for target in targets]
