"""From a `--source` to its pictures: the files it names, then what those that hold several pictures have inside."""

import codecs
import logging
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

from deedsr.errors import DeeDSRError, UsageError
from pipelines.distribution import in_threads
from pipelines.shards.source import DECODED, NoPictures, Source, is_picture, is_table, list_table, list_tar
from pipelines.storage import Entry, Storage, is_hidden, object_at, open_storage
from pipelines.storage.location import expanded, has_wildcard, matching, split_pattern

logger = logging.getLogger(__name__)
_THREADS = 16  # files looked into at a time
_AHEAD = 64  # files listed before the contents of one are needed
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BYTE_ORDER_MARKS = {  # what editors and shells of Windows begin a text with, the longer ones first
    **{codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"},
    **{codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"},
}


def list_sources(uris: Sequence[str]) -> Iterator[Source]:
    """Every picture of every `--source`, in an order that follows from their names.

    A source is a folder or S3 prefix (recursive), a list file (.txt) with a path or URI a line, a tar, a Parquet table,
    or a pattern of files (`*`, `?` and `[...]` within a name, `**` for any folders, `{a,b}` and `{000..127}`); what is
    called like a pattern is itself. Tars and tables are
    looked into wherever they are found; a table that names pictures elsewhere only where it is itself named. In folders
    and tars, hidden files and those not called like a picture are none. Raises UsageError for a source that does not
    exist or holds no picture.
    """
    if not uris:
        raise UsageError(
            "no source: give --source a folder, an S3 prefix, a list file (.txt), a tar or a Parquet table"
        )
    for root, uri in enumerate(uris):
        files, named = _files(root, uri)
        unused: list[str] = []
        empty = True
        for source in _looked_into(files, named, unused):
            yield source
            empty = False
        if empty:
            reason = f"; {unused[0]}" if unused else ""
            raise UsageError(f"source {uri} holds no pictures ({', '.join(DECODED)}){reason}")
        if unused:
            logger.warning("source %s: %d Parquet tables are not used: %s", uri, len(unused), unused[0])


def listed(uris: Sequence[str], pairs: Sequence[str], scale: int) -> Iterator[Source]:
    """`list_sources`, or `list_pairs` where there are `pairs`."""
    return list_pairs(uris, pairs, scale) if pairs else list_sources(uris)


def _files(root: int, uri: str) -> tuple[Iterable[Source], bool]:
    """Files of a source, and whether each was meant, not just found."""
    storage = open_storage(uri)
    folder, pattern = split_pattern(storage.uri)
    if pattern and has_wildcard(pattern):
        storage = open_storage(folder)
        found = [_file(root, storage, entry) for entry in matching(storage, pattern) if _named_as_pictures(entry.path)]
        if not found:
            raise UsageError(f"source {uri} matches no picture, tar or Parquet table")
        return found, True
    if pattern:
        return _stated(root, folder, [f"{folder.rstrip('/')}/{path}" for path in expanded(pattern)]), True
    local = storage.local_path("")
    if local is None or not local.is_dir():
        if uri.lower().endswith(".txt") and (local is not None or not any(True for _ in storage.list())):
            return _list_file(root, uri), True
        if uri.lower().endswith((".tar", ".parquet")) and (file := _single(root, storage.uri)):
            return [file], True
    return _folder(root, storage), False


def _folder(root: int, storage: Storage) -> Iterator[Source]:
    local = storage.local_path("")
    if local is not None and not local.exists():
        raise UsageError(f"source {storage.uri} does not exist")
    if local is not None and not local.is_dir():
        raise UsageError(
            f"source {storage.uri} is a file: give the folder it is in, or a list file (.txt) that names it"
        )
    found = (entry for entry in storage.list() if _named_as_pictures(entry.path) and not is_hidden(entry.path))
    return (_file(root, storage, entry) for entry in found)


def _named_as_pictures(path: str) -> bool:
    return is_picture(path) or path.lower().endswith((".tar", ".parquet", *_COMPRESSED))


def _file(root: int, storage: Storage, entry: Entry) -> Source:
    return Source(root, entry.path, f"{storage.uri.rstrip('/')}/{entry.path}", entry.size, entry.version)


def _single(root: int, uri: str) -> Source | None:
    storage, name = object_at(uri)
    try:
        entry = storage.stat(name)
    except FileNotFoundError:
        return None  # or a prefix that is called so
    return Source(root, posixpath.basename(name), uri, entry.size, entry.version)


def _list_file(root: int, uri: str) -> list[Source]:
    """Lines are relative to the list's folder, and name their sources as they are.

    If one is absolute or leads out of that folder, every source is named by its part below the common folder of all.
    """
    holder, name = object_at(uri)
    storage = open_storage(posixpath.dirname(uri) or ".")
    try:
        lines = [line for line in _text(holder.read(name)) if line.strip()]
    except FileNotFoundError:
        raise UsageError(f"source {uri} does not exist") from None
    except (UnicodeDecodeError, DeeDSRError) as error:
        raise UsageError(f"source {uri} is not a list file with one path or URI a line ({error})") from None
    if not lines:
        raise UsageError(f"source {uri} names no pictures: write one path or URI a line")
    absolute = [line.startswith("/") or "://" in line for line in lines]
    places = [
        open_storage(line if is_absolute else f"{storage.uri}/{line}").uri
        for line, is_absolute in zip(lines, absolute, strict=True)
    ]
    if len({place.startswith("s3://") for place in places}) > 1:
        raise UsageError(f"source {uri} mixes local files and S3 objects: write one list for each")
    parts = [place.split("/") for place in places]
    common = storage.uri.rstrip("/").split("/")
    if any(absolute) or any(part[: len(common)] != common for part in parts):
        common = list(os.path.commonprefix([part[:-1] for part in parts]))
    return _stated(root, "/".join(common), places)


def _text(data: bytes) -> list[str]:
    """Lines; a name that is not UTF-8 is kept as its bytes, and rejected by itself later."""
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data:
        raise DeeDSRError("it holds zero bytes")
    text = data.decode(encoding) if encoding else data.decode(errors="surrogateescape")
    return [line.removesuffix("\r") for line in text.split("\n")]  # `splitlines` would split names


def _stated(root: int, folder: str, places: list[str]) -> list[Source]:
    """The files at `places`, which lie below `folder`; those that don't exist have no version."""
    places = sorted(set(places))
    with ThreadPoolExecutor(_THREADS) as threads:
        return [
            Source(root, place[len(folder.rstrip("/")) + 1 :], place, entry.size, entry.version)
            for place, entry in zip(places, threads.map(_stat, places), strict=True)
        ]


def _stat(uri: str) -> Entry:
    storage, name = object_at(uri)
    try:
        return storage.stat(name)
    except FileNotFoundError:
        return Entry(name, 0, "")  # rejected with the reason when it is read


def _looked_into(files: Iterable[Source], named: bool, unused: list[str]) -> Iterator[Source]:
    """Pictures, and those inside tars and tables; `unused` collects the messages of tables without pictures."""
    # Not what is missing or unreadable, for which reading it gives the reason.
    is_container = lambda file: bool(file.version) and file.path.lower().endswith((".tar", ".parquet", *_COMPRESSED))
    for has_inside, run in groupby(files, key=is_container):
        if not has_inside:
            yield from run
            continue
        for found, problem in in_threads(lambda file: _inside(file, named), run, _THREADS, _AHEAD):
            unused += [problem] if problem else []
            yield from found


def _inside(file: Source, named: bool) -> tuple[Iterable[Source], str]:
    """The pictures in a container; for a table without any that was not itself named, why it has none."""
    container = file._replace(version=f"{file.size}-{file.version}", container=file.path)
    if file.path.lower().endswith(".tar"):
        return list_tar(container), ""
    if not is_table(file.path):
        return [file._replace(problem="compressed tar file: it must be unpacked")], ""
    try:
        return list_table(container, follow=named), ""
    except NoPictures as error:
        if named:
            raise
        return [], str(error)


# Canon_001_HR.png and Canon_001_LR4.png (RealSR), DSC_0970_x1.png and DSC_0970_x4.png (DRealSR), 0801.png and
# 0801x4.png, or 0801x4d.png (DIV2K), KEY.hr.png and KEY.lr.png (`deedsr evaluate`).
_HR_MARK = re.compile(r"(_(HR|x1)|\.hr)$", re.IGNORECASE)
_LR_MARK = re.compile(r"(_LR(\d?)|\.lr|_x([2-9])|(?<=\d)x([2-9])[dmw]?)$", re.IGNORECASE)


def list_pairs(
    hr_uris: Sequence[str], lr_dirs: Sequence[str], scale: int | None, option: str = "--pairs"
) -> Iterator[Source]:
    """The pictures of every `--source`, in `list_sources`' order, with their LR partners: real pairs.

    `lr_dirs`: one place for each of `hr_uris`, or one for all; it may be the same folder, or one inside of the other;
    `option` names it in messages. A partner has the same name, in the same folder below its place if there is one, else
    anywhere; without extension, and as it is or without the marks of RealSR, DRealSR and DIV2K, of which only those for
    `scale` count (None: all). An HR picture without partner is rejected; LR pictures without one are not sources, and
    their number is a warning. The listing is held in memory. Raises UsageError where a name has several partners or no
    name has any.
    """
    if len(lr_dirs) not in (1, len(hr_uris)):
        raise UsageError(
            f"{option}: give one place of LR pictures for all or one for each --source, not {len(lr_dirs)}"
        )
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
            raise UsageError(f"{option}: {lr_dir} holds {inside}: give folders of pictures, unpacked")
        partners |= matched(hrs, lrs, scale, option, lr_dir)
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


def matched(
    hrs: list[Source], lrs: list[Source], scale: int | None, option: str, lr_dir: str, versions: bool = False
) -> dict[Source, Source]:
    """The partner of each HR picture that has one: see `list_pairs`, whose errors and warning these are.

    `option` names what was given, `lr_dir`, in messages. `versions`: neither are LR pictures, so that every mark counts
    in both.
    """
    hr_left = {source: _any_name(source) if versions else _hr_name(source) for source in hrs}
    lr_left = {source: _any_name(source) if versions else _lr_name(source, scale) for source in lrs}
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
                        f"{option}: {pictures[0].uri} and {pictures[1].uri} could both be the partner of "
                        f"{(partners if pictures is several else several)[0].uri}: rename or remove one"
                    )
            found[several[0]] = partners[0]
            del hr_left[several[0]], lr_left[partners[0]]
    _report(hrs, lrs, found, scale, option, lr_dir)
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


def _lr_name(source: Source, scale: int | None) -> _Name:
    stem = _stem(source)
    mark = _LR_MARK.search(stem)
    bare = _LR_MARK.sub("", stem)
    scales = {group for group in mark.groups()[1:] if group} if mark else set()
    return _Name(posixpath.dirname(source.path), stem, bare if scale is None or scales <= {str(scale)} else None)


def _any_name(source: Source) -> _Name:
    name = _hr_name(source)
    return name._replace(bare=_LR_MARK.sub("", name.bare or ""))


def _stem(source: Source) -> str:
    return posixpath.splitext(posixpath.basename(source.path))[0]


def _outside(sources: Iterable[Source], folder: str, others: list[str]) -> list[Source]:
    """Those of a folder's pictures that are not in one of `others` inside of it."""
    inner = tuple(f"{other}/" for other in others if other.startswith(f"{folder}/"))
    return [source for source in sources if not source.uri.startswith(inner)] if inner else list(sources)


def _report(
    hrs: list[Source], lrs: list[Source], found: dict[Source, Source], scale: int | None, option: str, lr_dir: str
) -> None:
    if hrs and not found:
        example = f", such as {lrs[0].path} for {hrs[0].path}" if lrs else ""
        mark = scale or 4
        raise UsageError(
            f"{option}: no picture of {lr_dir} has the name of an HR picture{example}; names are equal, or end as in "
            f"Canon_001_HR.png and Canon_001_LR{mark}.png, DSC_0970_x1.png and DSC_0970_x{mark}.png, 0801.png and "
            f"0801x{mark}.png"
        )
    taken = set(found.values())
    alone = [source for source in lrs if source not in taken and _lr_name(source, scale).bare is not None]
    if alone:
        logger.warning(
            "%s: %d of %d pictures in %s have no HR partner and are not used, such as %s",
            option, len(alone), len(lrs), lr_dir, alone[0].path,
        )  # fmt: skip
