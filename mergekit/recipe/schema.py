"""The YAML language as pydantic models: the one place where recipes meet types. Unknown keys are refused.

The classes carry the names that notebooks import from ``mergekit.config``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mergekit.dtypes import recipe_dtype
from mergekit.errors import RecipeError
from mergekit.recipe.settings import setting_fault
from mergekit.refs import ModelReference

__all__ = [
    "ConditionalParameter",
    "InputModelDefinition",
    "InputSliceDefinition",
    "MergeConfiguration",
    "OutputModuleDefinition",
    "OutputSliceDefinition",
    "ParameterSetting",
    "ScalarOrGradient",
    "TokenizerConfig",
]


def _reference(value: object) -> ModelReference:
    try:
        return ModelReference.model_validate(value)
    except RecipeError as error:
        raise ValueError(str(error)) from None


def _setting(value: object) -> Any:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    elif isinstance(value, list):
        value = [v.model_dump() if isinstance(v, BaseModel) else v for v in value]
    fault = setting_fault(value)
    if fault:
        raise PydanticCustomError("setting", "{text}", {"path": fault[0], "text": fault[1]})
    return value


def _dtype(value: object) -> object:
    if isinstance(value, str) and recipe_dtype(value) is None:
        raise ValueError(f"no dtype '{value}'. Valid: bfloat16, float16, float32, float64.")
    return value


def _tokenizer_source(value: object) -> object:
    if not isinstance(value, (str, dict, ModelReference)):
        raise ValueError("expected union, base or a model")
    return value


def _reference_text(value: object) -> object:
    if isinstance(value, str):
        _reference(value)
    return value


def _whole(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "a whole number")
    return value


def _base_quantization(value: object) -> object:
    if value not in ("none", "nf4", "nf4-double", "fp4", "auto"):
        raise ValueError(f"no quantisation '{value}'. Valid: none, nf4, nf4-double, fp4, auto.")
    return value


def _rounding(value: object) -> object:
    if value not in ("nearest", "stochastic"):
        raise ValueError(f"no rounding '{value}'. Valid: nearest, stochastic.")
    return value


ScalarOrGradient = float | int | bool | str | list[float | int | bool | str]
Reference = Annotated[ModelReference, BeforeValidator(_reference), PlainSerializer(lambda r: r.dump(), return_type=Any)]
ParameterSetting = Annotated[Any, BeforeValidator(_setting)]
Parameters = dict[str, ParameterSetting]
Dtype = Annotated[str | None, BeforeValidator(_dtype)]
BaseQuantization = Annotated[str, BeforeValidator(_base_quantization)]
"""To what the models below adapters are quantised before the adapters are baked onto them."""
Rounding = Annotated[str, BeforeValidator(_rounding)]
"""How results become 16-bit numbers."""
Whole = Annotated[int, BeforeValidator(_whole)]
ReferenceText = Annotated[str, BeforeValidator(_reference_text)]
TokenizerSource = Annotated[Any, BeforeValidator(_tokenizer_source)]


class Strict(BaseModel):
    """A mapping of a recipe: keys that it does not declare are refused."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, ser_json_inf_nan="constants")


class ConditionalParameter(Strict):
    """A value for the tensors whose name contains ``filter`` (all, where there is none)."""

    value: Any
    filter: str | None = None


class InputModelDefinition(Strict):
    """One entry of ``models:``."""

    model: Reference
    parameters: Parameters | None = None


class InputSliceDefinition(Strict):
    """One source of an output slice: the layers ``layer_range = [start, end)`` of a model."""

    model: Reference
    layer_range: tuple[Whole, Whole]
    parameters: Parameters | None = None

    @field_validator("layer_range")
    @classmethod
    def _range(cls, value: tuple[int, int]) -> tuple[int, int]:
        start, end = value
        if not 0 <= start < end:
            raise ValueError(f"layer_range [{start}, {end}) is empty or negative; write [first, one past the last]")
        return value


class OutputSliceDefinition(Strict):
    """One entry of ``slices:``: sources of equal length, merged layer by layer."""

    sources: list[InputSliceDefinition] = Field(min_length=1)
    base_model: Reference | None = None
    parameters: Parameters | None = None
    residual_weight: float | None = None


class OutputModuleDefinition(Strict):
    """One entry of ``modules:``: a part of a model with its own slices or models."""

    slices: list[OutputSliceDefinition] | None = None
    models: list[InputModelDefinition] | None = None
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def _one_source(self) -> OutputModuleDefinition:
        if bool(self.slices) == bool(self.models):
            raise ValueError("a module needs exactly one of 'slices' and 'models'")
        return self


class TokenEntry(Strict):
    """What one token of the output vocabulary is made of."""

    source: Any = None
    force: bool = False


class TokenizerConfig(Strict):
    """The ``tokenizer:`` section."""

    source: TokenizerSource = "union"
    tokens: dict[str, TokenEntry] | None = None
    pad_to_multiple_of: Whole | None = Field(default=None, gt=0, le=1 << 16)


class MergeConfiguration(Strict):
    """A whole recipe. Exactly one of ``models``, ``slices`` and ``modules`` is given."""

    merge_method: str
    models: list[InputModelDefinition] | None = None
    slices: list[OutputSliceDefinition] | None = None
    modules: dict[str, OutputModuleDefinition] | None = None
    base_model: Reference | None = None
    parameters: Parameters | None = None
    input_model_parameters: dict[ReferenceText, Parameters] | None = None
    dtype: Dtype = None
    out_dtype: Dtype = None
    tokenizer_source: TokenizerSource | None = None
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None
    seed: Whole | None = Field(default=None, ge=0, lt=1 << 63)
    base_quantization: BaseQuantization = "none"
    rounding: Rounding = "nearest"

    @model_validator(mode="after")
    def _one_form(self) -> MergeConfiguration:
        given = [key for key in ("models", "slices", "modules") if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"both '{given[0]}' and '{given[1]}' are given; keep one of them")
        if not given:
            raise ValueError("nothing to merge: give 'models' or 'slices' with at least one entry")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("both 'tokenizer' and 'tokenizer_source' are given; keep one of them")
        return self

    def referenced_models(self) -> list[ModelReference]:
        """Every model of the recipe, once, in the order of first mention; the base is last unless mentioned."""
        found: dict[ModelReference, None] = {}
        parts: list[MergeConfiguration | OutputModuleDefinition] = [self, *(self.modules or {}).values()]
        for part in parts:
            for model in part.models or []:
                found.setdefault(model.model)
            for output in part.slices or []:
                for source in output.sources:
                    found.setdefault(source.model)
                if output.base_model is not None:
                    found.setdefault(output.base_model)
        if self.base_model is not None:
            found.setdefault(self.base_model)
        return list(found)

    def to_yaml(self) -> str:
        """The recipe as YAML, without what is default; lists of numbers stay on one line."""
        from mergekit.recipe.text import dump_yaml

        return dump_yaml(self.model_dump(exclude_defaults=True, mode="json"))
