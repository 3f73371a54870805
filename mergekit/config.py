"""The configuration classes under the name that notebooks import them from."""

from mergekit.recipe.schema import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
    ParameterSetting,
    ScalarOrGradient,
    TokenizerConfig,
)
from mergekit.recipe.settings import evaluate_setting
from mergekit.recipe.text import ConfigYamlDumper

__all__ = [
    "ConditionalParameter",
    "ConfigYamlDumper",
    "InputModelDefinition",
    "InputSliceDefinition",
    "MergeConfiguration",
    "OutputModuleDefinition",
    "OutputSliceDefinition",
    "ParameterSetting",
    "ScalarOrGradient",
    "TokenizerConfig",
    "evaluate_setting",
]
