"""One full message of every kind."""

import pytest

from services.contracts import (
    Claim,
    ClaimBatch,
    ContextDemand,
    ContextReady,
    ContextSpec,
    ControlUpdate,
    DeadClaim,
    DeadReason,
    PromptSpec,
    Run,
    RunAnnouncement,
    StartupPhases,
    Totals,
    Verdict,
    VerdictBatch,
    WorkerHeartbeat,
)
from services.contracts.prompts import Example
from services.contracts.runs import InputSummary
from services.contracts.wire import Message

CLAIM_TEXT = "The zebra-crossing of Łódź is striped."
EVIDENCE_TEXT = "A zebra-crossing has stripes, in Łódź too."


@pytest.fixture(scope="session")
def secret_texts() -> tuple[str, ...]:
    """What no log line may ever hold."""
    return CLAIM_TEXT, EVIDENCE_TEXT


@pytest.fixture(scope="session")
def messages() -> dict[str, Message]:
    context = ContextSpec(model="org/model", revision="abc", engine_arguments=("--seed=1",))
    prompt = PromptSpec(examples=(Example(claim="Example.", evidence="Shown.", label="SUPPORTS"),))
    run = Run(
        source="claims.jsonl",
        source_digest="src-1",
        context=context,
        prompt=prompt,
        limit=10,
        seed=3,
    )
    claim = Claim(
        claim_id="c-1", position=0, text=CLAIM_TEXT, evidence=EVIDENCE_TEXT, gold="SUPPORTS"
    )
    verdict = Verdict(
        claim_id="c-1",
        position=0,
        text=CLAIM_TEXT,
        gold="SUPPORTS",
        label="REFUTES",
        probabilities=(0.25, 0.5, 0.25),
        mass=0.75,
        raw_text="False",
        prompt_tokens=99,
    )
    return {
        "ClaimBatch": ClaimBatch(
            run=run, submission_id="sub-1", batch_id="00000000-0", claims=(claim,)
        ),
        "VerdictBatch": VerdictBatch(
            run_id=run.run_id,
            batch_id="00000000-0",
            labels=prompt.label_names,
            verdicts=(verdict,),
            worker_id="node-1",
            device="Tesla T4",
            attempt=1,
            engine_seconds=1.5,
        ),
        "DeadClaim": DeadClaim(
            run_id=run.run_id,
            claim=claim,
            reason=DeadReason.TOO_LONG,
            detail="the prompt has 2,000 tokens",
            worker_id="node-1",
            attempt=2,
            failures=3,
        ),
        "RunAnnouncement": RunAnnouncement(
            run=run,
            submission_id="sub-1",
            totals=Totals(lines=6, claims=3, repeated=2, rejected=1),
            input=InputSummary(
                format="FEVER",
                container="jsonl",
                records=6,
                claims=3,
                repeated=2,
                rejected=(("no claim", 1),),
                without_evidence=(("page references without text", 3),),
                gold=(("SUPPORTS", 1),),
                unlabelled=1,
                kept_back=1,
                unknown_labels=(("DISPUTED", 1),),
                own_ids=0,
                numeric_ids=True,
            ),
        ),
        "Notice": ControlUpdate(
            cancelled=("sub-1", "sub-2"),
            contexts=(
                ContextDemand(
                    context=context, claims_ready=640, claims_in_flight=192, workers_warm=1
                ),
            ),
        ),
        "ContextReady": ContextReady(
            startup_id="start-1",
            worker_id="node-1",
            context_id=context.context_id,
            device="Tesla T4",
            warm=False,
            seconds=61.5,
            phases=StartupPhases(
                imports=8.0, fetch=None, load=9.5, compile=40.0, first_token=0.5, total=60.0
            ),
        ),
        "WorkerReport": WorkerHeartbeat(
            worker_id="node-1",
            context_id=context.context_id,
            device="Tesla T4",
            state="serving",
            claims_per_second=12.5,
        ),
    }
