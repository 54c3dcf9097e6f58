"""Trains a LoRA adapter for a prompt, a model and a file of claims with labels.

    .venv/bin/python training/train_adapter.py train.jsonl --development development.jsonl \\
        --model .models/SmolLM2-135M-Instruct --prompt samples/prompt.yaml --out adapter

The files are what `keepwarm run` reads. The prompts are compiled as a worker compiles them, and the
loss is the cross-entropy of the label's token at the position that Keepwarm scores, over all tokens
of the vocabulary: minus the log probability that a verdict is read from. Only the matrices of the
adapter are trained (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Needs the `training` extra beside an engine, whose torch and transformers it uses. docs/adapter.md
says more.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from services.contracts import ContextSpec, PromptSpec
from services.models.compiled_prompt import CompiledPrompt
from services.models.tokenizer import ModelTokenizer
from services.producer import ClaimsFile, Source, read_prompt
from training.shared_prefixes import log_probabilities

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARM_UP = 0.06  # of the steps
EVALUATION_GROUPS = 16


@dataclass(frozen=True)
class Question:
    """A compiled prompt, and the index of its label in the prompt's labels."""

    tokens: tuple[int, ...]
    label: int


Group = Sequence[Question]
"""Questions about the same evidence."""


def read_groups(path: Path, prompt: CompiledPrompt, largest: int = 8) -> list[Group]:
    """The labelled claims of a file, adjacent ones with the same evidence together."""
    names = prompt.spec.label_names
    with Source.open(str(path)) as source:
        claims = [claim for claim in ClaimsFile(source, prompt.spec) if claim.gold in names]
    if not claims:
        raise SystemExit(f"{path}: no claim has a label of the prompt; add labels, or --prompt")
    groups: list[Group] = []
    for _, same in groupby(claims, key=lambda claim: claim.evidence):
        members = list(same)
        questions = [
            Question(tuple(tokens), names.index(claim.gold or ""))
            for claim, tokens in zip(members, prompt.encode(members), strict=True)
        ]
        groups += [questions[at : at + largest] for at in range(0, len(questions), largest)]
    return groups


def tokens_of(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[question.tokens for question in group] for group in groups]


def batches(groups: Sequence[Group], size: int, random: Random) -> Iterator[list[Group]]:
    """All groups in a new order, `size` at a time, those of similar length together."""
    shuffled = random.sample(groups, len(groups))
    pool = size * 8
    found = []
    for at in range(0, len(shuffled), pool):
        part = sorted(shuffled[at : at + pool], key=lambda group: len(group[0].tokens))
        found += [part[i : i + size] for i in range(0, len(part), size)]
    yield from random.sample(found, len(found))


@torch.no_grad()
def evaluate(model: PreTrainedModel, groups: Sequence[Group], labels: Sequence[int]) -> dict:
    """Accuracy, mean loss, and the labels that were predicted."""
    model.eval()
    right, loss, predicted, count = 0, 0.0, Counter[int](), 0
    for at in range(0, len(groups), EVALUATION_GROUPS):
        part = groups[at : at + EVALUATION_GROUPS]
        gold = torch.tensor([question.label for group in part for question in group])
        scores = log_probabilities(model, tokens_of(part))[:, labels]
        best = scores.argmax(-1)
        right += int((best == gold).sum())
        loss -= float(scores[torch.arange(len(gold)), gold].sum())
        predicted.update(best.tolist())
        count += len(gold)
    model.train()
    return {
        "accuracy": round(right / count, 3),
        "loss": round(loss / count, 3),
        "predicted": [predicted[label] for label in range(len(labels))],
    }


def save(model: PeftModel, directory: Path) -> None:
    """The two files of PEFT's format. The weights are rounded to bfloat16, in which an engine
    computes; the file is then half as large.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.to(torch.bfloat16).contiguous()
        for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    path = directory / "adapter_model.safetensors"
    save_file(weights, path)
    path.chmod(0o644)  # safetensors writes 0600; a container runs as another user
    model.peft_config["default"].save_pretrained(str(directory))


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    random = Random(arguments.seed)
    prompt = CompiledPrompt(
        read_prompt(arguments.prompt) if arguments.prompt else PromptSpec(),
        ModelTokenizer.load(ContextSpec(model=str(arguments.model.resolve()))),
    )
    labels = prompt.label_tokens[: len(prompt.spec.labels)]
    groups = read_groups(arguments.claims, prompt)
    checks = {path.stem: read_groups(path, prompt) for path in arguments.development}
    counts = Counter(question.label for group in groups for question in group)
    weights = torch.tensor(
        [sum(counts.values()) / len(counts) / max(1, counts[i]) for i in range(len(labels))]
    )
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = get_peft_model(
        base,
        LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules=list(MODULES),
            layers_to_transform=list(range(arguments.first_layer, base.config.num_hidden_layers)),
            task_type="CAUSAL_LM",
        ),
    )
    # Not the path on this machine.
    model.peft_config["default"].base_model_name_or_path = arguments.model.resolve().name
    network = model.base_model.model
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.01)
    steps = arguments.epochs * math.ceil(len(groups) / arguments.groups)
    warm_up = max(1, round(steps * WARM_UP))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warm_up
            if step < warm_up
            else 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
        ),
    )
    print(
        f"{sum(counts.values())} claims in {len(groups)} groups, labels "
        f"{[counts[i] for i in range(len(labels))]}, {steps} steps, "
        f"{sum(weight.numel() for weight in trained):,} weights",
        flush=True,
    )
    started, step, running = time.monotonic(), 0, 0.0
    model.train()
    for _ in range(arguments.epochs):
        for batch in batches(groups, arguments.groups, random):
            gold = torch.tensor([question.label for group in batch for question in group])
            found = log_probabilities(network, tokens_of(batch))
            own = found[torch.arange(len(gold)), torch.tensor(labels)[gold]]
            loss = -(weights[gold] * own).sum() / weights[gold].sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            now = loss.item()
            running = now if step == 1 else 0.95 * running + 0.05 * now
            if step % arguments.report == 0 or step == steps:
                line = {
                    "step": step,
                    "seconds": round(time.monotonic() - started),
                    "loss": round(running, 3),
                    **{name: evaluate(network, check, labels) for name, check in checks.items()},
                }
                print(json.dumps(line), flush=True)
                save(model, arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claims", type=Path, help="claims with labels, to train on")
    parser.add_argument(
        "--development", type=Path, action="append", default=[], help="claims to measure on"
    )
    parser.add_argument("--model", type=Path, required=True, help="the model's directory")
    parser.add_argument("--prompt", type=Path, help="a prompt file; default: Keepwarm's prompt")
    parser.add_argument("--out", type=Path, required=True, help="the adapter's directory")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--first-layer",
        type=int,
        default=0,
        help="train this layer and those above it; half of the layers take two thirds of the time",
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--groups", type=int, default=8, help="evidence texts per step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--report", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=18)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
