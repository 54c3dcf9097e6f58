from services.contracts import ContextSpec, topology


def test_each_context_has_a_queue_of_its_own() -> None:
    one, other = ContextSpec(model="a").context_id, ContextSpec(model="b").context_id
    assert topology.claims_queue(one) == f"claims.{one}"
    assert topology.claims_queue(one) != topology.claims_queue(other)


def test_no_two_things_on_the_broker_share_a_name() -> None:
    names = [value for name, value in vars(topology).items() if name.isupper()]
    assert len(set(names)) == len(names)
