"""Hold models against each other, before merging them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit.api.comparison import Comparison, Spectrum
from mergekit.api.run import ready_kernels
from mergekit.errors import UsageError, some_of
from mergekit.refs import ModelReference

if TYPE_CHECKING:
    from mergekit.downloads import Told
    from mergekit.execute.compare import Sums
    from mergekit.planning.compare import Pairing

__all__ = ["compare_pairing", "diff", "pair"]


def diff(
    *models: str | Path | ModelReference,
    spectrum: bool = False,
    threads: int | None = None,
    cache_dir: Path | None = None,
) -> Comparison:
    """How ``models`` (two references or more, adapters included) differ from the first of them.

    Reads every weight once, in blocks; models on the hub are downloaded. ``spectrum``: also the singular values of each
    matrix's delta, which takes minutes for billions of parameters, and the memory of a few of its largest matrices.
    Raises a MergekitError if there is nothing to compare.
    """
    return compare_pairing(pair(*models, cache_dir=cache_dir), spectrum=spectrum, threads=threads)


def pair(
    *models: str | Path | ModelReference, cache_dir: Path | None = None, told: Told = lambda model, done, total: None
) -> Pairing:
    """The tensors of ``models`` that can be held against each other; the first step of ``diff``, reads headers only."""
    from mergekit.planning.compare import pair_models
    from mergekit.planning.locate import reference_of
    from mergekit.planning.models import open_models

    if len(models) < 2:
        raise UsageError("give two models or more; the others are held against the first")
    references = [m if isinstance(m, ModelReference) else reference_of(str(m)) for m in models]
    return pair_models(open_models(references, cache_dir=cache_dir, told=told))


def compare_pairing(
    pairing: Pairing,
    *,
    spectrum: bool = False,
    threads: int | None = None,
    on_compile: Callable[[list[str]], None] | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> Comparison:
    """The second step of ``diff``, which reads weights; ``advance`` is told of the bytes."""
    from mergekit.execute.compare import compare

    sums = tuple(compare(pairing, ready_kernels(["differences"], on_compile), threads=threads, advance=advance))
    return Comparison(
        models=pairing.names,
        layers=pairing.layers,
        places=pairing.places,
        sums=sums,
        remarks=(*pairing.remarks, *_damage(pairing, sums)),
        spectra=dict(_spectra(pairing)) if spectrum else {},
    )


def _damage(pairing: Pairing, sums: Sequence[Sums]) -> Iterator[str]:
    """A remark about the tensors that hold NaN or infinity."""
    import numpy as np

    bad = [p.name for p, s in zip(pairing.places, sums, strict=True) if not np.isfinite(s.products).all()]
    if bad:
        yield f"NaN or infinity in {len(bad)} tensors, so sums over them tell nothing: {some_of(bad)}"


def _spectra(pairing: Pairing) -> Iterator[tuple[str, Mapping[int, Spectrum]]]:
    from mergekit.execute.compare import spectra

    for place in pairing.places:
        if len(place.shape) == 2 and min(place.shape) > 1:
            yield place.name, {model: Spectrum.of(values) for model, values in spectra(pairing, place).items()}
