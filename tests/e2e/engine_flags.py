"""Put every flag of vLLM, in every way of writing it, to the list of accepted ones; then sequences
of them, read by vLLM's own parser. Ends with an AssertionError where something gets past.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from services.contexts.accepted_contexts import ACCEPTED_ARGUMENTS, refusal
from services.contracts import ContextSpec, load_settings

SETTINGS = load_settings()
PARSER = make_arg_parser(FlexibleArgumentParser())
FLAGS = {flag: action for action in PARSER._actions for flag in action.option_strings}
ACCEPTED = {FLAGS[flag].dest for flag in ACCEPTED_ARGUMENTS}


def is_accepted(arguments: list[str]) -> bool:
    return refusal(ContextSpec(model="org/m", engine_arguments=tuple(arguments)), SETTINGS) is None


def spellings(flag: str) -> set[str]:
    """Names that vLLM's parser takes for it, its unique beginnings among them."""
    names = {flag, flag.replace("-", "_"), "--" + flag[2:].replace("-", "_")}
    for end in range(3, len(flag)):
        if [each for each in FLAGS if each.startswith(flag[:end])] == [flag]:
            names.add(flag[:end])
    return names


def every_flag_is_judged_by_its_own_name() -> None:
    for flag, action in FLAGS.items():
        for name in spellings(flag):
            for written in (
                [name],
                [f"{name}=x"],
                [name, "x"],
                [f"{name}.a=1"],
                [f"{name}.a", "1"],
            ):
                if is_accepted(written):
                    assert action.dest in ACCEPTED, written


VALUES = ("fp8", "2", "org/evil", "evil.Class", "/tmp/evil.py", "{}", '{"architectures": ["A"]}')
TEXTS = st.sampled_from(
    [
        *sorted(name for flag in FLAGS for name in spellings(flag)),
        *(f"{flag}={value}" for flag in sorted(FLAGS) for value in VALUES),
        *(*VALUES, "--", "-O3", "--hf-overrides.rope_theta=1", "--hf-overrides.auto_map=x"),
    ]
)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(sorted(ACCEPTED_ARGUMENTS)),
            st.sampled_from([f"{flag}=2" for flag in sorted(ACCEPTED_ARGUMENTS)]),
            TEXTS,
        ),
        max_size=4,
    )
)
def what_is_accepted_sets_nothing_else(arguments: list[str]) -> None:
    if not is_accepted(arguments):
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            read = vars(PARSER.parse_args(list(arguments)))
    except (SystemExit, ValueError, argparse.ArgumentError):
        return  # vLLM does not take them: the engine does not start
    changed = {name for name, value in read.items() if value != DEFAULTS[name]}
    assert changed <= ACCEPTED, (arguments, changed - ACCEPTED)
    assert set(read.get("hf_overrides") or ()) <= {
        *("rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings")
    }, arguments


DEFAULTS = vars(PARSER.parse_args([]))

if __name__ == "__main__":
    every_flag_is_judged_by_its_own_name()
    what_is_accepted_sets_nothing_else()
    print(f"{len(FLAGS)} flags")
