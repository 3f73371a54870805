"""Plan a mixture of experts, make one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit.api.merge import load_methods, log_compile, plan_options
from mergekit.api.merged import MergedModel
from mergekit.api.options import RunOptions
from mergekit.api.prepare import read_routers, write_merged, write_routers
from mergekit.api.run import Document, Hooks, check_writable, command_of, run_plan
from mergekit.api.weights import PlanWeights
from mergekit.errors import UsageError
from mergekit.output.moe_card import moe_card
from mergekit.output.names import ROUTING
from mergekit.output.paths import without_paths

if TYPE_CHECKING:
    from mergekit.downloads import Told
    from mergekit.moe.build import MoePlan
    from mergekit.moe.report import RoutingReport
    from mergekit.moe.schema import MoeConfiguration
    from mergekit.output.card_parts import Command

__all__ = ["MoeOptions", "Outcome", "plan_moe", "prepare_moe", "run_moe", "run_moe_plan"]

_LOG = logging.getLogger("mergekit")
_VERIFY_BELOW = 2_000_000_000
"""Bytes of output up to which a mixture is verified unless the user says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeOptions:
    """What else a run of a mixture may be told.

    ``architecture``: the output family where the recipe names none. ``verify`` None: models below 2 GB.
    ``allow_all_same``: experts that are all one model are no fault. ``trust_remote_code``: for tokenizers.
    """

    architecture: str = "mixtral"
    verify: bool | None = None
    allow_all_same: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What there is to say after a run: ``remarks`` are oddities, ``lines`` the routing table and the self-test."""

    remarks: list[str]
    lines: list[str]


def plan_moe(
    recipe: str | Path | Mapping[str, Any] | MoeConfiguration,
    options: RunOptions | None = None,
    choices: MoeOptions | None = None,
    *,
    fetch: bool = False,
    told: Told | None = None,
) -> MoePlan:
    """What making the mixture ``recipe`` would do, from headers and small files only.

    Models on the hub are planned from their headers, unless ``fetch``; ``told`` hears of downloads. Raises a
    MergekitError for what can't be done.
    """
    from mergekit.moe.build import build_moe_plan
    from mergekit.moe.recipe import load_moe_recipe
    from mergekit.moe.targets import find_target
    from mergekit.planning.locate import is_folder

    options, choices = options or RunOptions(), choices or MoeOptions()
    load_methods(options)
    checked = load_moe_recipe(recipe, allow_all_same=choices.allow_all_same)
    try:
        target = find_target(checked.config.architecture or choices.architecture)
    except UsageError as error:
        raise checked.fault(str(error), "architecture") from None
    if fetch and not all(map(is_folder, checked.references())):
        build_moe_plan(checked, target, plan_options(options, False, told))
    made = build_moe_plan(checked, target, plan_options(options, fetch, told))
    code = sorted(path.name for path in Path(made.tokenizer).glob("*.py")) if choices.trust_remote_code else []
    if not code or not made.recipe.uses_prompts:
        return made
    note = f"--trust-remote-code: reading the prompts may run {', '.join(code)} of {made.plan.sources[0].short}"
    return replace(made, plan=replace(made.plan, notes=(*made.plan.notes, note)))


def run_moe(
    recipe: str | Path | Mapping[str, Any] | MoeConfiguration,
    out: str | Path,
    options: RunOptions | None = None,
    *,
    architecture: str = "mixtral",
    verify: bool | None = None,
    allow_all_same: bool = False,
    trust_remote_code: bool = False,
    on_plan: Callable[[MoePlan], None] | None = None,
    advance: Callable[[int], None] | None = None,
    **changes: Any,
) -> MergedModel:
    """Make the mixture of experts ``recipe`` in the folder ``out`` and return its path.

    The keywords are those of MoeOptions, ``changes`` fields of RunOptions. Everything said goes to the logger
    ``mergekit``. A run that was interrupted continues where it stopped when called again.
    """
    options = replace(options or RunOptions(), **changes)
    choices = MoeOptions(
        architecture=architecture,
        verify=verify,
        allow_all_same=allow_all_same,
        trust_remote_code=trust_remote_code,
    )
    if not str(out):
        raise UsageError("the output folder has no name")
    folder = Path(out)
    check_writable(folder, options)
    made = plan_moe(recipe, options, choices, fetch=True)
    if on_plan:
        on_plan(made)
    hooks = Hooks(on_compile=log_compile, advance=advance or (lambda nbytes: None), stage=_LOG.info)
    outcome = run_moe_plan(made, folder, options, choices, hooks)
    for text in (*made.plan.warnings, *made.plan.notes, *outcome.remarks):
        _LOG.warning("%s", text)
    for line in outcome.lines:
        _LOG.info("%s", line)
    return MergedModel(folder)


def run_moe_plan(
    made: MoePlan,
    folder: Path,
    options: RunOptions | None = None,
    choices: MoeOptions | None = None,
    hooks: Hooks | None = None,
) -> Outcome:
    """Execute the plan of a mixture into ``folder``: routers, assembly, routing report, self-test.

    Of ``hooks`` those that are told something are used; ``advance`` hears of ``made.nbytes`` in all.
    """
    options, choices, hooks = options or RunOptions(), choices or MoeOptions(), hooks or Hooks()
    stage = hooks.stage
    verify = choices.verify if choices.verify is not None else made.plan.bytes_written < _VERIFY_BELOW
    lines: list[str] = []
    remarks: list[str] = []
    reports: list[RoutingReport] = []
    uses_prompts = made.recipe.uses_prompts

    def prepare(staging: Path) -> None:
        remarks.extend(prepare_moe(made, staging, options, choices, hooks))

    def measure(staging: Path) -> list[Document]:
        if uses_prompts:
            stage("routing prompts through the mixture")
            report = _measure(made, read_routers(made, staging), options, choices, stage)
            reports.append(report)
            lines.extend(report.table())
        if verify and shutil.disk_usage(staging).free < 3 * made.plan.bytes_written:
            remarks.append("the identity law was not checked: that needs three times the output's size of free space")
        elif verify:
            from mergekit.api.self_test import check_identity

            stage("checking the identity law")
            lines.append(f"verified: {check_identity(made, staging, options)}")
        return [(ROUTING, without_paths(report.to_json(), made.plan)) for report in reports]

    def card(title: str, summary: Mapping[str, Any] | None) -> str:
        routing = without_paths(reports[0].markdown(), made.plan) if reports else None
        return moe_card(made.plan, title, routing, summary, _command(made, options, choices))

    remarks += run_plan(made.plan, folder, options, replace(hooks, prepare=prepare, measure=measure, card=card))
    if verify:
        from mergekit.api.self_test import check_reload

        stage("loading the result")
        try:
            tokenizer = _tokenizer(made, choices) if options.copy_tokenizer else None
        except UsageError:  # no tokenizer, or one whose code is not trusted
            tokenizer = None
        lines += [f"verified: {line}" for line in check_reload(made, folder, tokenizer)]
    return Outcome(remarks, lines)


def _command(made: MoePlan, options: RunOptions, choices: MoeOptions) -> Command:
    """What to type for this mixture, but for its paths."""
    is_script = choices.architecture != MoeOptions().architecture and made.recipe.config.architecture is None
    program = "python -m mergekit.scripts.phi3_moe" if is_script else "mergekit moe"
    same = ["--i-understand-this-is-not-useful-without-training"] if choices.allow_all_same else []
    return command_of(options, program, same, trusted=choices.trust_remote_code)


def prepare_moe(made: MoePlan, staging: Path, options: RunOptions, choices: MoeOptions, hooks: Hooks) -> list[str]:
    """Make what the plan of a mixture reads besides its models, in ``staging``; returns remarks."""
    remarks: list[str] = []
    write_merged(made, staging, options, hooks)
    write_routers(made, staging, lambda: _calibrate(made, options, choices, hooks.stage, remarks))
    return remarks


def _layers_told(stage: Callable[[str], None], what: str) -> Callable[[int, int], None]:
    """Tells of every eighth part of the layers: of a large model, each takes seconds."""

    def told(layer: int, layers: int) -> None:
        if layers >= 8 and layer % max(1, layers // 8) == 0:
            stage(f"{what}: layer {layer} of {layers}")

    return told


def _calibrate(
    made: MoePlan, options: RunOptions, choices: MoeOptions, stage: Callable[[str], None], remarks: list[str]
) -> np.ndarray:
    """The router rows of a mixture, float32 [layers, experts, hidden]; what there is to say goes to ``remarks``."""
    from mergekit.moe.calibrate import calibrate

    uses_prompts = made.recipe.uses_prompts
    if uses_prompts:
        count = sum(len(prompts.positive) + len(prompts.negative) for prompts in made.prompts)
        stage(f"calibrating routers: {count} prompts through {made.dense.layers} layers")
    layers, experts, hidden = made.router_shape
    result = calibrate(
        made.recipe.config.gate_mode,
        made.prompts,
        _tokenizer(made, choices) if uses_prompts else None,
        PlanWeights(made, options.threads),
        layers=layers,
        experts=experts,
        hidden=hidden,
        seed=made.plan.seed,
        device=options.device,
        apply_chat_template=made.recipe.config.apply_chat_template,
        on_layer=_layers_told(stage, "calibrating"),
    )
    remarks += result.notes
    return result.rows


def _measure(
    made: MoePlan, rows: np.ndarray, options: RunOptions, choices: MoeOptions, stage: Callable[[str], None]
) -> RoutingReport:
    """Where the held-out prompts go in the mixture with router ``rows``."""
    import torch

    from mergekit.moe.calibrate import measure

    stored = torch.from_numpy(rows.copy()).to(getattr(torch, made.dtype.name)).float().numpy()
    assert made.plan.mixture is not None
    return measure(
        stored,
        made.prompts,
        _tokenizer(made, choices),
        PlanWeights(made, options.threads),
        names=[made.plan.sources[position].short for position in made.plan.mixture.experts],
        experts_per_token=made.recipe.config.experts_per_token,
        gate_mode=made.recipe.config.gate_mode,
        device=options.device,
        apply_chat_template=made.recipe.config.apply_chat_template,
        on_layer=_layers_told(stage, "routing"),
    )


def _tokenizer(made: MoePlan, choices: MoeOptions) -> Any:
    """The base model's tokenizer; its own code runs only if the user trusts it."""
    from transformers import AutoTokenizer

    source = made.plan.sources[made.plan.donor]
    try:
        return AutoTokenizer.from_pretrained(
            made.tokenizer, trust_remote_code=choices.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers raises whatever its parts do
        raise UsageError(
            f"{source.reference}: its tokenizer can't be read, which prompts need ({str(error).splitlines()[0]:.200}); "
            f"gate_mode: random needs none"
        ) from None
