"""The plan of a merge: pure, frozen data that can be printed, hashed, pickled and sent to another machine."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from mergekit.checkpoint import FileIdentity
from mergekit.dtypes import DType
from mergekit.planning.expression import Expression, leaves
from mergekit.planning.input_cards import InputCards

__all__ = ["Mixture", "OutputTensor", "Plan", "Shard", "Source"]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the result: what computes it, and the file and absolute byte offset where it will stand."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    file: str
    offset: int
    nbytes: int
    expression: Expression


@dataclass(frozen=True, slots=True)
class Source:
    """One input: the reference as written, its folder, and the state of its weight files.

    ``prepared``: not a model but an artefact that the run itself makes first, in the staging folder; its reference
    holds a digest of everything that it is made from. ``adapter``: the adapter of a model, which is a source before it.
    """

    reference: str
    short: str
    folder: str
    files: tuple[FileIdentity, ...]
    pickled: bool = False
    prepared: bool = False
    adapter: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its final name, its header bytes, and its size."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a mixture is made of: its family, the source of each expert, and where routers and shared weights come from.

    ``shared`` is ``base``, ``average`` or the name of a merge method.
    """

    family: str
    experts: tuple[int, ...]
    per_token: int
    gate_mode: str
    shared: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run will do.

    ``files`` are the small files to copy: (source, name); ``texts`` are written as they are: (name, text).
    ``prepared_bytes`` is the size of what prepared sources take in the staging folder meanwhile.
    ``config`` and ``index`` are the JSON texts to write, ``recipe`` goes into the file ``recipe_name``;
    ``left_out`` lists input tensors that go nowhere, as (source, tensor, reason). ``device`` is part of the digest
    because accelerators agree with the CPU only within a tolerance. ``method_source`` is a digest of the code of a
    method that is not built in. ``statistics``: figures are gathered about each merged tensor. ``cards`` are those of
    the inputs as they were when the plan was made.
    """

    version: str
    method: str
    seed: int
    sources: tuple[Source, ...]
    base: int | None
    donor: int
    outputs: tuple[OutputTensor, ...]
    shards: tuple[Shard, ...]
    config: str
    index: str | None
    files: tuple[tuple[int, str], ...]
    left_out: tuple[tuple[int, str, str], ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    recipe: str
    recipe_name: str = "mergekit_config.yml"
    texts: tuple[tuple[str, str], ...] = ()
    mixture: Mixture | None = None
    prepared_bytes: int = 0
    device: str = "cpu"
    allow_nonfinite: bool = False
    rounding: str = "nearest"
    method_source: str = ""
    statistics: bool = False
    cards: InputCards = field(default_factory=InputCards)

    @property
    def bytes_written(self) -> int:
        """Size of all shards, in bytes."""
        return sum(shard.size for shard in self.shards)

    @property
    def bytes_read(self) -> int:
        """Bytes of every input tensor in use, each counted once per output tensor that uses it."""
        return sum(read.info.nbytes for output in self.outputs for read in leaves(output.expression))

    @property
    def parameters(self) -> int:
        """Number of elements of the result."""
        return sum(output.nbytes // output.dtype.size for output in self.outputs)

    def with_prepared(self, folder: Path) -> Plan:
        """The same plan, its prepared artefacts found in ``folder``."""
        sources = tuple(dataclasses.replace(s, folder=str(folder)) if s.prepared else s for s in self.sources)
        return dataclasses.replace(self, sources=sources)

    def identity(self) -> dict[str, str]:
        """Digests of the parts that a resumed run must share, by the word used in messages."""
        sources = [[s.reference, [dataclasses.astuple(f) for f in s.files]] for s in self.sources]
        work = [(o.name, o.file, o.offset, repr(o.expression), o.dtype.code) for o in self.outputs]
        options = [self.allow_nonfinite, self.rounding, self.method_source]
        parts = {
            "mergekit's version": self.version,
            "the device": self.device,
            "the input files": json.dumps(sources),
            "the recipe or its options": json.dumps([work, self.seed, self.config, *options]),
        }
        return {word: blake2b(text.encode(), digest_size=12).hexdigest() for word, text in parts.items()}

    def digest(self) -> str:
        """One digest over everything that decides the output's bytes."""
        return blake2b(json.dumps(self.identity()).encode(), digest_size=12).hexdigest()

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        from mergekit.planning.describe import plan_html

        return plan_html(self)
