"""Real pairs: HR pictures and the LR pictures that a camera took of the same, matched by name."""

import logging
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from deedsr.errors import UsageError
from pipelines.shards.listing import list_sources
from pipelines.shards.source import Source
from pipelines.storage import open_storage

__all__ = ["list_pairs"]

logger = logging.getLogger(__name__)

# Canon_001_HR.png and Canon_001_LR4.png (RealSR), DSC_0970_x1.png and DSC_0970_x4.png (DRealSR), 0801.png and
# 0801x4.png, or 0801x4d.png (DIV2K).
_HR_MARK = re.compile(r"_(HR|x1)$", re.IGNORECASE)
_LR_MARK = re.compile(r"(_LR(\d?)|_x([2-9])|(?<=\d)x([2-9])[dmw]?)$", re.IGNORECASE)


def list_pairs(hr_uris: Sequence[str], lr_dirs: Sequence[str], scale: int) -> Iterator[Source]:
    """The pictures of every `--source`, in `list_sources`' order, with their LR partners: real pairs.

    `lr_dirs`: one place for each of `hr_uris`, or one for all; it may be the same folder, or one inside of the other.
    A partner has the same name, in the same folder below its place if there is one, else anywhere; without extension,
    and as it is or without the marks of RealSR, DRealSR and DIV2K, of which only those for `scale` count. An HR picture
    without partner is rejected; LR pictures without one are not sources, and their number is a warning. The listing
    is held in memory. Raises UsageError where a name has several partners or no name has any.
    """
    if len(lr_dirs) not in (1, len(hr_uris)):
        raise UsageError(f"--pairs: give one place of LR pictures for all or one for each --source, not {len(lr_dirs)}")
    sources = list(list_sources(hr_uris))
    folders = [open_storage(uri).uri for uri in hr_uris]
    used: set[Source] = set()
    partners: dict[Source, Source] = {}
    for number, lr_dir in enumerate(lr_dirs):
        roots = range(len(hr_uris)) if len(lr_dirs) == 1 else [number]
        lr_folder = open_storage(lr_dir).uri
        lrs = _outside(list_sources([lr_dir]), lr_folder, [folders[root] for root in roots])
        hrs: list[Source] = []
        for root in roots:
            here = _outside((s for s in sources if s.root == root), folders[root], [lr_folder])
            if folders[root] == lr_folder:
                here = [source for source in here if not _LR_MARK.search(_stem(source))]
                lrs = [source for source in lrs if _LR_MARK.search(_stem(source))]
            hrs += here
        used.update(hrs)
        if inside := next((source.container for source in lrs if source.container), None):
            raise UsageError(f"--pairs: {lr_dir} holds {inside}: give folders of LR pictures, unpacked")
        found = _matched(hrs, lrs, scale)
        _report(hrs, lrs, found, lr_dir, scale)
        partners |= found
    for source in sources:
        if source in partners:
            lr = partners[source]
            yield source._replace(lr=lr.uri, lr_version=f"{lr.size}-{lr.version}")
        elif source in used:
            yield source._replace(problem=source.problem or "no LR partner")


class _Name(NamedTuple):
    """What a picture is looked up by."""

    folder: str
    stem: str
    bare: str | None  # without its mark; None for an LR picture of another scale


def _matched(hrs: list[Source], lrs: list[Source], scale: int) -> dict[Source, Source]:
    """The partner of each HR picture that has one."""
    hr_left = {source: _hr_name(source) for source in hrs}
    lr_left = {source: _lr_name(source, scale) for source in lrs}
    found: dict[Source, Source] = {}
    keys: list[Callable[[_Name], tuple[str | None, ...]]] = [
        lambda name: (name.folder, name.stem),
        lambda name: (name.folder, name.bare),
        lambda name: (name.stem,),
        lambda name: (name.bare,),
    ]
    for key in keys:
        candidates = _grouped(lr_left, key)
        for name, several in _grouped(hr_left, key).items():
            partners = candidates.get(name)
            if not partners:
                continue
            for pictures in (several, partners):
                if len(pictures) > 1:
                    raise UsageError(
                        f"--pairs: {pictures[0].uri} and {pictures[1].uri} could both be the partner of "
                        f"{(partners if pictures is several else several)[0].uri}: rename or remove one"
                    )
            found[several[0]] = partners[0]
            del hr_left[several[0]], lr_left[partners[0]]
    return found


def _grouped(
    names: dict[Source, _Name], key: Callable[[_Name], tuple[str | None, ...]]
) -> dict[tuple[str | None, ...], list[Source]]:
    groups: dict[tuple[str | None, ...], list[Source]] = defaultdict(list)
    for source, name in names.items():
        groups[key(name)].append(source)
    return groups


def _hr_name(source: Source) -> _Name:
    stem = _stem(source)
    return _Name(posixpath.dirname(source.path), stem, _HR_MARK.sub("", stem))


def _lr_name(source: Source, scale: int) -> _Name:
    stem = _stem(source)
    mark = _LR_MARK.search(stem)
    scales = {group for group in mark.groups()[1:] if group} if mark else set()
    return _Name(posixpath.dirname(source.path), stem, _LR_MARK.sub("", stem) if scales <= {str(scale)} else None)


def _stem(source: Source) -> str:
    return posixpath.splitext(posixpath.basename(source.path))[0]


def _outside(sources: Iterable[Source], folder: str, others: list[str]) -> list[Source]:
    """Those of a folder's pictures that are not in one of `others` inside of it."""
    inner = tuple(f"{other}/" for other in others if other.startswith(f"{folder}/"))
    return [source for source in sources if not source.uri.startswith(inner)] if inner else list(sources)


def _report(hrs: list[Source], lrs: list[Source], found: dict[Source, Source], lr_dir: str, scale: int) -> None:
    if hrs and not found:
        example = f", such as {lrs[0].path} for {hrs[0].path}" if lrs else ""
        raise UsageError(
            f"--pairs: no picture of {lr_dir} has the name of an HR picture{example}; names are equal, or end as in "
            f"Canon_001_HR.png and Canon_001_LR{scale}.png, DSC_0970_x1.png and DSC_0970_x{scale}.png, 0801.png and "
            f"0801x{scale}.png"
        )
    taken = set(found.values())
    alone = [source for source in lrs if source not in taken and _lr_name(source, scale).bare is not None]
    if alone:
        logger.warning(
            "--pairs: %d of %d pictures in %s have no HR partner and are not used, such as %s",
            len(alone), len(lrs), lr_dir, alone[0].path,
        )  # fmt: skip
