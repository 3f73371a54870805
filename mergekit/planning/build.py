"""From a checked recipe to a plan: open the models, map tensors, resolve parameters, pack shards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit.dtypes import recipe_dtype
from mergekit.errors import IncompatibleError, some_of
from mergekit.methods import source_digest
from mergekit.planning.agree import disagreements
from mergekit.planning.document import make_config
from mergekit.planning.express import Expresser, Listener
from mergekit.planning.expression import leaves
from mergekit.planning.licences import input_cards, licence_notes, licence_warnings
from mergekit.planning.models import Models, check_architectures, open_recipe
from mergekit.planning.pack import pack
from mergekit.planning.plan import Plan, Source
from mergekit.planning.slots import Slots, find_slots
from mergekit.planning.tokenizer_files import small_files
from mergekit.planning.vocabulary import align_vocabularies, other_meanings
from mergekit.recipe import Recipe
from mergekit.refs import distinct_names
from mergekit.version import __version__

if TYPE_CHECKING:
    from mergekit.downloads import Told

__all__ = ["PlanOptions", "build_plan", "sources_of"]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a run may change about a plan. ``shard_size`` is in bytes (0: one file); ``told`` hears of downloads."""

    shard_size: int = 5_000_000_000
    allow_crimes: bool = False
    unsafe_truncate_embeddings: bool = False
    copy_tokenizer: bool = True
    allow_nonfinite: bool = False
    seed: int | None = None
    statistics: bool = True
    device: str = "cpu"
    cache_dir: Path | None = None
    fetch: bool = True
    told: Told = lambda model, done, total: None


def build_plan(recipe: Recipe, options: PlanOptions, listener: Listener | None = None) -> Plan:
    """Everything a run of ``recipe`` will do, from headers and small files only. Refuses what can't be done.

    ``listener`` hears where the values of parameters come from.
    """
    models = open_recipe(recipe, cache_dir=options.cache_dir, told=options.told, fetch=options.fetch)
    warnings = [*recipe.warnings, *models.warnings]
    warnings += check_architectures(models, allow_crimes=options.allow_crimes)
    slots = find_slots(recipe, models)
    alignment = align_vocabularies(recipe, models)
    expresser = Expresser(recipe, models, alignment, options.unsafe_truncate_embeddings, listener)
    _check_relatives(models, slots)
    made = [tensor for slot in slots.slots if (tensor := expresser.make(slot)) is not None]
    if not made:
        raise IncompatibleError("the recipe selects no tensor at all")
    if alignment is not None and expresser.rows is None:
        raise IncompatibleError(
            "no embeddings were found that the tokenizer's ids could index; leave the tokenizer settings out to merge "
            "these models tensor by tensor"
        )
    text = recipe.config.out_dtype or recipe.config.dtype
    config, more = make_config(models, slots, made, expresser, recipe_dtype(text) if text else None)
    words = disagreements(models, alignment, has_template=recipe.config.chat_template is not None)
    files = small_files(recipe, models, alignment, tokenizer=options.copy_tokenizer)
    if alignment is None:
        warnings += other_meanings(models)
    else:
        warnings += alignment.warnings
    warnings += files.warnings
    used = {(read.source, read.info.name) for tensor in made for read in leaves(tensor.expression)}
    reason = "outside the slices" if recipe.config.slices else "the result has no tensor for it"
    left_out = (*slots.left_out, *((number, name, reason) for number, name in unused_parts(models, used)))
    warnings += expresser.all_warnings() + more + words + _left_out_warning(models, left_out)
    sources = sources_of(models)
    cards = input_cards(sources)
    warnings += licence_warnings(cards)
    outputs, shards, index = pack(made, options.shard_size)
    notes = [*recipe.notes, *models.notes, *code_note(models, files.copied), *licence_notes(cards)]
    for model in models.models:
        notes += [f"{model.reference.short}: {notice}" for notice in model.checkpoint.notices]
    if any(read.info.dtype.code == "F64" for output in outputs for read in leaves(output.expression)):
        notes.append("float64 tensors are computed in float32")
    seed = options.seed if options.seed is not None else recipe.config.seed or 0
    return Plan(
        version=__version__,
        method=recipe.method.name,
        seed=seed,
        sources=sources,
        base=models.base,
        donor=models.donor,
        outputs=outputs,
        shards=shards,
        config=config or "",
        index=index,
        files=tuple(files.copied),
        texts=tuple(files.texts.items()),
        left_out=left_out,
        warnings=tuple(dict.fromkeys(warnings)),
        notes=tuple(dict.fromkeys(notes)),
        recipe=recipe.text.text,
        device=options.device,
        allow_nonfinite=options.allow_nonfinite,
        rounding=recipe.config.rounding,
        method_source=source_digest(recipe.method),
        statistics=options.statistics,
        cards=cards,
    )


def sources_of(models: Models) -> tuple[Source, ...]:
    """The sources of a plan: the models in order, then their adapters, under names that differ."""
    references = [model.reference for model in models.models]
    names = distinct_names([*(r.model for r in references), *(path for path, _ in models.adapters)])
    shorts = [f"{names[r.model]}+{names[r.lora]}" if r.lora else names[r.model] for r in references]
    below = tuple(
        Source(str(m.reference), short, str(m.checkpoint.folder), m.checkpoint.files, m.checkpoint.pickled)
        for m, short in zip(models.models, shorts, strict=True)
    )
    return below + tuple(
        Source(str(path), names[path], str(adapter.folder), adapter.files, adapter.pickled, adapter=True)
        for path, adapter in models.adapters
    )


def unused_parts(models: Models, used: Collection[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The tensors of adapters, as (source, name), that are not among those ``used``."""
    for number, (_, adapter) in enumerate(models.adapters, start=len(models.models)):
        for patch in adapter.patches.values():
            for part in patch.tensors():
                if (number, part.name) not in used:
                    yield number, part.name


def _check_relatives(models: Models, slots: Slots) -> None:
    """Refuse a model that shares no tensor with the donor, though it takes part in the merge."""
    asked = {c.model for slot in slots.slots for c in slot.contributions}
    found = {c.model for slot in slots.slots for c in slot.contributions if c.info is not None}
    for position in sorted(asked - found):
        raise IncompatibleError(
            f"{models[position].reference} has none of the tensors of {models[models.donor].reference}; "
            f"merge models of one architecture"
        )


def code_note(models: Models, files: Iterable[tuple[int, str]]) -> list[str]:
    """A note about the code among small ``files`` to copy, if there is any."""
    names = [name for _, name in files if name.endswith(".py")]
    if not names:
        return []
    return [
        f"{models[models.donor].reference.short} brings code ({', '.join(names)}): it is copied and not run here; "
        f"programs that load the result run it if they are told to trust it"
    ]


def _left_out_warning(models: Models, left_out: Sequence[tuple[int, str, str]]) -> list[str]:
    """One warning for each model with tensors that go nowhere for a reason the recipe does not give."""
    found: dict[tuple[int, str], list[str]] = {}
    for source, name, reason in left_out:
        if "slice" not in reason and not reason.startswith("a buffer"):
            found.setdefault((source, reason), []).append(name)
    shorts = [source.short for source in sources_of(models)]
    return [f"left out of {shorts[source]} ({reason}): {some_of(names)}" for (source, reason), names in found.items()]
