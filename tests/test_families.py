"""Each model family: merged, every tensor accounted for, loaded by transformers without a remark."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mergekit.families.config import auto_class, layer_count
from mergekit.families.layout import infer_layout, is_head
from mergekit.methods import method_names
from mergekit.planning.models import Model
from tiny import FAMILIES, config_of, load_checked, merge, outputs_of, recipe_for, tensors_of, unaccounted

Tiny = Callable[..., Path]
ROTATION = list(zip(FAMILIES, cycle(method_names()), strict=False))


def check_merge(tiny: Tiny, family: str, method: str, out: Path) -> None:
    """Merge three models of ``family`` by ``method``: nothing is lost, and the result loads and computes."""
    models = [tiny(family, seed=seed) for seed in range(3)]
    plan = merge(recipe_for(method, models), out)
    assert not unaccounted(plan)
    assert not plan.left_out, "models of one family have no tensor without a place"
    assert not plan.warnings
    mine, theirs = tensors_of(out), tensors_of(models[0])
    assert {n: (t.shape, t.dtype) for n, t in mine.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    same = [name for name, tensor in mine.items() if tensor.numel() > 20 and torch.equal(tensor, theirs[name])]
    # Of small vectors arcee_fusion may take over no entry.
    same = [name for name in same if method != "arcee_fusion" or mine[name].ndim > 1]
    assert not same or method == "passthrough", f"equal to the first model's: {same}"
    model = load_checked(out, FAMILIES[family].auto_class)
    assert outputs_of(model, FAMILIES[family].reads).isfinite().all()


@pytest.mark.parametrize(("family", "method"), ROTATION)
def test_family_merges_whole_and_loads(tiny: Tiny, tmp_path: Path, family: str, method: str) -> None:
    check_merge(tiny, family, method, tmp_path / "out")


@pytest.mark.parametrize("method", method_names())
def test_every_method_merges_llama(tiny: Tiny, tmp_path: Path, method: str) -> None:
    check_merge(tiny, "llama", method, tmp_path / "out")


@pytest.mark.matrix
@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_every_method(tiny: Tiny, tmp_path: Path, family: str, method: str) -> None:
    check_merge(tiny, family, method, tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_average_of_a_model_with_itself_is_the_model(tiny: Tiny, tmp_path: Path, family: str) -> None:
    model = tiny(family)
    copy = shutil.copytree(model, tmp_path / "copy")
    merge(recipe_for("linear", [model, copy]), tmp_path / "out")
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    wanted, got = (
        outputs_of(load_checked(folder, FAMILIES[family].auto_class), FAMILIES[family].reads)
        for folder in (model, tmp_path / "out")
    )
    assert torch.equal(wanted, got)
    assert config_of(model) == config_of(tmp_path / "out")


CANNOT_TELL = {
    "albert": "all layers share one set of tensors",
    "blt": "four stacks and no layer count",
    "ctrl": "its embeddings are called 'w'",
    "flaubert": "its head is called 'pred_layer.proj'",
    "fsmt": "its head is a second embedding table",
    "hrm_text": "two stacks share the layers",
    "perceiver": "its embeddings belong to a preprocessor",
    "t5gemma": "we take the decoder's embeddings, which its head is tied to, for the model's",
    "xlm": "its head is called 'pred_layer.proj'",
}
"""What names alone don't show; such models still merge whole, tensor by tensor."""


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")  # of no interest here: models are built without weights and never used
@pytest.mark.parametrize("task", ["CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"])
def test_inference_agrees_with_transformers_on_every_architecture(task: str) -> None:
    """The layers, the embeddings and the head of each architecture that transformers can build from defaults."""
    classes = getattr(transformers.models.auto.modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    wrong, checked = {}, 0
    for model_type, name in classes.items():
        try:
            config = transformers.AutoConfig.for_model(model_type)
            with torch.device("meta"):
                model = getattr(transformers, name)(config)
        except Exception:  # needs packages or settings of its own
            continue
        checked += 1
        if found := disagreement(model, config.to_dict()):
            wrong[model_type] = found
    assert checked > 25
    assert {model_type: found for model_type, found in wrong.items() if model_type not in CANNOT_TELL} == {}


def disagreement(model: Any, config: dict[str, Any]) -> str:
    """Where inference from a model's names differs from the model itself ('' where it does not)."""
    names = list(model.state_dict())
    layout = infer_layout(names, config)
    mine = Model(None, None, config, dict.fromkeys(names), layout)  # type: ignore[arg-type]
    if layout.main is None or layer_count(config) not in (None, layout.main.count):
        return f"{layer_count(config)} layers, but {layout.main}"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embedding, head = weight_of(model.get_input_embeddings), weight_of(model.get_output_embeddings)
    if embedding is not None and parameters.get(mine.embedding or "") is not embedding:
        return f"the embeddings are not {mine.embedding}"
    if head is not None and not any(is_head(name) for name, parameter in parameters.items() if parameter is head):
        return f"the head is none of {[name for name in names if is_head(name)]}"
    return ""


def weight_of(ask: Callable[[], Any]) -> Any:
    """The weight of the module that ``ask`` gives; None if there is no such module."""
    try:
        return getattr(ask(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_that_loads_a_family_is_told(family):
    made = FAMILIES[family]
    config = transformers.AutoConfig.for_model(made.model_type, **made.sizes).to_dict()
    assert auto_class({**config, "architectures": [made.model_class]}) == made.auto_class
