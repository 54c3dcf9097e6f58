"""The alert rules as they stand: valid, tested both ways, and each with a section on what to do."""

import re
import subprocess
from collections import defaultdict
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.monitoring.prometheus import CONFIGURATION, FILES, RULES
from tests.monitoring.queries import rules

RUNBOOK = REPOSITORY / "docs" / "operations.md"


def promtool(*arguments: object) -> None:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_files() -> None:
    promtool("check", "config", CONFIGURATION)
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_every_rule_fires_and_is_silent_as_its_tests_say() -> None:
    promtool("test", "rules", FILES / "alerts_test.yml")


def test_every_rule_has_a_test_in_which_it_fires_and_one_in_which_it_is_silent() -> None:
    stories = yaml.safe_load((FILES / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    expected: dict[str, set[bool]] = defaultdict(set)
    for story in stories:
        for case in story["alert_rule_test"]:
            expected[case["alertname"]].add(bool(case.get("exp_alerts")))
    assert expected == {rule["alert"]: {True, False} for rule in rules()}


def names(rule: dict[str, Any]) -> str:
    return str(rule["alert"])


@pytest.mark.parametrize("rule", rules(), ids=names)
def test_a_rule_says_how_bad_it_is_what_happened_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert (REPOSITORY / page, anchor) == (RUNBOOK, rule["alert"].lower())
    section = re.search(
        rf"^### {rule['alert']}\n(.*?)(?=^##)",
        RUNBOOK.read_text(encoding="utf-8") + "##",
        re.MULTILINE | re.DOTALL,
    )
    assert section, f"{RUNBOOK} has no section {rule['alert']}"
    for what in ("**Meaning:**", "**Check:**", "**Act:**"):
        assert what in section[1]


def test_no_section_is_left_of_a_rule_that_went() -> None:
    sections = re.findall(r"^### (Keepwarm\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sections == [rule["alert"] for rule in rules()]
