import pytest

from services.broker import Delivery


def delivery(headers: dict[str, object]) -> Delivery:
    return Delivery("claims.x", b"", headers, "m-1", redelivered=bool(headers), tag=1, epoch=1)


@pytest.mark.parametrize(
    ("headers", "attempt"),
    [({}, 1), ({"x-delivery-count": 0}, 1), ({"x-delivery-count": 3}, 4), ({"other": 9}, 1)],
)
def test_the_attempt_is_one_more_than_the_earlier_deliveries(
    headers: dict[str, object], attempt: int
) -> None:
    assert delivery(headers).attempt == attempt
