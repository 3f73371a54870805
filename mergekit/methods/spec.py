"""What a merge method declares about itself. The declaration feeds validation, help, docs, model cards and tests."""

from __future__ import annotations

import keyword
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mergekit.errors import UsageError
from mergekit.methods.kinds import Choice, Flag, Integer, Kind, ParameterError, Real

__all__ = [
    "LAWS",
    "REQUIRED",
    "Choice",
    "Elementwise",
    "Flag",
    "Form",
    "Integer",
    "Law",
    "Method",
    "Parameter",
    "ParameterError",
    "Real",
    "Space",
    "Span",
    "Sparse",
    "Vectors",
    "Whole",
    "each",
    "ignored",
    "method",
    "once",
    "register",
]


class _Required:
    """The default of a parameter that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()
Scope = Literal["once", "each", "input"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One option of a method.

    ``scope`` says how many values there are: ``once`` one for the output tensor, ``each`` one for every model but
    the base, ``input`` one for every model. ``used`` is False for words that recipes carry but that change nothing.
    """

    name: str
    kind: Kind
    scope: Scope
    default: Any
    help: str
    used: bool = True

    @property
    def argument(self) -> str:
        """The keyword of the method's function: the name, with an underscore where Python reserves it."""
        return self.name + "_" if keyword.iskeyword(self.name) else self.name


def once(name: str, kind: Kind, default: Any = REQUIRED, *, help: str) -> Parameter:
    """Declare a parameter with one value for each output tensor."""
    return Parameter(name, kind, "once", default, help)


def each(name: str, kind: Kind, default: Any = REQUIRED, *, help: str, base: bool = False) -> Parameter:
    """Declare a parameter with a value for every model but the base (``base=True``: for every model)."""
    return Parameter(name, kind, "input" if base else "each", default, help)


def ignored(name: str, kind: Kind, *, help: str) -> Parameter:
    """Declare a word that recipes of arcee mergekit carry and that never changes a result."""
    return Parameter(name, kind, "once", None, help, used=False)


Space = Literal["weights", "deltas"]
"""What a function works on: the inputs themselves, or their differences from the base (which is added back)."""

Vectors = Literal["tensor", "rows", "columns"]
"""What counts as one vector: the whole tensor; each run along its last axis; each run along its first."""


@dataclass(frozen=True, slots=True)
class Span:
    """The result is a weighted sum of the inputs, whose coefficients may depend on their Gram matrix.

    The function is ``f(gram, **parameters) -> coefficients``. ``gram`` says whether it needs the Gram matrix (float64
    [n, n], which costs a first pass over the data); else it gets None. It returns float64 [n]. In the space of deltas
    n counts the models without the base.

    ``vectors``, called with the parameters, says what the vectors are, where that is not always the whole tensor.
    For rows or columns ``gram`` is [vectors, n, n] and the coefficients are [vectors, n], so a function that is to
    serve both indexes from the end: ``gram[..., 0, 1]``.
    """

    space: Space
    gram: bool = False
    vectors: Callable[..., Vectors] | None = None


@dataclass(frozen=True, slots=True)
class Sparse:
    """The result is the base plus a combination of sparsified deltas.

    The function is ``f(**parameters) -> SparseMerge`` and never sees a number of the models. A base is required.
    """

    space: Space = field(default="deltas", init=False)


@dataclass(frozen=True, slots=True)
class Elementwise:
    """Each element of the result depends on the same element of the inputs, and perhaps on sums over all elements.

    The function is ``f(xp, x, **parameters) -> result`` on chunks: ``x`` is a tuple of float32 arrays [count], of the
    deltas without the base, or of the inputs with the base first; ``xp`` is numpy or torch, and the function uses only
    what both have (``xp.abs``, ``xp.where``, ``xp.clip``, ``xp.sign``, arithmetic). It must not change ``x``.

    ``measure(xp, x, **parameters)`` returns sums over the chunk, an array [m]; the engine adds them up over the tensor
    in float64 and the function becomes ``f(xp, x, sums, **parameters)`` with ``sums`` float64 [m].

    ``key(xp, x, **parameters)`` and ``keep(nonzero, size, **parameters)`` select elements first: only the ``keep``
    elements of largest key are left (of ties, those of lower index), in all models; the others become zero in ``x``.
    ``nonzero`` counts the keys that are not zero. ``keep`` returns None, whatever the counts, to leave all elements as
    they are. Keys are not negative.
    """

    space: Space = "deltas"
    measure: Callable[..., Any] | None = None
    key: Callable[..., Any] | None = None
    keep: Callable[..., int | None] | None = None


@dataclass(frozen=True, slots=True)
class Whole:
    """The result is any function of whole tensors. The slowest form, and the one that needs memory.

    The function is ``f(x, **parameters) -> result``: ``x`` is a list of float32 torch tensors in their shape, of the
    deltas without the base, or of the inputs with the base first. It returns a tensor of that shape and does not
    change ``x``. ``workspace`` is how many float32 copies of the tensor it holds at most, beyond ``x`` and the result.
    ``seconds``, called with the shape, the number of tensors and the parameters, estimates its time on two processors.
    """

    space: Space = "deltas"
    workspace: float = 4.0
    seconds: Callable[..., float] | None = None


Form = Span | Sparse | Elementwise | Whole
Base = Literal["required", "optional", "ignored"]
Lone = Literal["pass", "merge", "skip"]
Law = Literal["equal", "zero", "dense", "symmetric", "deltas"]

LAWS: dict[Law, str] = {
    "equal": "inputs that are all the same give that tensor back",
    "zero": "weights of zero leave the base",
    "dense": "a density of 1 changes nothing before the deltas are combined",
    "symmetric": "the order of the models does not matter, but for rounding",
    "deltas": "the change depends on the deltas only; those of a ten-thousandth of the weights keep their direction",
}
"""What a method may promise. Each promise is held by the tests, and told in its reference."""


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method: its declaration and its function.

    ``base``: ``required`` (given to the function as the first input, or taken away from the others), ``optional``
    (the same where the recipe has one; else the method works on weights) or ``ignored`` (an ordinary input).
    ``least`` and ``most`` bound the number of inputs; the base counts unless it is optional. ``lone``: what to do with
    a tensor that one input has: ``pass`` it through; ``merge`` it like any other; or ``skip`` it, with a warning, if
    fewer inputs have it than the method takes. Where a base is required, a tensor that only the base has is passed.
    ``check``, called with the parameters while planning, raises ParameterError for values that don't go together.
    ``laws`` are promises of ``LAWS`` that hold for any parameters (``equal`` for weights that sum to one).
    ``without`` names options of delta methods that make no sense for it.
    """

    name: str
    title: str
    form: Form
    base: Base
    least: int
    most: int | None
    lone: Lone
    paper: str | None
    url: str | None
    params: tuple[Parameter, ...]
    function: Callable[..., Any]
    check: Callable[..., None] | None = None
    laws: tuple[Law, ...] = ()
    without: tuple[str, ...] = ()

    def parameter(self, name: str) -> Parameter | None:
        """The declared parameter called ``name``."""
        return next((p for p in (*self.params, *self.options) if p.name == name), None)

    def takes(self, count: int) -> bool:
        """Whether the method can merge ``count`` inputs, counted as ``least`` and ``most`` are."""
        return self.least <= count and (self.most is None or count <= self.most)

    @property
    def options(self) -> tuple[Parameter, ...]:
        """The options that every method of deltas takes: they change its result, not its function."""
        if self.base != "required" or self.form.space != "deltas":
            return ()
        weighted = any(p.name == "weight" for p in self.params)
        return tuple(p for p in DELTA_OPTIONS if p.name not in self.without and (weighted or p.name != "weighting"))

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


DELTA_OPTIONS: tuple[Parameter, ...] = (
    once(
        "lines_alpha",
        Real(),
        1.0,
        help="factor on the merged delta in the first layer and outside the layers (LiNeS, arXiv 2410.17146)",
    ),
    once("lines_beta", Real(), 0.0, help="what is added to that factor until the last layer"),
    once(
        "weighting",
        Choice(("none", "nan", "metagpt")),
        "none",
        help="multiply weights by each model's share: of the inverse lengths of the models' weights (NAN, arXiv "
        "2505.16148), or of the squared lengths of their task vectors (MetaGPT, arXiv 2406.11385)",
    ),
    once(
        "svc",
        Real(1e-6),
        None,
        help="calibrate the singular values of merged matrices (SVC, arXiv 2602.05536) with this alpha: 1 only shrinks "
        "directions that models share, less lets others grow; against the unweighted task vectors of the models whose "
        "weight is not 0, before lambda; needs torch",
    ),
)
F = TypeVar("F", bound=Callable[..., Any])
REGISTRY: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known. UsageError if another has its name, or the name is none."""
    if not isinstance(method.name, str) or not method.name.strip():
        raise UsageError(f"{method.name!r} is no name for a merge method")
    if method.name in REGISTRY:
        raise UsageError(f"a merge method called '{method.name}' is registered already")
    REGISTRY[method.name] = method


def method(
    name: str,
    *,
    form: Form,
    base: Base,
    params: list[Parameter],
    models: tuple[int, int | None] = (1, None),
    title: str | None = None,
    paper: str | None = None,
    url: str | None = None,
    lone: Lone = "merge",
    check: Callable[..., None] | None = None,
    laws: tuple[Law, ...] = (),
    without: tuple[str, ...] = (),
) -> Callable[[F], F]:
    """Register the decorated function as merge method ``name``; the function itself stays as it is.

    ``models`` is the least and the greatest number of inputs (None: any); the base counts unless it is optional. A
    second method of the same name is refused.
    """

    def decorate(function: F) -> F:
        register(
            Method(
                name=name,
                title=title or name,
                form=form,
                base=base,
                least=models[0],
                most=models[1],
                lone=lone,
                paper=paper,
                url=url,
                params=tuple(params),
                function=function,
                check=check,
                laws=laws,
                without=without,
            )
        )
        return function

    return decorate
