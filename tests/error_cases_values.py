"""Errors of parameters: names and values that a method can't use."""

from __future__ import annotations

from error_cases_build import Case, Group, adds, changes, recipe

__all__ = ["GROUPS"]

BOTH = "base_model: models/a\nmodels: [{model: models/a}, {model: models/b}]\n"

VALUES = [
    Case(
        title="A parameter is misspelt",
        build=changes("weight: 1", "wieght: 1"),
        message="recipe.yml:4:18: 'linear' has no parameter 'wieght'. Did you mean 'weight'?",
        meaning="`mergekit methods linear` lists the parameters of a method.",
    ),
    Case(
        title="A parameter is missing",
        build=changes("    parameters: {weight: 1}\n", ""),
        message=(
            "recipe.yml:3:5: 'linear' needs 'weight' for models/a (tensor model.embed_tokens.weight); give it "
            "under the model's 'parameters', or at the top level"
        ),
        meaning="Give the value for the model, or for all models at the top level of the recipe.",
    ),
    Case(
        title="A value is not a number",
        build=changes("weight: 1", "weight: heavy"),
        message="recipe.yml:4:18: 'weight': expected a number, got 'heavy'",
        meaning="Write a number, a list of numbers (a gradient over the layers), or values with filters.",
    ),
    Case(
        title="A value is not finite",
        build=changes("weight: 1", "weight: .nan"),
        message="recipe.yml:4:18: 'weight': expected a finite number, got nan",
        meaning="NaN or infinity would spoil every tensor.",
    ),
    Case(
        title="A value is too large",
        build=changes("weight: 1", "weight: 1.0e+300"),
        message="recipe.yml:4:18: 'weight': 1e+300 is beyond what arithmetic in float32 can hold",
        meaning="Merges compute in float32.",
    ),
    Case(
        title="A value is out of its range",
        build=recipe(f"merge_method: star\n{BOTH}parameters: {{eta: 200}}\n"),
        message="recipe.yml:4:14: 'eta': 200 is outside number in [0, 100]",
        meaning="Give a value that the method allows: `mergekit methods star`.",
    ),
    Case(
        title="A value is not a whole number",
        build=recipe(f"merge_method: cabs\n{BOTH}parameters: {{weight: 1, n: 1.5, m: 4}}\n"),
        message="recipe.yml:4:25: 'n': expected a whole number, got 1.5",
        meaning="It counts things: write it without a fraction.",
    ),
    Case(
        title="A switch is neither true nor false",
        build=adds("parameters: {normalize: maybe}"),
        message="recipe.yml:7:14: 'normalize': expected true or false, got 'maybe'",
        meaning="Write `true` or `false`.",
    ),
    Case(
        title="A word is none of the choices",
        build=recipe(f"merge_method: ties\n{BOTH}parameters: {{weight: 1, weighting: megagpt}}\n"),
        message="recipe.yml:4:25: 'weighting': 'megagpt' is none of its values. Did you mean 'metagpt'?",
        meaning="Take one of the words that the method knows.",
    ),
    Case(
        title="A gradient holds a list",
        build=changes("weight: 1", "weight: [1, [2]]"),
        message="recipe.yml:4:30: a gradient is a list of scalars, not of lists",
        meaning="A gradient is one list of numbers, spread over the layers.",
    ),
    Case(
        title="The weights sum to zero",
        build=changes("weight: 1", "weight: -1"),
        message=(
            "recipe.yml:2:1: the weights sum to zero; change them, or set normalize: false (tensor "
            "model.embed_tokens.weight)"
        ),
        meaning="The average divides by the sum of the weights, unless it is told not to.",
    ),
    Case(
        title="The weights on a sphere sum to zero",
        build=recipe(
            "merge_method: multislerp\nmodels:\n  - {model: models/a, parameters: {weight: 1}}\n"
            "  - {model: models/b, parameters: {weight: -1}}\n"
        ),
        message=(
            "recipe.yml:2:1: the weights sum to zero; change them, or set normalize_weights: false (tensor "
            "model.embed_tokens.weight)"
        ),
        meaning="Multislerp divides by the sum of the weights, unless it is told not to.",
    ),
    Case(
        title="A tolerance is zero",
        build=recipe("merge_method: karcher\nmodels: [{model: models/a}, {model: models/b}]\nparameters: {tol: 0}\n"),
        message="recipe.yml:2:1: tol is 0; it must be greater than 0 (tensor model.embed_tokens.weight)",
        meaning="The iteration stops when a step is smaller than this.",
    ),
    Case(
        title="A small number is zero",
        build=recipe(
            "merge_method: multislerp\nmodels: [{model: models/a}, {model: models/b}]\n"
            "parameters: {weight: 1, eps: 0}\n"
        ),
        message="recipe.yml:2:1: eps is 0; it must be greater than 0 (tensor model.embed_tokens.weight)",
        meaning="It guards a division; the default is good.",
    ),
    Case(
        title="A density and its spread don't go together",
        build=recipe(f"merge_method: della\n{BOTH}parameters: {{weight: 1, density: 0.5, epsilon: 0.6}}\n"),
        message=(
            "recipe.yml:3:1: density 0.5 with epsilon 0.6 gives probabilities from -0.1 to 1.1, which must lie "
            "between 0 and 1; choose a smaller epsilon (tensor model.embed_tokens.weight)"
        ),
        meaning="`epsilon` is how far the probability of keeping an entry lies from `density`, to both sides.",
    ),
    Case(
        title="A group can't keep so many entries",
        build=recipe(f"merge_method: cabs\n{BOTH}parameters: {{weight: 1, n: 5, m: 4}}\n"),
        message=(
            "recipe.yml:3:1: n is 5 and m is 4: a group of 4 entries can't keep 5 (tensor model.embed_tokens.weight)"
        ),
        meaning="`n` of each `m` entries are kept.",
    ),
]
GROUPS = (Group("Values of parameters", "A method can't use what it is given.", VALUES),)
