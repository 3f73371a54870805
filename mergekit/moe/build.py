"""From a mixture's recipe to a plan: models opened and checked, tensors laid out as the target family has them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from mergekit.checkpoint import TensorInfo, build_header
from mergekit.dtypes import F32, DType, promote, recipe_dtype
from mergekit.families.align import align
from mergekit.families.config import set_dtype
from mergekit.families.layout import is_derived_buffer
from mergekit.moe.dense import Dense, is_mlp, read_dense
from mergekit.moe.layout import Layout
from mergekit.moe.prompts import PromptSet, hold_out, prompt_set
from mergekit.moe.recipe import MoeRecipe
from mergekit.moe.targets import Counts, Target
from mergekit.planning.agree import disagreements
from mergekit.planning.build import PlanOptions, sources_of
from mergekit.planning.document import donor_files
from mergekit.planning.express import Expresser, Made
from mergekit.planning.leaf import cast, leaf_of, patched
from mergekit.planning.models import Model, Models, open_models
from mergekit.planning.pack import pack
from mergekit.planning.plan import Leaf, Mixture, Noise, PermuteScale, Plan, Read, Source, leaves
from mergekit.planning.slots import find_slots
from mergekit.seeds import stream_key
from mergekit.version import __version__

__all__ = ["MoePlan", "RouterFile", "build_moe_plan"]


@dataclass(frozen=True, slots=True)
class RouterFile:
    """The prepared file of router rows: its name in the staging folder, and the shape [layers, experts, hidden].

    Tensor ``layer.{i}`` holds the float32 rows [experts, hidden] of layer i.
    """

    name: str
    layers: int
    experts: int
    hidden: int

    def layout(self) -> tuple[bytes, list[int]]:
        """The file's header, and where each layer's rows begin."""
        return build_header((f"layer.{i}", F32, (self.experts, self.hidden)) for i in range(self.layers))

    def read(self, source: int) -> Iterator[Read]:
        """A leaf for each layer's rows."""
        shape = (self.experts, self.hidden)
        for i, offset in enumerate(self.layout()[1]):
            yield Read(source, TensorInfo(f"layer.{i}", F32, shape, self.name, offset, math.prod(shape) * 4))


@dataclass(frozen=True, slots=True, eq=False)
class MoePlan:
    """A plan, and what is needed to make its routers: the dense model that a token meets before each router.

    ``shared`` holds the dense model that the experts share, MLPs included, by its own names; ``experts`` the MLPs of
    each expert by the same names. All are in the output's element type, ``dtype``. ``tokenizer`` is the folder of one
    that fits the embeddings.
    """

    plan: Plan
    tokenizer: Path
    recipe: MoeRecipe
    dense: Dense
    dtype: DType
    target: Target
    routers: RouterFile
    prompts: tuple[PromptSet, ...]
    shared: Mapping[str, Made]
    experts: tuple[Mapping[str, Made], ...]


def build_moe_plan(recipe: MoeRecipe, target: Target, options: PlanOptions) -> MoePlan:
    """Everything a run of ``recipe`` will do, from headers and small files only. Refuses what can't be done."""
    config = recipe.config
    models = open_models(
        recipe.references(),
        config.base_model,
        place=lambda reference: recipe.text.place(recipe.path_of(reference)),
        base_quantization=config.base_quantization,
        cache_dir=options.cache_dir,
        quiet=options.quiet,
        fetch=options.fetch,
    )
    dense = read_dense(models[0], target.accepts, target.title)
    positions = tuple(models.position(e.source_model) for e in config.experts)
    for position in dict.fromkeys(positions):
        _check_expert(recipe, dense, models[0], models[position], target)
    dtype = _dtype(recipe, models[0])
    seed = options.seed if options.seed is not None else config.seed or 0
    shared, warnings = _shared(recipe, models, options, dtype)
    experts = tuple(_expert(recipe, models, e, p, dtype, seed) for e, p in enumerate(positions))
    warnings += _check_adapters(recipe, models, positions)
    counts = Counts(len(experts), config.experts_per_token)
    sources = sources_of(models)
    prompts, remarks = hold_out([_prompts(recipe, e) for e in range(counts.experts)] if recipe.uses_prompts else [])
    digest = _digest(recipe, sources, (prompts, target.name, seed, dtype, options.device))
    routers = RouterFile(f"routers-{digest}.safetensors", dense.layers, counts.experts, dense.hidden)
    layout = Layout(dense, target, dtype)
    made = tuple(layout.tensors(models[0], shared, experts, list(routers.read(len(sources)))))
    outputs, shards, index = pack(made, options.shard_size)
    entries = target.config(dense, counts)
    set_dtype(entries, dtype)
    warnings += [*disagreements(models), *_remarks(recipe, models, positions)]
    copied = donor_files(models, tokenizer=options.copy_tokenizer)
    how_shared = config.attention if isinstance(config.attention, str) else config.attention.merge_method
    plan = Plan(
        version=__version__,
        method=recipe.shared.method.name,
        seed=seed,
        sources=(*sources, Source(f"routers {routers.name}", "routers", "", (), prepared=True)),
        base=0,
        donor=0,
        outputs=outputs,
        shards=shards,
        config=json.dumps(entries, indent=2, ensure_ascii=False) + "\n",
        index=index,
        files=tuple((source, name) for source, name in copied if not name.endswith(".py")),
        left_out=tuple(_left_out(models, made)),
        warnings=tuple(dict.fromkeys([*recipe.warnings, *recipe.shared.warnings, *models.warnings, *warnings])),
        notes=(
            *target.notices(dense, counts),
            *models.notes,
            *remarks,
            *(f"{m.reference.short}: {notice}" for m in models.models for notice in m.checkpoint.notices),
        ),
        recipe=recipe.text.text,
        recipe_name="mergekit_moe_config.yml",
        texts=tuple((path.name, path.read_text(encoding="utf-8")) for path in target.code),
        mixture=Mixture(target.title, positions, counts.per_token, config.gate_mode, how_shared),
        device=options.device,
        allow_nonfinite=options.allow_nonfinite,
    )
    return MoePlan(plan, models.tokenizer_of(0)[1], recipe, dense, dtype, target, routers, prompts, shared, experts)


def _shared(recipe: MoeRecipe, models: Models, options: PlanOptions, dtype: DType) -> tuple[dict[str, Made], list[str]]:
    """Every tensor of the base that stays dense, merged as the recipe says; MLPs too, as place holders for experts."""
    merge = dataclasses.replace(
        recipe.shared, config=recipe.shared.config.model_copy(update={"dtype": dtype.name, "out_dtype": None})
    )
    base = None if merge.config.base_model is None else models.position(merge.config.base_model)
    view = dataclasses.replace(models, base=base)
    expresser = Expresser(merge, view, options.unsafe_truncate_embeddings)
    made = {}
    for slot in find_slots(merge, view).slots:
        tensor = None if slot.is_copy else expresser.make(slot)
        if tensor is not None:
            made[tensor.name] = tensor
    return made, expresser.all_warnings()


def _check_expert(recipe: MoeRecipe, dense: Dense, base: Model, model: Model, target: Target) -> None:
    """Refuse an expert that differs from the base in what the mixture has one of."""
    other = read_dense(model, target.accepts, target.title)
    if other.model_type != dense.model_type:
        raise recipe.fault(
            f"expert '{model.reference}' is a '{other.model_type}' model, but the base is a '{dense.model_type}'",
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


def _check_adapters(recipe: MoeRecipe, models: Models, positions: tuple[int, ...]) -> list[str]:
    """What experts can't hold of their adapters: refused unless the recipe allows it, then warned of."""
    if recipe.config.attention != "base":
        return []
    warnings = []
    for number, position in enumerate(positions):
        outside = [name for name in patched(models[position]) if not is_mlp(name)]
        if position == 0 or not outside:
            continue
        modules = list(dict.fromkeys(name.removesuffix(".weight").rpartition(".")[2] for name in outside))
        text = (
            f"expert {number} ('{models[position].reference}') has an adapter on {', '.join(modules)} "
            f"({len(outside)} tensors), which experts can't hold"
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


def _remarks(recipe: MoeRecipe, models: Models, positions: tuple[int, ...]) -> list[str]:
    """What a user should know of a mixture that is about to be made."""
    found = []
    others = [models[p].reference.short for p in dict.fromkeys(positions) if p != 0]
    if recipe.config.attention == "base" and others:
        found.append(
            f"attention, norms, embeddings and head come from {models[0].reference.short}: what {', '.join(others)} "
            f"learnt there is not in the result ('attention: average' takes them from the experts)"
        )
    return found


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
                yield position, name, "experts give their MLPs only"
    for number, (_, adapter) in enumerate(models.adapters, start=len(models.models)):
        for patch in adapter.patches.values():
            for part in patch.tensors():
                if (number, part.name) not in used:
                    yield number, part.name, "experts can't hold this part of the adapter"


def _digest(recipe: MoeRecipe, plan_sources: tuple[Source, ...], facts: tuple[object, ...]) -> str:
    """What tells routers made from these models, prompts and settings from any others."""
    config = recipe.config
    sources = [[s.reference, [dataclasses.astuple(f) for f in s.files]] for s in plan_sources]
    settings = [config.gate_mode, config.apply_chat_template, config.experts_per_token, recipe.shared.config.to_yaml()]
    text = json.dumps([__version__, settings, sources, [str(fact) for fact in facts]])
    return blake2b(text.encode(), digest_size=8).hexdigest()
