import re

import pytest

from services.broker.roles import ROLES, Permissions
from services.contracts import topology

BY_NAME = {role.name: role for role in ROLES}
EXPRESSIONS = [
    (role.name, right, getattr(role.permissions, right))
    for role in ROLES
    for right in ("configure", "write", "read")
]
EVERY_NAME = {
    *(value for name, value in vars(topology).items() if name.endswith(("_EXCHANGE", "_QUEUE"))),
    topology.claims_queue("ctx-0011223344556677"),
    topology.listener_queue(topology.CONTROL_EXCHANGE, "node-1-2-3"),
    topology.listener_queue(topology.HEARTBEATS_EXCHANGE, "node-1-2-3"),
}


def granted(role: str, right: str) -> set[str]:
    """RabbitMQ looks for a match anywhere, so `search`."""
    expression = getattr(BY_NAME[role].permissions, right)
    return {name for name in EVERY_NAME if re.search(expression, name)}


@pytest.mark.parametrize(("role", "right", "expression"), EXPRESSIONS)
def test_nobody_gets_a_right_beyond_keepwarms_names(role: str, right: str, expression: str) -> None:
    strange = (
        "",
        "amq.default",
        "amq.direct",
        "amq.gen-1",
        "orders",
        "claims",
        "claims.",
        "notices.",
        "presence.",
    )
    near = (f"{a}{name}{b}" for name in EVERY_NAME for a, b in (("x", ""), ("", "x"), ("x.", "")))
    ours = ("claims.", "notices.", "presence.")
    for name in (*strange, *(n for n in near if not n.startswith(ours)), "keepwarmxclaims"):
        assert not re.search(expression, name), name


def test_a_worker_can_neither_make_others_work_nor_read_what_others_say() -> None:
    assert granted("worker", "write") == {
        "keepwarm.verdicts",
        "keepwarm.dead",
        "keepwarm.returns",
        "keepwarm.presence",
        "notices.node-1-2-3",
    }
    assert granted("worker", "read") == {
        "claims.ctx-0011223344556677",
        "keepwarm.notices",
        "notices.node-1-2-3",
    }
    assert granted("worker", "configure") == {"notices.node-1-2-3"}


def test_a_producer_makes_claims_queues_and_reads_no_results() -> None:
    assert granted("producer", "configure") == {"claims.ctx-0011223344556677"}
    assert granted("producer", "write") == {
        "keepwarm.claims",
        "keepwarm.runs",
        "keepwarm.dead",
        "claims.ctx-0011223344556677",
    }
    assert granted("producer", "read") == {"keepwarm.claims", "claims.ctx-0011223344556677"}


def test_a_collector_makes_everything_but_workers_queues_and_forges_no_verdicts() -> None:
    assert granted("collector", "configure") == EVERY_NAME - {"notices.node-1-2-3"}
    assert not granted("collector", "write") & {
        "keepwarm.verdicts",
        "keepwarm.runs",
        "keepwarm.returns",
    }
    assert "dead-messages" not in granted("collector", "read")


def test_an_operator_has_every_right_to_every_name() -> None:
    for right in ("configure", "write", "read"):
        assert granted("operator", right) == EVERY_NAME


def test_who_sees_policies_has_the_smallest_tag_for_it_and_nobody_is_administrator() -> None:
    assert {role.name: role.tags for role in ROLES if role.tags} == {
        "producer": ("management",),
        "collector": ("management",),
        "operator": ("monitoring",),
    }


def test_who_is_granted_nothing_matches_nothing() -> None:
    assert not any(re.search(Permissions().write, name) for name in (*EVERY_NAME, "amq.default"))


def test_two_keepwarms_on_one_broker_have_users_of_their_own() -> None:
    assert BY_NAME["worker"].user("keepwarm") == "keepwarm-worker"
    assert BY_NAME["worker"].user("trial") == "trial-worker"
