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
    common_base: bool = True,
    spectrum: bool = False,
    threads: int | None = None,
    cache_dir: Path | None = None,
) -> Comparison:
    """How ``models`` (two references or more, adapters included) differ from the first of them.

    Reads every weight once, in blocks; models on the hub are downloaded. ``common_base``: the others were made from the
    first. ``spectrum``: also the singular values of each matrix's delta, which takes minutes for billions of
    parameters, and the memory of a few of its largest matrices. Raises a MergekitError if there is nothing to compare.
    """
    pairing = pair(*models, cache_dir=cache_dir)
    return compare_pairing(pairing, common_base=common_base, spectrum=spectrum, threads=threads)


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
    common_base: bool = True,
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
        rows=pairing.rows,
        places=pairing.places,
        sums=sums,
        remarks=(*pairing.remarks, *_damage(pairing, sums)),
        spectra=dict(_spectra(pairing, sums)) if spectrum else {},
        common_base=common_base,
    )


def _damage(pairing: Pairing, sums: Sequence[Sums]) -> Iterator[str]:
    """A remark about the tensors that hold NaN or infinity."""
    import numpy as np

    bad = [p.name for p, s in zip(pairing.places, sums, strict=True) if not np.isfinite(s.products).all()]
    if bad:
        yield f"sums over tensors with NaN or infinity tell nothing: {some_of(bad)}"


def _spectra(pairing: Pairing, sums: Sequence[Sums]) -> Iterator[tuple[str, Mapping[int, Spectrum]]]:
    """Those of matrices without NaN and infinity."""
    import numpy as np

    from mergekit.execute.compare import spectra

    for place, found in zip(pairing.places, sums, strict=True):
        if len(place.shape) == 2 and min(place.shape) > 1 and np.isfinite(found.products).all():
            yield place.name, {model: Spectrum.of(values) for model, values in spectra(pairing, place).items()}
