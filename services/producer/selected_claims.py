"""Splits claims into a part to choose by and a part to report on."""

import random
from collections import defaultdict
from collections.abc import Iterable

from services.contracts import Claim
from services.contracts.claims import id_in_file
from services.contracts.errors import InputError
from services.contracts.values import content_id


def selected_claims(claims: Iterable[Claim], fraction: float, seed: int) -> frozenset[str]:
    """The ids of about `fraction` of the claims, chosen at random by the seed.

    Claims that share evidence, a record or its id, directly or through other claims, are chosen
    together or not at all: the parts would not be independent. The same claims in the same order
    give the same ids. Raises InputError when one part would be empty.
    """
    groups = _groups(claims)
    total = sum(map(len, groups))
    random.Random(seed).shuffle(groups)
    selected: set[str] = set()
    for group in groups:
        # The first group that is too large does not end it: the next one may fit.
        if len(selected) + len(group) <= fraction * total:
            selected.update(group)
    if not selected:
        largest = max(map(len, groups), default=0)
        raise InputError(
            f"{fraction:g} of {total:,} claims cannot be selected: claims that share evidence stay "
            f"together, and the largest of {len(groups):,} groups has {largest:,} claims; use more "
            "claims, or another fraction"
        )
    return frozenset(selected)


def _groups(claims: Iterable[Claim]) -> list[list[str]]:
    """The ids of claims that share something, in the order of the claims: the connected components
    of the graph in which each claim is joined to its record, its id in the file and its evidence.
    """
    parents: dict[str, str] = {}

    def root(node: str) -> str:
        while parents.setdefault(node, node) != node:
            parents[node] = parents[parents[node]]  # halves the path for the next time
            node = parents[node]
        return node

    nodes: dict[str, str] = {}
    for claim in claims:
        node = nodes[claim.claim_id] = f"record {claim.position}"
        shared = [f"id {id_in_file(claim.claim_id)}"]
        if claim.evidence:
            shared.append(content_id("evidence", claim.evidence))
        for other in shared:
            parents[root(other)] = root(node)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for claim_id, node in nodes.items():
        groups[root(node)].append(claim_id)
    return list(groups.values())
