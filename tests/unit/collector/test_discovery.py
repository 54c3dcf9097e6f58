"""Where Prometheus finds workers: what they say is not believed without a look at it."""

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from services.collector.discovery import targets
from services.contracts import WorkerHeartbeat, decode, encode
from services.contracts.errors import MessageInvalid


def addresses(*reports: WorkerHeartbeat, own_host: str = "here") -> list[str]:
    return [target for each in targets(reports, own_host) for target in each["targets"]]


def test_a_worker_is_a_target_with_labels_from_its_heartbeat(make: SimpleNamespace) -> None:
    report = make.report("node-7-1", host="node-7", job_id="71_3", metrics_address="node-7:9464")
    assert targets([report], "here") == [
        {
            "targets": ["node-7:9464"],
            "labels": {
                "service": "worker",
                "__meta_keepwarm_worker": "node-7-1",
                "__meta_keepwarm_host": "node-7",
                "__meta_keepwarm_device": "Tesla T4",
                "__meta_keepwarm_job_id": "71_3",
                "__meta_keepwarm_state": "serving",
                "__meta_keepwarm_context": report.context_id,
            },
        }
    ]


def test_who_serves_no_metrics_is_no_target(make: SimpleNamespace) -> None:
    assert addresses(make.report("older"), make.report("a", metrics_address="a:1")) == ["a:1"]


@pytest.mark.parametrize("address", ["127.0.0.1:7", "127.9.9.9:7", "[::1]:7", "localhost:7"])
def test_who_is_reached_on_its_own_host_alone_is_a_target_there_alone(
    address: str, make: SimpleNamespace
) -> None:
    report = make.report("a", host="node-7", metrics_address=address)
    assert addresses(report, own_host="node-7") == [address]
    assert addresses(report, own_host="here") == []


def test_of_a_fleet_that_is_too_large_always_the_same_workers_are_listed_and_the_others_counted(
    make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.collector.discovery.MAX_TARGETS", 3)
    fleet = [make.report(name, metrics_address=f"{name}:1") for name in "debca"]
    assert addresses(*fleet) == addresses(*reversed(fleet)) == ["a:1", "b:1", "c:1"]
    assert REGISTRY.get_sample_value("keepwarm_unlisted_workers") == 2
    assert addresses(*fleet[:3]) == ["b:1", "d:1", "e:1"]
    assert REGISTRY.get_sample_value("keepwarm_unlisted_workers") == 0


def test_an_address_belongs_to_who_claimed_it_last(make: SimpleNamespace) -> None:
    (target,) = targets([make.report(name, metrics_address="n:1") for name in "ab"], "here")
    assert target["labels"]["__meta_keepwarm_worker"] == "b"


@pytest.mark.parametrize(
    "address",
    [
        *("node", "node:0", "node:65536", "http://node:80", "node:80/path", "a b:80", "node:80\n"),
        *("user@node:80", 'node":80', "{{x}}:80", "x" * 300 + ":80", ""),
    ],
)
def test_a_report_with_what_is_no_address_is_refused_whole(
    address: str, make: SimpleNamespace
) -> None:
    body = encode(make.report("a", metrics_address="node:80"))
    said = WorkerHeartbeat.model_construct(metrics_address=address).model_dump_json(
        include={"metrics_address"}
    )
    bad = body.replace(b'"metrics_address":"node:80"', said[1:-1].encode())
    with pytest.raises(MessageInvalid, match="not a WorkerReport: metrics_address: "):
        decode(WorkerHeartbeat, bad)
