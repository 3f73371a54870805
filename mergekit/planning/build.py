"""From a checked recipe to a plan: open the models, map tensors, resolve parameters, pack shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergekit.checkpoint import read_json
from mergekit.dtypes import recipe_dtype
from mergekit.errors import IncompatibleError, nearest
from mergekit.methods import source_digest
from mergekit.planning.agree import disagreements, same_tokenizer
from mergekit.planning.document import donor_files, make_config
from mergekit.planning.express import Expresser
from mergekit.planning.models import Models, check_architectures, open_recipe
from mergekit.planning.pack import pack
from mergekit.planning.plan import Plan, Source, leaves
from mergekit.planning.slots import Slots, find_slots
from mergekit.recipe import Recipe
from mergekit.version import __version__

__all__ = ["PlanOptions", "build_plan", "sources_of"]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a run may change about a plan. ``shard_size`` is in bytes (0: a single file)."""

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
    quiet: bool = False


def build_plan(recipe: Recipe, options: PlanOptions) -> Plan:
    """Everything a run of ``recipe`` will do, from headers and small files only. Refuses what can't be done."""
    models = open_recipe(recipe, cache_dir=options.cache_dir, quiet=options.quiet, fetch=options.fetch)
    warnings = [*recipe.warnings, *models.warnings]
    warnings += check_architectures(models, allow_crimes=options.allow_crimes)
    warnings += _vocabulary_words(recipe, models)
    slots = find_slots(recipe, models)
    expresser = Expresser(recipe, models, options.unsafe_truncate_embeddings)
    _check_relatives(models, slots)
    made = [tensor for slot in slots.slots if (tensor := expresser.make(slot)) is not None]
    if not made:
        raise IncompatibleError("the recipe selects no tensor at all")
    _check_tokenizer_fits(recipe, models, expresser, options)
    text = recipe.config.out_dtype or recipe.config.dtype
    config, more = make_config(models, slots, made, expresser, recipe_dtype(text) if text else None)
    warnings += expresser.all_warnings() + more + disagreements(models) + _left_out_warning(models, slots)
    outputs, shards, index = pack(made, options.shard_size)
    notes = [*recipe.notes, *models.notes]
    for model in models.models:
        notes += [f"{model.reference.short}: {notice}" for notice in model.checkpoint.notices]
    if any(read.info.dtype.code == "F64" for output in outputs for read in leaves(output.expression)):
        notes.append("float64 tensors are computed in float32")
    seed = options.seed if options.seed is not None else recipe.config.seed or 0
    return Plan(
        version=__version__,
        method=recipe.method.name,
        seed=seed,
        sources=sources_of(models),
        base=models.base,
        donor=models.donor,
        outputs=outputs,
        shards=shards,
        config=config or "",
        index=index,
        files=donor_files(models, tokenizer=options.copy_tokenizer),
        left_out=slots.left_out,
        warnings=tuple(dict.fromkeys(warnings)),
        notes=tuple(dict.fromkeys(notes)),
        recipe=recipe.text.text,
        device=options.device,
        allow_nonfinite=options.allow_nonfinite,
        rounding=recipe.config.rounding,
        method_source=source_digest(recipe.method),
        statistics=options.statistics,
    )


def sources_of(models: Models) -> tuple[Source, ...]:
    """The sources of a plan: the models in order, then their adapters."""
    below = tuple(
        Source(str(m.reference), m.reference.short, str(m.checkpoint.folder), m.checkpoint.files, m.checkpoint.pickled)
        for m in models.models
    )
    return below + tuple(
        Source(str(path), path.short, str(adapter.folder), adapter.files, adapter.pickled, adapter=True)
        for path, adapter in models.adapters
    )


def _vocabulary_words(recipe: Recipe, models: Models) -> list[str]:
    """Vocabulary words of the recipe: honoured where they ask for nothing, else refused or listed."""
    config, warnings = recipe.config, []
    word = "tokenizer_source" if config.tokenizer_source is not None else "tokenizer"
    asked = getattr(config, word)
    if config.tokenizer is not None and (config.tokenizer.tokens or config.tokenizer.pad_to_multiple_of):
        part = "tokens" if config.tokenizer.tokens else "pad_to_multiple_of"
        raise recipe.fault(f"'{part}' is not built yet; remove it to keep the base model's vocabulary", word, part)
    source = config.tokenizer.source if config.tokenizer is not None else asked
    known = ["base", "union", *(str(model.reference) for model in models.models)]
    if isinstance(source, str) and source.removeprefix("model:") not in known:
        raise recipe.fault(f"'{source}' is not a tokenizer source. {nearest(source, known)}", word)
    if asked is not None and not same_tokenizer(models):
        raise recipe.fault(
            "these models have different tokenizers, and merging vocabularies is not built yet; "
            f"remove '{word}' to keep the base model's tokenizer",
            word,
        )
    if config.chat_template is not None:
        warnings.append(
            f"{recipe.text.place(('chat_template',))}: 'chat_template' is not applied yet; "
            f"{models[models.donor].reference.short}'s template is kept"
        )
    return warnings


def _check_relatives(models: Models, slots: Slots) -> None:
    """Refuse a model that shares no tensor with the donor, though it takes part in the merge."""
    asked = {c.model for slot in slots.slots for c in slot.contributions}
    found = {c.model for slot in slots.slots for c in slot.contributions if c.info is not None}
    for position in sorted(asked - found):
        raise IncompatibleError(
            f"{models[position].reference} has none of the tensors of {models[models.donor].reference}; "
            f"merge models of one architecture"
        )


def _check_tokenizer_fits(recipe: Recipe, models: Models, expresser: Expresser, options: PlanOptions) -> None:
    """Refuse to cut embeddings below the token ids that the output's tokenizer produces."""
    path = models.tokenizer_of(models.donor)[1] / "tokenizer.json"
    if expresser.rows is None or options.unsafe_truncate_embeddings or not path.is_file():
        return
    record = read_json(path)
    vocabulary = record.get("model", {}).get("vocab", {}) if isinstance(record.get("model"), dict) else {}
    ids = [v for v in vocabulary.values() if isinstance(v, int)] if isinstance(vocabulary, dict) else []
    ids += [t["id"] for t in record.get("added_tokens", []) if isinstance(t, dict) and isinstance(t.get("id"), int)]
    if ids and max(ids) >= expresser.rows:
        donor = models[models.donor].reference
        raise IncompatibleError(
            f"the embeddings would be cut to {expresser.rows} rows, but {donor.short}'s tokenizer has ids up to "
            f"{max(ids)}; make a model with the smaller vocabulary the base, or pass --unsafe-truncate-embeddings"
        )


def _left_out_warning(models: Models, slots: Slots) -> list[str]:
    """One warning for each model with tensors that go nowhere for a reason the recipe does not give."""
    found: dict[tuple[int, str], list[str]] = {}
    for source, name, reason in slots.left_out:
        if "slice" not in reason and not reason.startswith("a buffer"):
            found.setdefault((source, reason), []).append(name)
    return [
        f"left out of {models[source].reference.short} ({reason}): {', '.join(names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for (source, reason), names in found.items()
    ]
