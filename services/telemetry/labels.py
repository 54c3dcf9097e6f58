"""Labels whose values come from outside: every value is a series of its own, so they are few."""

OTHER = "other"
MAX_VALUES = 64


class BoundedLabels:
    """The first `MAX_VALUES` values that come are themselves, all others are `other`."""

    def __init__(self, most: int = MAX_VALUES) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._known:
            return value
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(value)
        return value
