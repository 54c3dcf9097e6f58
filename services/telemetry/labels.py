"""Metric labels whose values come from outside. Each value is a series, so they are bounded."""

OTHER = "other"
MAX_VALUES = 64


class BoundedLabels:
    """Keeps the first `MAX_VALUES` values and replaces all later ones with `other`."""

    def __init__(self, max_values: int = MAX_VALUES) -> None:
        self._max_values = max_values
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._known:
            return value
        if len(self._known) >= self._max_values:
            return OTHER
        self._known.add(value)
        return value
