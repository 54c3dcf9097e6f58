"""What a sweep would do, without a broker or an engine."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice

from pydantic import BaseModel, ConfigDict
from rich.text import Text

from services.cli.cells import Cell
from services.cli.input_summary import summary_lines
from services.cli.screen import Screen, add_numbers, line_progress, plain_table, plural, say, show
from services.cli.validate import token_lengths
from services.contexts.caches import EngineCaches
from services.contexts.engine_command import needed_bytes
from services.contexts.plan import EnginePlan
from services.contracts import ContextSpec, PromptSpec, Settings
from services.contracts.errors import EngineStartError, InputError
from services.contracts.runs import InputSummary
from services.models.compiled_prompt import CompiledPrompt
from services.models.files import weights_bytes
from services.models.tokenizer import ModelTokenizer
from services.node.device import Device, find_device
from services.producer import ClaimsFile
from services.store import DeviceRate, Store, device_rates, run_status

_EXAMPLES = 2
_GIB = 2**30


class CellPlan(BaseModel):
    """A cell. `tokens` are those of all its prompts, as in `keepwarm validate`."""

    model_config = ConfigDict(frozen=True)

    name: str
    prompt: str
    model: str
    run_id: str
    claims: int
    known: int
    """Claims that have an outcome already."""
    tokens: dict[str, int]
    label_tokens: dict[str, tuple[str, ...]]
    """For each label, the tokens whose probabilities are added up."""
    examples: tuple[str, ...]
    """Prompts as the model sees them."""

    @property
    def tokens_left(self) -> int:
        """An estimate: claims without an outcome are as long as the others."""
        return round(self.tokens["total"] * (1 - self.known / self.claims))


class ModelPlan(BaseModel):
    """A model of the sweep, with all cells that it has."""

    model_config = ConfigDict(frozen=True)

    model: str
    context_id: str
    weights_bytes: int | None
    """None if the weights are not on this machine."""
    engine_bytes: int | None
    """The memory that an engine takes here; None if that is not known."""
    device: str | None
    """The device of this machine; None if there is a GPU that cannot be used."""
    tokens_left: int
    rates: tuple[DeviceRate, ...]
    """As measured in the sweep's store."""
    hours: dict[str, float]
    """Of one worker, for the tokens left, by device; empty without a measured rate."""


class SweepPlan(BaseModel):
    """`file` describes the claims."""

    model_config = ConfigDict(frozen=True)

    file: tuple[str, ...]
    selected: int | None
    """Claims of the part that decides the order; None without `select`."""
    cells: tuple[CellPlan, ...]
    models: tuple[ModelPlan, ...]


def plan_sweep(
    console: Screen,
    cells: Sequence[Cell],
    settings: Settings,
    *,
    has_store: bool,
    selected: int | None,
) -> SweepPlan:
    """The plan. With `has_store`, the store of the settings exists.

    Raises InputError when no line of the file is a claim, StoreError for a store that cannot be
    read.
    """
    with ExitStack() as opened:
        store = opened.enter_context(Store.open(settings, create=False)) if has_store else None
        plans: list[CellPlan] = []
        lines: dict[str, None] = {}
        summaries: dict[PromptSpec, InputSummary] = {}
        tokenizers: dict[ContextSpec, ModelTokenizer] = {}
        for cell in cells:
            file, run = cell.submission.file, cell.submission.run
            if run.prompt not in summaries:
                summaries[run.prompt] = _inspected(console, file)
                lines |= dict.fromkeys(summary_lines(file, summaries[run.prompt]))
            if run.context not in tokenizers:
                tokenizers[run.context] = ModelTokenizer.load(run.context)
            claims = summaries[run.prompt].claims
            plans.append(_cell(console, cell, claims, tokenizers[run.context], store))
        by_context: defaultdict[ContextSpec, list[CellPlan]] = defaultdict(list)
        for cell, plan in zip(cells, plans, strict=True):
            by_context[cell.submission.run.context].append(plan)
        device = _device()
        return SweepPlan(
            file=tuple(lines),
            selected=selected,
            cells=tuple(plans),
            models=tuple(
                _model(context, of_context, device, settings, store)
                for context, of_context in by_context.items()
            ),
        )


def _inspected(console: Screen, file: ClaimsFile) -> InputSummary:
    with line_progress(console, "checking", file.records_to_read) as checking:
        summary = file.inspect(on_records=checking)
    if summary.claims == 0:
        raise InputError(
            f"{file.name}: none of its {file.records_to_read:,} records is a claim; see "
            f"`keepwarm validate {file.name}`"
        )
    return summary


def _cell(
    console: Screen, cell: Cell, claims: int, tokenizer: ModelTokenizer, store: Store | None
) -> CellPlan:
    file, run = cell.submission.file, cell.submission.run
    compiled = CompiledPrompt(run.prompt, tokenizer)
    limit = run.context.max_model_tokens - compiled.reserved_tokens
    with line_progress(console, "counting tokens", file.records_to_read) as counting:
        tokens = token_lengths(file, compiled, limit, counting)
    status = None if store is None else run_status(store, run.run_id)
    examples = [compiled.render(claim) for claim in islice(file, _EXAMPLES)]
    return CellPlan(
        name=cell.name,
        prompt=cell.prompt,
        model=cell.model,
        run_id=run.run_id,
        claims=claims,
        known=0 if status is None else min(claims, status.done + status.dead),
        tokens=tokens,
        label_tokens={
            label: tuple(token.text for token in scored)
            for label, scored in zip(run.prompt.label_names, examples[0].label_tokens, strict=True)
        },
        examples=tuple(example.text for example in examples),
    )


def _device() -> Device | None:
    try:
        return find_device()
    except EngineStartError:
        return None


def _model(
    context: ContextSpec,
    cells: Sequence[CellPlan],
    device: Device | None,
    settings: Settings,
    store: Store | None,
) -> ModelPlan:
    weights = weights_bytes(context)
    engine = None
    if device is not None:
        plan = EnginePlan.of(context, device, settings)
        past = EngineCaches(settings.cache_dir).last_start(plan.name)
        known = None if past is None else past.memory_bytes
        if known or weights or device.kind == "cuda":
            engine = needed_bytes(plan, known)
    tokens = sum(cell.tokens_left for cell in cells)
    rates = () if store is None else device_rates(store, context.context_id)
    return ModelPlan(
        model=cells[0].model,
        context_id=context.context_id,
        weights_bytes=weights,
        engine_bytes=engine,
        device=None if device is None else device.name,
        tokens_left=tokens,
        rates=rates,
        hours={rate.device: tokens / rate.tokens_per_second / 3600 for rate in rates},
    )


def print_plan(console: Screen, plan: SweepPlan) -> None:
    """The plan, within 80 columns on a terminal."""
    for line in (*plan.file, *_sums(plan)):
        show(console, Text(line))
    table = plain_table()
    table.add_column("\nprompt", overflow="ellipsis", min_width=10)
    table.add_column("\nmodel", overflow="ellipsis", min_width=10)
    add_numbers(table, "\nclaims", "\nknown", "\ntokens", "\nlongest", "too\nlong")
    for cell in plan.cells:
        table.add_row(
            Text(cell.prompt, no_wrap=True),
            Text(cell.model, no_wrap=True),
            f"{cell.claims:,}",
            f"{cell.known:,}",
            f"{cell.tokens['total']:,}",
            f"{cell.tokens['longest']:,}",
            f"{cell.tokens['too_long']:,}",
        )
    show(console, table)
    if any(cell.tokens["too_long"] for cell in plan.cells):
        show(console, Text("Claims that are too long become dead claims; see max_model_tokens."))
    for model in plan.models:
        show(console, Text(f"\n{model.model}: {_memory(model)}\n{_time(model)}"))
    for cell in plan.cells:
        tokens = [
            f"{label} {' and '.join(map(repr, texts))}"
            for label, texts in cell.label_tokens.items()
        ]
        show(console, Text(f"\n{cell.name}: label tokens {', '.join(tokens)}"))
        for number, example in enumerate(cell.examples, 1):
            say(console, f"--- claim {number}, as the model sees it ---\n{example}")


def _sums(plan: SweepPlan) -> Iterator[str]:
    prompts = len({cell.prompt for cell in plan.cells})
    claims = sum(cell.claims for cell in plan.cells)
    known = sum(cell.known for cell in plan.cells)
    yield (
        f"{plural(len(plan.cells), 'cell')}: {plural(prompts, 'prompt')} x "
        f"{plural(len(plan.models), 'model')}; {claims:,} claims in all, {known:,} with an outcome "
        "already"
    )
    if plan.selected is not None:
        others = plan.cells[0].claims - plan.selected
        yield (
            f"{plan.selected:,} claims decide the order; the results are those of the other "
            f"{others:,}"
        )


def _memory(model: ModelPlan) -> str:
    weights = "weights not on this machine"
    if model.weights_bytes is not None:
        weights = f"weights {model.weights_bytes / _GIB:.1f} GiB"
    if model.engine_bytes is None:
        return f"{weights}, memory of an engine not known"
    return f"{weights}, an engine takes {model.engine_bytes / _GIB:.1f} GiB on {model.device}"


def _time(model: ModelPlan) -> str:
    if not model.tokens_left:
        return "nothing left to compute"
    if not model.hours:
        return (
            f"{model.tokens_left:,} tokens to compute; hours not known: the store has no verdict "
            "of this model yet"
        )
    listed = ", ".join(
        f"{model.hours[rate.device]:.2g} h on {rate.device} ({rate.tokens_per_second:,.0f} "
        f"tokens/s, measured on {rate.claims:,} claims)"
        for rate in model.rates
    )
    return f"{model.tokens_left:,} tokens to compute, by one worker: {listed}"
