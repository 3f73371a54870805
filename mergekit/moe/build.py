"""From a mixture's recipe to a plan: models opened and checked, tensors laid out as the target family has them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from mergekit.checkpoint import read_json
from mergekit.dtypes import DType, promote, recipe_dtype
from mergekit.errors import RecipeError
from mergekit.families.align import align
from mergekit.families.config import set_dtype, set_tied
from mergekit.families.layout import is_derived_buffer, is_embedding, is_head
from mergekit.methods import get_method, source_digest
from mergekit.methods.spec import Span
from mergekit.moe.dense import Dense, check_tensors, is_mlp, read_dense
from mergekit.moe.layout import Layout
from mergekit.moe.prepared import PreparedFile, router_file
from mergekit.moe.prompts import PromptSet, hold_out, prompt_set
from mergekit.moe.recipe import MoeRecipe
from mergekit.moe.targets import Counts, Target
from mergekit.planning.agree import disagreements
from mergekit.planning.build import PlanOptions, sources_of, unused_parts
from mergekit.planning.document import TOKENIZER_FILES, donor_files
from mergekit.planning.express import Expresser, Made
from mergekit.planning.expression import Apply, Leaf, Noise, PermuteScale, leaves
from mergekit.planning.leaf import cast, leaf_of
from mergekit.planning.licences import input_cards, licence_notes, licence_warnings
from mergekit.planning.models import Model, Models, open_models
from mergekit.planning.pack import pack
from mergekit.planning.plan import Mixture, Plan, Source
from mergekit.planning.slots import find_slots
from mergekit.seeds import stream_key
from mergekit.version import __version__

__all__ = ["MoePlan", "build_moe_plan"]

_MLP_ONLY = "experts give their MLPs only"
_THERE, _HERE = "under the model's 'parameters', or at the top level", "under 'parameters' of 'attention'"


@dataclass(frozen=True, slots=True, eq=False)
class MoePlan:
    """A plan, and what is needed to make its routers: the dense model that a token meets before each router.

    ``shared`` holds the dense model that the experts share, MLPs included, by its own names; ``experts`` the MLPs of
    each expert by the same names. All are in the output's element type, ``dtype``. ``tokenizer`` is the folder of one
    that fits the embeddings. ``merged`` is a file of merged matrices that the target takes apart.
    """

    plan: Plan
    tokenizer: Path
    recipe: MoeRecipe
    dense: Dense
    dtype: DType
    target: Target
    routers: PreparedFile
    merged: PreparedFile
    prompts: tuple[PromptSet, ...]
    shared: Mapping[str, Made]
    experts: tuple[Mapping[str, Made], ...]

    @property
    def nbytes(self) -> int:
        """What a run computes, in bytes: the output's tensors, and the matrices that are merged first."""
        return sum(output.nbytes for output in self.plan.outputs) + self.merged.nbytes

    @property
    def router_shape(self) -> tuple[int, int, int]:
        """Layers, experts, hidden size."""
        return (self.dense.layers, len(self.experts), self.dense.hidden)


def build_moe_plan(recipe: MoeRecipe, target: Target, options: PlanOptions) -> MoePlan:
    """Everything a run of ``recipe`` will do, from headers and small files only. Refuses what can't be done."""
    config = recipe.config
    models = open_models(
        recipe.references(),
        config.base_model,
        place=lambda reference: recipe.text.place(recipe.path_of(reference)),
        recipe=recipe.text.file,
        base_quantization=config.base_quantization,
        cache_dir=options.cache_dir,
        told=options.told,
        fetch=options.fetch,
    )
    dense = read_dense(models[0], target.accepts, target.title)
    check_tensors(dense, models[0])
    positions = tuple(models.position(e.source_model) for e in config.experts)
    for position in dict.fromkeys(positions):
        _check_expert(recipe, dense, models[0], models[position], target)
    dtype = _dtype(recipe, models[0])
    seed = options.seed if options.seed is not None else config.seed or 0
    shared, warnings = _shared(recipe, models, options, dtype)
    experts = tuple(_expert(recipe, models, e, p, dtype, seed) for e, p in enumerate(positions))
    counts = Counts(len(experts), config.experts_per_token)
    sources = sources_of(models)
    prompts, remarks = hold_out([_prompts(recipe, e) for e in range(counts.experts)] if recipe.uses_prompts else [])
    if (
        len(prompts) > 1
        and len({repr([(p.text, p.messages) for p in (*s.positive, *s.negative)]) for s in prompts}) == 1
    ):
        raise recipe.fault("all experts have the same prompts, so no router can tell them apart", "experts")
    digest = _digest(recipe, sources, (prompts, target.name, seed, dtype, options.device, _tokenizer_digest(models)))
    routers = router_file(digest, dense.layers, counts.experts, dense.hidden)
    layout = Layout(dense, target, dtype)
    apart = {n: made for n, made in shared.items() if _is_whole(made) and layout.takes_apart(models[0], n)}
    merged = PreparedFile(f"merged-{digest}.safetensors", tuple((n, made.shape) for n, made in apart.items()))
    reads = merged.reads(len(sources) + 1)
    stored = {n: dataclasses.replace(made, expression=cast(reads[n], dtype)) if n in apart else made
              for n, made in shared.items()}  # fmt: skip
    rows = list(routers.reads(len(sources)).values())
    made = tuple(layout.tensors(models[0], stored, experts, rows))
    left_out = tuple(_left_out(models, [*made, *apart.values()]))
    warnings += _check_adapters(recipe, models, positions, left_out)
    outputs, shards, index = pack(made, options.shard_size)
    entries = target.config(dense, counts)
    set_dtype(entries, dtype)
    set_tied(entries, not any(is_head(tensor.name) for tensor in made))
    warnings += [*disagreements(models), *_check_vocabularies(recipe, models, positions, made)]
    cards = input_cards(sources)
    warnings += [*_lost_attention(models, positions, left_out), *licence_warnings(cards)]
    copied = donor_files(models, tokenizer=options.copy_tokenizer)
    how_shared = config.attention if isinstance(config.attention, str) else config.attention.merge_method
    plan = Plan(
        version=__version__,
        method=recipe.shared.method.name,
        seed=seed,
        sources=(*sources, routers.source("routers"), *([merged.source("merged")] if apart else [])),
        base=0,
        donor=0,
        outputs=outputs,
        shards=shards,
        config=json.dumps(entries, indent=2, ensure_ascii=False) + "\n",
        index=index,
        files=tuple((source, name) for source, name in copied if not name.endswith(".py")),
        left_out=left_out,
        warnings=tuple(dict.fromkeys([*recipe.warnings, *recipe.shared.warnings, *models.warnings, *warnings])),
        notes=(
            *target.notices(dense, counts),
            *models.notes,
            *remarks,
            *licence_notes(cards),
            *(f"{m.reference.short}: {notice}" for m in models.models for notice in m.checkpoint.notices),
        ),
        recipe=recipe.text.text,
        recipe_name="mergekit_moe_config.yml",
        texts=tuple((path.name, path.read_text(encoding="utf-8")) for path in target.code),
        mixture=Mixture(target.title, positions, counts.per_token, config.gate_mode, how_shared),
        device=options.device,
        allow_nonfinite=options.allow_nonfinite,
        statistics=options.statistics,
        cards=cards,
        method_source=source_digest(recipe.shared.method),
        prepared_bytes=routers.nbytes + merged.nbytes,
    )
    return MoePlan(
        plan, models.tokenizer_of(0)[1], recipe, dense, dtype, target, routers, merged, prompts, shared, experts
    )


def _is_whole(made: Made) -> bool:
    """Whether a merge must see the whole tensor: a part of it would come out otherwise (angles, trimming, masks)."""
    if not isinstance(made.expression, Apply):
        return False
    form = get_method(made.expression.method).form
    return not (isinstance(form, Span) and not form.gram)


def _shared(recipe: MoeRecipe, models: Models, options: PlanOptions, dtype: DType) -> tuple[dict[str, Made], list[str]]:
    """Every tensor of the base that stays dense, merged as the recipe says; MLPs too, as place holders for experts."""
    merge = dataclasses.replace(
        recipe.shared, config=recipe.shared.config.model_copy(update={"dtype": dtype.name, "out_dtype": None})
    )
    base = None if merge.config.base_model is None else models.position(merge.config.base_model)
    view = dataclasses.replace(models, base=base)
    expresser = Expresser(merge, view, None, options.unsafe_truncate_embeddings)
    made = {}
    try:
        for slot in find_slots(merge, view).slots:
            tensor = None if slot.is_copy else expresser.make(slot)
            if tensor is not None:
                made[tensor.name] = tensor
                if isinstance(tensor.expression, Apply) and tensor.expression.weighting != "none":
                    raise recipe.fault("'weighting' is for merges of whole models; give weights instead", "attention")
    except RecipeError as error:  # it points into the merge recipe, which nobody wrote
        text = str(error).removeprefix(f"{error.place}: ").replace(_THERE, _HERE)
        raise recipe.fault(text, "attention") from None
    return made, expresser.all_warnings()


def _check_expert(recipe: MoeRecipe, dense: Dense, base: Model, model: Model, target: Target) -> None:
    """Refuse an expert that differs from the base in what the mixture has one of."""
    other = read_dense(model, target.accepts, target.title)
    if other.model_type != dense.model_type:
        raise recipe.fault(
            f"expert '{model.reference}' is a '{other.model_type}' model, but the base is a '{dense.model_type}'",
            *recipe.path_of(model.reference),
        )
    if recipe.config.attention != "base" and (other.heads, other.rope.partial) != (dense.heads, dense.rope.partial):
        raise recipe.fault(
            f"expert '{model.reference}' has other attention heads than the base; only 'attention: base' fits",
            *recipe.path_of(model.reference),
        )
    mine, theirs = base.tensors.get(base.embedding or ""), model.tensors.get(model.embedding or "")
    facts = [
        ("layers", dense.layers, other.layers),
        ("a hidden size of", dense.hidden, other.hidden),
        ("rows of embeddings", mine and mine.shape[0], theirs and theirs.shape[0]),
    ]
    for what, wanted, found in facts:
        if wanted != found:
            counted = (
                f"{what} {found}, but the base has {wanted}"
                if what.endswith("of")
                else (f"{found} {what}, but the base has {wanted}")
            )
            raise recipe.fault(
                f"expert '{model.reference}' has {counted}; experts must be fine-tuned from one base",
                *recipe.path_of(model.reference),
            )


def _expert(recipe: MoeRecipe, models: Models, number: int, position: int, dtype: DType, seed: int) -> dict[str, Made]:
    """The MLP tensors of one expert, by the base's names."""
    base, model = models[0], models[position]
    spelled = align(base.tensors, model.tensors)
    settings = recipe.config.experts[number]
    found = {}
    for name in filter(is_mlp, base.tensors):
        theirs = model.tensors.get(spelled.get(name, name))
        wanted = base.tensors[name]
        if theirs is None or theirs.shape != wanted.shape:
            has = "has no such tensor" if theirs is None else f"has {list(theirs.shape)}"
            raise recipe.fault(
                f"expert {number} ('{model.reference}') does not fit: {name} is {list(wanted.shape)} in the base, but "
                f"it {has}; experts must be fine-tuned from one base",
                *recipe.path_of(model.reference),
            )
        leaf: Leaf = leaf_of(models, position, theirs.name)
        if settings.noise_scale:
            leaf = Noise(leaf, settings.noise_scale, stream_key(seed, name, number))
        if settings.residual_scale is not None and name.endswith("down_proj.weight"):
            leaf = PermuteScale(leaf, (0,), (settings.residual_scale,))
        found[name] = Made(name, wanted.shape, dtype, cast(leaf, dtype))
    return found


def _dtype(recipe: MoeRecipe, base: Model) -> DType:
    """The element type of all of the output: the recipe's, else that of the base's config, else of its tensors."""
    text = recipe.config.dtype or base.config.get("torch_dtype") or base.config.get("dtype")
    found = recipe_dtype(text) if isinstance(text, str) else None
    return found or promote(info.dtype for info in base.tensors.values() if info.dtype.kind in ("float", "fp8"))


def _check_adapters(
    recipe: MoeRecipe, models: Models, positions: tuple[int, ...], left_out: Sequence[tuple[int, str, str]]
) -> list[str]:
    """What the mixture can't hold of its adapters: refused unless the recipe allows it, then warned of."""
    warnings = []
    for number, position in enumerate(positions):
        adapter = models[position].adapter
        lost = [] if adapter is None else [n for s, n, _ in left_out if s == len(models.models) + adapter]
        if not lost:
            continue
        modules = dict.fromkeys(re.split(r"\.(?:lora_|base_layer|weight$|bias$)", name)[0] for name in lost)
        kinds = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
        text = (
            f"expert {number} ('{models[position].reference}') has an adapter on {', '.join(kinds)} "
            f"({len(modules)} modules), which the mixture can't hold"
        )
        if not recipe.config.allow_partial_adapters:
            raise recipe.fault(
                f"{text}; write 'allow_partial_adapters: true' to leave that part out, or 'attention: average'",
                "experts", number, "source_model",
            )  # fmt: skip
        warnings.append(f"{text}: left out (allow_partial_adapters)")
    return warnings


def _prompts(recipe: MoeRecipe, number: int) -> PromptSet:
    """The prompts of an expert; files stand beside the recipe."""
    folder = Path() if recipe.text.node is None else Path(recipe.text.name).parent
    return prompt_set(recipe.config.experts[number], folder, lambda key: recipe.text.place(("experts", number, key)))


def _check_vocabularies(
    recipe: MoeRecipe, models: Models, positions: tuple[int, ...], made: Iterable[Made]
) -> list[str]:
    """Refuse to mix embeddings whose rows mean other words; warn of an expert that was trained on other ones."""
    mixed = {read.source for t in made if is_embedding(t.name) or is_head(t.name) for read in leaves(t.expression)}
    mine, warnings = _vocabulary(models.tokenizer_of(0)[1]), []
    for position in dict.fromkeys(positions):
        theirs = _vocabulary(models.tokenizer_of(position)[1])
        other = next((token for token, place in theirs.items() if mine.get(token, place) != place), None)
        if not mine or other is None:
            continue
        reference = models[position].reference
        text = (
            f"'{reference}' has another vocabulary than the base: {other!r:.40} is {theirs[other]}, not {mine[other]}"
        )
        if position in mixed:
            raise recipe.fault(f"{text}; their embeddings can't be merged", *recipe.path_of(reference))
        warnings.append(f"{text}; its MLPs were trained on other tokens")
    return warnings


def _vocabulary(folder: Path) -> Mapping[str, int]:
    """Token to id, as tokenizer.json has it; empty where there is none, or of another form."""
    path = folder / "tokenizer.json"
    record = read_json(path) if path.is_file() else {}
    model = record.get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    return found if isinstance(found, dict) else {}


def _lost_attention(models: Models, positions: tuple[int, ...], left_out: Sequence[tuple[int, str, str]]) -> list[str]:
    """A warning that names the experts of which only the MLPs are used."""
    lost = {position for position, _, reason in left_out if reason == _MLP_ONLY}
    others = [models[p].reference.short for p in dict.fromkeys(positions) if p != 0 and p in lost]
    if not others:
        return []
    return [
        f"attention, norms, embeddings and head do not come from {', '.join(others)}: what was learnt there is not in "
        f"the result ('attention: average' takes them from the experts)"
    ]


def _left_out(models: Models, made: Iterable[Made]) -> Iterator[tuple[int, str, str]]:
    """Every input tensor that goes nowhere, and why."""
    used = {(read.source, read.info.name) for tensor in made for read in leaves(tensor.expression)}
    for position, model in enumerate(models.models):
        for name, info in model.tensors.items():
            change = model.changes.get(name)
            if (position, name) in used or (change is not None and change.saved is not None):
                continue  # what an adapter brings instead is the adapter's
            if is_derived_buffer(name, info.shape):
                yield position, name, "a buffer that the config determines"
            elif is_mlp(name):
                yield position, name, "the layer's MLP is replaced by experts"
            else:
                yield position, name, _MLP_ONLY
    for number, name in unused_parts(models, used):
        yield number, name, "experts can't hold this part of the adapter"


def _tokenizer_digest(models: Models) -> list[str]:
    """What tells the tokenizer's files from others."""
    folder = models.tokenizer_of(0)[1]
    found = [path for name in sorted(TOKENIZER_FILES) if (path := folder / name).is_file()]
    return [f"{path.name} {blake2b(path.read_bytes(), digest_size=8).hexdigest()}" for path in found]


def _digest(recipe: MoeRecipe, plan_sources: tuple[Source, ...], facts: tuple[object, ...]) -> str:
    """What tells routers made from these models, prompts and settings from any others."""
    config = recipe.config
    sources = [[s.reference, [dataclasses.astuple(f) for f in s.files]] for s in plan_sources]
    settings = [config.gate_mode, config.apply_chat_template, config.experts_per_token, recipe.shared.config.to_yaml()]
    text = json.dumps([__version__, settings, sources, [str(fact) for fact in facts]])
    return blake2b(text.encode(), digest_size=8).hexdigest()
