"""Read and write funnel.json: what each step of preparing text or rows kept and removed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.schema import Count, Finite, parse
from fastlm.sources.remote import StoreError, is_remote, read_small

FUNNEL = "funnel.json"
MAX_MESSAGES = 100  # about unreadable files and lines; all are counted


class StepCounts(TypedDict):
    """The documents that a step kept, and those it removed, by reason. Some steps add ``replaced``
    (scrub: personal data by kind), ``unsupported_types`` (gather: endings of files of other types),
    ``cut`` (extract: long documents and the parts they became), ``fallbacks`` (extract: pages that
    were not extracted as asked, by reason), ``limited`` (near duplicates: documents that were
    compared with the most similar candidates only) or ``repeated`` (mix: further copies).
    """

    step: str
    documents: Count
    bytes: Count
    removed: dict[str, Count]
    replaced: NotRequired[dict[str, Count]]
    unsupported_types: NotRequired[dict[str, Count]]
    cut: NotRequired[dict[str, Count]]
    fallbacks: NotRequired[dict[str, Count]]
    repeated: NotRequired[dict[str, Count]]
    limited: NotRequired[Count]


class SourceCounts(TypedDict):
    files: Count
    documents: Count
    bytes: Count


class MixCounts(TypedDict):
    """The documents of one source, language or quality bucket before the mix, and in the training
    part, where copies count.

    weight: as it was asked for. share, train_share: of all bytes, before the mix and in the
    training part. epochs: ``train_documents / documents``, so documents that are held out count as
    0.
    """

    weight: Finite
    documents: Count
    bytes: Count
    share: Finite
    train_documents: Count
    train_bytes: Count
    train_share: Finite
    epochs: Finite


@dataclass
class Funnel:
    """The counts of each step, and the clean text per source. JSON-serialisable.

    unit: the word for its "documents".
    """

    steps: list[StepCounts] = field(default_factory=list)
    sources: dict[str, SourceCounts] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)  # the first MAX_MESSAGES one-line reasons
    unit: str = "documents"
    # "sources", "languages" and "buckets", if documents were weighed -> name -> counts
    mix: dict[str, dict[str, MixCounts]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # about what may be wrong with the result

    @classmethod
    def load(cls, path: Path) -> "Funnel":
        """Read ``path``: funnel.json or its folder."""
        is_folder = path.suffix != ".json" if is_remote(path) else path.is_dir()
        path = path / FUNNEL if is_folder else path
        try:
            return parse(read_small(path), cls, str(path), extra="forbid")
        except StoreError:
            raise
        except InputError as e:
            if not is_remote(path) and not path.is_file():
                raise InputError(
                    f"{path}: expected the funnel of a prepared data folder, not found: is the "
                    "build finished (fastlm data prepare)?"
                ) from None
            raise InputError(
                f"{path}: expected the funnel of a prepared data folder: {e}"
            ) from None

    def add_skipped(self, message: str) -> None:
        """Keep the reason why something was skipped. Bytes of its names that are not UTF-8 are
        escaped.
        """
        if len(self.unreadable) < MAX_MESSAGES:
            self.unreadable.append(message.encode("utf-8", "backslashreplace").decode())
