"""Tensor parallelism: parameters that are stored in parts, each device computing with its own."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from txcore.kernels.common.checks import whole_number


@dataclass(frozen=True)
class TP:
    """Tensor parallelism: parameters are split over `axis`, and layers compute with the parts.

    The layers of `tx.tensor` make one result of the parts; the plan says which parameters are
    split, and stores, checks, measures and saves them so.

    Args:
      axis: mesh axis name.
      rules: which dim of a parameter is split, by its path with slashes between the keys and * for
        any characters: `{"*/up": -1, "*/down": -2}`. Dims count from the end, so that layers which
        are stacked (of a pipeline, of a scan) need no other rules. The first rule that matches
        counts; what none matches is stored whole.

    Example:
      >>> tx.TP("model", rules={"mlp/up": -1, "mlp/down": -2})
      TP('model', rules={'mlp/up': -1, 'mlp/down': -2})
    """

    axis: str
    _: KW_ONLY
    rules: Mapping[str, int]

    def __repr__(self) -> str:
        return f"TP({self.axis!r}, rules={dict(self.rules)!r})"

    def __post_init__(self) -> None:
        if not isinstance(self.axis, str):
            raise TypeError(f"TP needs axis= one mesh axis name, got {self.axis!r}")
        if not isinstance(self.rules, Mapping) or not self.rules:
            raise TypeError(
                f"TP needs rules= a dict of dims by path, got {self.rules!r}: write "
                "rules={'*/up': -1, '*/down': -2}"
            )
        for pattern, dim in self.rules.items():
            if not isinstance(pattern, str) or not pattern:
                raise TypeError(
                    f"TP needs rules= dims by path, got {pattern!r} as a path: write the keys with "
                    "slashes between them, as 'mlp/up', with * for any characters"
                )
            number = whole_number(dim)
            if number is None or number >= 0:
                raise ValueError(
                    f"TP needs rules= dims counted from the end, -1 for the last, got {dim!r} for "
                    f"{pattern!r}"
                )
