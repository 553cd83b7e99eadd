"""Results and adversarial images on disk, found again by content key.

```
ROOT/{crafts,cells}/<key[:2]>/<key>/
    record.json                     what the key stands for
    part-<digest>.safetensors       adversarial images, float32, one tensor per image id     (crafts)
    part-<digest>.parquet           rows, one per image                                      (cells)
    part-<digest>.json              which ids that shard holds
    note-<name>.json                small facts about the record (checks, timings)
```

A shard is written to a temporary file, flushed to the disk and then given its name, which carries the SHA-256 of its
bytes. So a shard is there completely or not at all, whatever kills the writer; damage shows on reading, and a damaged
shard is named, set aside (`.damaged`) and its ids count as missing. The `.json` beside a shard only spares opening it
and is rebuilt when it is lost. Nothing is ever changed in place, so any number of processes may write one record: ids
that two of them computed are simply there twice and one is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from bench.errors import StoreBusy, StoreError
from bench.keys import KEY_VERSION, plain

__all__ = ["Kind", "Record", "Store", "check_store"]

Kind = Literal["crafts", "cells"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SUFFIX: dict[str, str] = {"crafts": ".safetensors", "cells": ".parquet"}
_HEADER = "bench"
_PART = re.compile(r"part-(?P<digest>[0-9a-f]{32})(?P<suffix>\.[a-z]+)")
_KEY = re.compile(r"[0-9a-f]{64}")
_NOTE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_CHUNK = 1 << 20
_STALE_SECONDS = 3600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Shard:
    """What the index file of a shard says. `sequence` orders shards: a later writer saw the earlier ones."""

    path: Path
    sha256: str
    size: int
    ids: tuple[str, ...]
    sequence: int

    @property
    def order(self) -> tuple[int, str]:
        return (self.sequence, self.sha256)


class Store:
    """Records under one folder. Making a Store or a Record touches nothing; the folder appears with the first write.

    Args:
        root: the folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        # Contents this process has checked against their digest: path -> (size, mtime, inode).
        self._verified: dict[Path, tuple[int, int, int]] = {}

    def record(self, kind: Kind, key: str, payload: Mapping[str, Any]) -> Record:
        """The record of `key`, existing or not.

        Args:
            kind: "crafts" (images) or "cells" (rows).
            key: `bench.keys.content_key` of what the record depends on.
            payload: that same content, kept for `find`, `show` and `why`.
        """
        return Record(self, kind, key, payload)

    def find(self, kind: Kind) -> Iterator[str]:
        """Keys of the readable records of `kind`, sorted; those of another key version are left out."""
        for folder in self._folders(kind):
            if _read_record(folder) is not None:
                yield folder.name

    def payload(self, kind: Kind, key: str) -> dict[str, Any]:
        """What `key` stands for, in canonical form (`bench.keys.plain`).

        Raises:
            StoreError: there is no such record, or its record.json is damaged or of another key version.
        """
        folder = self._folder(kind, key)
        content = _read_record(folder)
        if content is None:
            raise StoreError(f"{folder}: no readable record of key version {KEY_VERSION}")
        payload: dict[str, Any] = content["payload"]
        return payload

    def check_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            StoreError: the root cannot be created or written, or the disk is full.
        """
        probe = self.root / f".tmp-{secrets.token_hex(8)}"
        _write_atomic(probe, b"bench\n")
        with contextlib.suppress(OSError):
            probe.unlink()

    def usage(self) -> dict[str, int]:
        """Bytes on disk of each kind."""
        return {kind: sum(_size(folder) for folder in self._folders(kind)) for kind in KINDS}

    def prune(self, keep: AbstractSet[str]) -> int:
        """Delete records whose key is not in `keep`, and what was set aside or left half-written in the others.

        A record that another process has locked is left alone, with a warning.

        Returns:
            Bytes freed.
        """
        freed = 0
        for kind in KINDS:
            for folder in self._folders(kind):
                freed += _sweep(folder, damaged=True)
                if folder.name in keep:
                    continue
                size = _size(folder)
                try:
                    with self.record(kind, folder.name, {}).lock(timeout=0):
                        shutil.rmtree(folder, ignore_errors=True)
                except StoreBusy:
                    _log.warning("%s is in use by another process and was kept", folder)
                    continue
                freed += size - (_size(folder) if folder.exists() else 0)
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()
        return freed

    def _folder(self, kind: Kind, key: str) -> Path:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if not _KEY.fullmatch(key):
            raise ValueError(f"a key is 64 hex digits, got {key!r}")
        return self.root / kind / key[:2] / key

    def _folders(self, kind: Kind) -> Iterator[Path]:
        for prefix in _children(self.root / kind):
            if len(prefix.name) != 2:
                continue
            for folder in _children(prefix):
                if _KEY.fullmatch(folder.name) and folder.name.startswith(prefix.name):
                    yield folder


def check_store(root: Path, absent: bool = False, instead: str = "") -> None:
    """Refuse what cannot hold results, rather than to show a grid as not run.

    Args:
        root: the folder.
        absent: it may be missing: nothing has to be in it yet.
        instead: what can be read without a store, for the message.

    Raises:
        StoreError: it is missing, or no folder.
    """
    if not root.exists():
        if not absent:
            without = f"; without a store there is {instead}" if instead else ""
            raise StoreError(
                f"--store: there is no folder {root}: run the grid first, or name its store{without}"
            )
    elif not root.is_dir():
        raise StoreError(f"--store: {root} is a file, expected the folder of a store")


class Record:
    """Images or rows by id, under one key. Made by `Store.record`.

    Attributes:
        kind, key, payload: as given to `Store.record`.
        path: its folder.
        warnings: one line for each damage met so far (also logged).
    """

    def __init__(self, store: Store, kind: Kind, key: str, payload: Mapping[str, Any]) -> None:
        self.kind = kind
        self.key = key
        self.payload = payload
        self.path = store._folder(kind, key)
        self.warnings: list[str] = []
        self._store = store
        self._shards: dict[str, _Shard] = {}
        self._foreign: set[str] = set()
        self._prepared = False
        self._lock: FileLock | None = None

    # -- what is there ------------------------------------------------------------------------------------------
    def done(self, verify: bool = True) -> set[str]:
        """Ids whose image or row is stored.

        Args:
            verify: check the bytes of every shard against its digest, once per process. Without it, only a wrong
                file size shows; use that for listings.
        """
        self._list()
        for shard in list(self._shards.values()):
            self._check_shard(shard, verify)
        return self._ids()

    def missing(self, ids: Iterable[str], verify: bool = True) -> list[str]:
        """Those of `ids` that are not `done`, in order."""
        done = self.done(verify)
        return [name for name in ids if name not in done]

    # -- images -------------------------------------------------------------------------------------------------
    def write_images(self, ids: Sequence[str], images: Tensor, info: Sequence[Mapping[str, Any]]) -> None:
        """Add one shard of images.

        Args:
            ids: one per image.
            images: (B, 3, H, W) float32, on any device; other calls may bring other sizes.
            info: one JSON-ready mapping per image (counts, steps, timings).

        Raises:
            StoreError: the disk is full or the folder cannot be written; nothing is left behind.
        """
        self._expect("crafts")
        if images.dtype != torch.float32 or images.ndim != 4:
            raise ValueError(f"images must be (B, 3, H, W) float32, got {tuple(images.shape)} {images.dtype}")
        if not len(ids) == len(images) == len(info):
            raise ValueError(f"{len(ids)} ids, {len(images)} images and {len(info)} infos do not match")
        if not ids:
            return
        _check_ids(ids)
        values = images.detach().cpu()
        tensors = {name: values[i].clone(memory_format=torch.contiguous_format) for i, name in enumerate(ids)}

        def encode(header: str) -> bytes:
            data: bytes = save_safetensors(tensors, {_HEADER: header})
            return data

        self._write_shard(ids, encode, {"info": [dict(entry) for entry in info]})

    def read_images(self, ids: Sequence[str]) -> tuple[Tensor, list[dict[str, Any]]]:
        """Images (B, 3, H, W) and infos of `ids`, in that order, exactly as written, on the CPU.

        Raises:
            StoreError: an id is not stored, or its shard has just turned out damaged.
            ValueError: the images have different sizes, so they are no batch.
        """
        self._expect("crafts")
        self._list()
        while True:
            wanted: dict[_Shard, list[str]] = {}
            for name, shard in self._sources(ids).items():
                wanted.setdefault(shard, []).append(name)
            # Ids of a shard that turns out damaged are looked up again: another shard may hold them too.
            if all(self._check_shard(shard, verify=True) for shard in wanted):
                break
        images: dict[str, Tensor] = {}
        infos: dict[str, dict[str, Any]] = {}
        for shard, names in wanted.items():
            try:
                with safe_open(shard.path, framework="pt") as file:
                    header = json.loads(file.metadata()[_HEADER])
                    place = {name: i for i, name in enumerate(header["ids"])}
                    for name in names:
                        images[name] = file.get_tensor(name)
                        infos[name] = header["info"][place[name]]
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise StoreError(
                    f"cannot read {shard.path}: {_reason(error)}; run the same command again"
                ) from error
        sizes = {tuple(image.shape) for image in images.values()}
        if len(sizes) > 1:
            raise ValueError(f"images of one batch must have one size, got {sorted(sizes)}")
        if not ids:
            return torch.empty(0, 3, 0, 0), []
        return torch.stack([images[name] for name in ids]), [infos[name] for name in ids]

    # -- rows ---------------------------------------------------------------------------------------------------
    def write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add one shard of rows.

        Args:
            rows: each has an "id" and flat values: None, bool, int, float, str. Rows may differ in their columns.

        Raises:
            StoreError: the disk is full or the folder cannot be written; nothing is left behind.
        """
        self._expect("cells")
        if not rows:
            return
        ids = [row["id"] for row in rows]
        _check_ids(ids)
        self._write_shard(ids, lambda header: _encode_rows(rows, header), {})

    def read_rows(self, ids: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Rows of `ids` in that order; of all stored ids, sorted by id, when None. Exactly as written, one per id.

        Raises:
            StoreError: an id is not stored, or its shard has just turned out damaged.
        """
        self._expect("cells")
        self._list()
        # Every read checks the digest of the very bytes it decodes; ids of a shard that fails are looked up again.
        while True:
            names = sorted(self._ids()) if ids is None else ids
            source = self._sources(names)
            found: dict[str, dict[str, Any]] = {}
            for shard in sorted(set(source.values()), key=lambda s: s.order):
                data = self._read_verified(shard)
                if data is None:
                    break
                found.update((row["id"], row) for row in _decode_rows(data) if source.get(row["id"]) == shard)
            else:
                return [dict(found[name]) for name in names]

    # -- the rest -----------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def lock(self, timeout: float = -1) -> Iterator[None]:
        """Hold the record for this process; it ends with the process, however that dies.

        Writing does not need it: it only keeps two processes from computing the same. A file system without locks
        gives a warning and no lock.

        Args:
            timeout: seconds to wait, -1 = for ever.

        Raises:
            StoreBusy: another process still holds it.
            StoreError: the folder cannot be written.
        """
        if self._lock is None:
            self._lock = FileLock(self.path / ".lock")
        with contextlib.ExitStack() as stack:
            try:
                _make_folder(self.path)
                stack.enter_context(self._lock.acquire(timeout=timeout))
            except Timeout:
                raise StoreBusy(f"{self.path} is in use by another process") from None
            except (NotImplementedError, OSError) as error:
                unsupported = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
                if isinstance(error, OSError) and error.errno not in unsupported:
                    raise StoreError(f"cannot write {self.path}: {_reason(error)}") from error
                _log.warning(
                    "%s: the file system has no locks; two processes may compute the same", self.path
                )
            yield

    def clear(self) -> None:
        """Delete all images, rows and notes.

        Raises:
            StoreError: a file cannot be deleted.
        """
        self._shards.clear()
        self._foreign.clear()
        self._prepared = False
        try:
            # Data files first: an index file without its shard holds nothing.
            names = sorted(_names(self.path), key=lambda name: (not name.endswith(_SUFFIX[self.kind]), name))
            for name in names:
                if name != ".lock":
                    (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot delete {self.path}: {_reason(error)}") from error

    def set_note(self, name: str, value: Any) -> None:
        """Keep a small JSON value under `name`, replacing what was there.

        Raises:
            StoreError: the disk is full or the folder cannot be written; the old value stays.
        """
        path = self._note_path(name)
        self._prepare()
        _write_atomic(path, _seal({"key_version": KEY_VERSION, "key": self.key, "value": value}))

    def note(self, name: str) -> Any:
        """The value of `set_note`, or None when there is none or it is damaged (then it is set aside and named)."""
        path = self._note_path(name)
        try:
            content = _unseal(path)
        except FileNotFoundError:
            return None
        except ValueError:
            self._set_aside(path, "its checksum does not match")
            return None
        if content.get("key_version") != KEY_VERSION or content.get("key") != self.key:
            return None
        return content["value"]

    # -- inside -------------------------------------------------------------------------------------------------
    def _expect(self, kind: Kind) -> None:
        if self.kind != kind:
            raise ValueError(f"{self.kind} hold no {'images' if kind == 'crafts' else 'rows'}")

    def _note_path(self, name: str) -> Path:
        if not _NOTE.fullmatch(name):
            raise ValueError(f"a note's name is made of letters, digits, '_', '-' and '.', got {name!r}")
        return self.path / f"note-{name}.json"

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        _log.warning("%s", message)

    def _prepare(self) -> None:
        """Make the folder and record.json, once per Record."""
        if self._prepared and self.path.is_dir():
            return
        _make_folder(self.path)
        _sweep(self.path, damaged=False)
        if _read_record(self.path) is None:
            self._write_record()
        self._prepared = True

    def _write_record(self) -> None:
        created = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
        }
        content = {
            "key_version": KEY_VERSION,
            "kind": self.kind,
            "key": self.key,
            "payload": plain(self.payload),
        }
        _write_atomic(self.path / "record.json", _seal({**content, "created": created}))

    def _write_shard(
        self, ids: Sequence[str], encode: Callable[[str], bytes], extra: Mapping[str, Any]
    ) -> None:
        self._prepare()
        self._list()
        sequence = 1 + max((shard.sequence for shard in self._shards.values()), default=0)
        header = {
            "key_version": KEY_VERSION,
            "key": self.key,
            "sequence": sequence,
            "ids": list(ids),
            **extra,
        }
        data = encode(json.dumps(header))
        digest = hashlib.sha256(data).hexdigest()
        path = self.path / f"part-{digest[:32]}{_SUFFIX[self.kind]}"
        _write_atomic(path, data, verify_folder=False)
        shard = _Shard(path, digest, len(data), tuple(ids), sequence)
        self._write_index(shard)
        _sync_folder(self.path)
        with contextlib.suppress(OSError):
            self._store._verified[path] = _signature(path)
        self._shards[path.name] = shard

    def _write_index(self, shard: _Shard) -> None:
        content = {
            "key_version": KEY_VERSION,
            "key": self.key,
            "file": shard.path.name,
            "sha256": shard.sha256,
            "bytes": shard.size,
            "sequence": shard.sequence,
            "ids": list(shard.ids),
        }
        # Not flushed: the shard can rebuild it.
        _write_atomic(shard.path.with_suffix(".json"), _seal(content), durable=False)

    def _ids(self) -> set[str]:
        return {name for shard in self._shards.values() for name in shard.ids}

    def _list(self) -> None:
        """Bring `_shards` up to date with the folder."""
        suffix = _SUFFIX[self.kind]
        names = set(_names(self.path))
        parts = {name for name in names if (match := _PART.fullmatch(name)) and match["suffix"] == suffix}
        for name in self._shards.keys() - parts:
            del self._shards[name]
        for name in sorted(parts - self._shards.keys() - self._foreign):
            self._load_shard(self.path / name)
        for name in sorted(names):
            match = _PART.fullmatch(name)
            if match and match["suffix"] == ".json" and f"{name.removesuffix('.json')}{suffix}" not in parts:
                # Listed before its shard was: look again, a writer may have been between the two.
                if not (self.path / name).with_suffix(suffix).exists():
                    self._set_aside(self.path / name, "the shard it describes is gone")
        if self._shards and not self._prepared:
            self._heal_record()

    def _heal_record(self) -> None:
        """Write record.json again when it was lost: the shards know their key, only the payload is missing."""
        self._prepared = True
        if not self.payload or _read_record(self.path) is not None:
            return
        try:
            self._write_record()
        except StoreError as error:
            self._warn(
                f"{self.path / 'record.json'} is missing or damaged and cannot be written again: {error}"
            )

    def _load_shard(self, path: Path) -> None:
        index = path.with_suffix(".json")
        try:
            content = _unseal(index)
            shard = _Shard(
                path, content["sha256"], content["bytes"], tuple(content["ids"]), content["sequence"]
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            rebuilt = self._index_from_shard(path)
            if rebuilt is None:
                return
            content, shard = rebuilt
        if content.get("key_version") != KEY_VERSION or content.get("key") != self.key:
            # Of another version, or copied here from another record: not ours, not damaged.
            self._foreign.add(path.name)
            return
        self._shards[path.name] = shard

    def _index_from_shard(self, path: Path) -> tuple[dict[str, Any], _Shard] | None:
        """The index of a shard whose index file is missing or damaged, from the shard itself."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {_reason(error)}") from error
        digest = hashlib.sha256(data).hexdigest()
        if path.name != f"part-{digest[:32]}{path.suffix}":
            self._set_aside(path, "its bytes do not match its name")
            return None
        header = _decode_header(self.kind, data)
        shard = _Shard(path, digest, len(data), tuple(header["ids"]), header["sequence"])
        if header.get("key_version") == KEY_VERSION and header.get("key") == self.key:
            try:
                self._write_index(shard)
            except StoreError as error:
                _log.warning("%s has no index file: %s", path, error)
        return header, shard

    def _check_shard(self, shard: _Shard, verify: bool) -> bool:
        """Whether the shard is there and sound; if not, it is forgotten, and set aside when damaged."""
        verified = self._store._verified
        try:
            signature = _signature(shard.path)
            if signature[0] != shard.size:
                return self._drop(shard, f"{signature[0]} bytes instead of {shard.size}")
            if verify and verified.get(shard.path) != signature:
                if _digest(shard.path) != shard.sha256:
                    return self._drop(shard, "its bytes do not match its checksum")
                verified[shard.path] = signature
        except FileNotFoundError:
            self._shards.pop(shard.path.name, None)
            return False
        except OSError as error:
            return self._unreadable(shard, error)
        return True

    def _read_verified(self, shard: _Shard) -> bytes | None:
        try:
            data = shard.path.read_bytes()
        except FileNotFoundError:
            self._shards.pop(shard.path.name, None)
            return None
        except OSError as error:
            self._unreadable(shard, error)
            return None
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            self._drop(shard, "its bytes do not match its checksum")
            return None
        return data

    def _drop(self, shard: _Shard, why: str) -> Literal[False]:
        self._shards.pop(shard.path.name, None)
        self._store._verified.pop(shard.path, None)
        self._set_aside(shard.path, why)
        return False

    def _unreadable(self, shard: _Shard, error: OSError) -> Literal[False]:
        if error.errno == errno.EIO:
            return self._drop(shard, "the disk cannot read it")
        raise StoreError(f"cannot read {shard.path}: {_reason(error)}") from error

    def _set_aside(self, path: Path, why: str) -> None:
        """Rename a damaged file (and a shard's index), so that it is neither read nor lost."""
        self._warn(f"{path} is damaged ({why}); what it held counts as missing and will be computed again")
        self._foreign.add(path.name)
        files = [path]
        if path.suffix == _SUFFIX[self.kind]:
            files.append(path.with_suffix(".json"))
        for file in files:
            try:
                file.replace(file.with_name(f"{file.name}.{secrets.token_hex(4)}.damaged"))
            except FileNotFoundError:
                continue
            except OSError as error:
                _log.warning("%s cannot be set aside: %s", file, _reason(error))
                return
        self._foreign.discard(path.name)

    def _sources(self, ids: Iterable[str]) -> dict[str, _Shard]:
        """The shard each id is read from: of several, the one of the last writer, by sequence and then by digest."""
        source: dict[str, _Shard] = {}
        for shard in sorted(self._shards.values(), key=lambda s: s.order):
            source.update(dict.fromkeys(shard.ids, shard))
        absent = [name for name in ids if name not in source]
        if absent:
            raise StoreError(
                f"{self.path} does not hold {len(absent)} of the ids asked for ('{absent[0]}' is the first); "
                "run the same command again to compute them"
            )
        return {name: source[name] for name in ids}


# -- rows as parquet ----------------------------------------------------------------------------------------------
def _encode_rows(rows: Sequence[Mapping[str, Any]], header: str) -> bytes:
    """Rows as parquet that gives back exactly these rows: keys, key order, types and None included.

    A column of one type is stored as that type, one of mixed types as JSON. What a table cannot say (which keys a row
    lacks, in which order it had them) goes into the metadata, so that a row never depends on its neighbours.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(name for row in rows for name in row))
    as_json: list[str] = []
    arrays = []
    for name in columns:
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        for kind in kinds - {bool, int, float, str}:
            raise TypeError(
                f"row column '{name}' holds a {kind.__name__}; expected None, bool, int, float or str"
            )
        if len(kinds) > 1 or (
            kinds == {int} and any(v is not None and not -(2**63) <= v < 2**63 for v in values)
        ):
            as_json.append(name)
            arrays.append(pa.array([None if v is None else json.dumps(v) for v in values], pa.string()))
        else:
            types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
            arrays.append(pa.array(values, types[kinds.pop()] if kinds else pa.null(), from_pandas=False))
    layouts: dict[tuple[str, ...], int] = {}
    layout = [layouts.setdefault(tuple(row), len(layouts)) for row in rows]
    shape = {
        "json": as_json,
        "layouts": [list(names) for names in layouts],
        "layout": layout if len(layouts) > 1 else None,
    }
    metadata = {_HEADER: header, f"{_HEADER}.rows": json.dumps(shape)}
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(arrays, names=columns).replace_schema_metadata(metadata), buffer, compression="zstd"
    )
    return buffer.getvalue()


def _decode_rows(data: bytes) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    shape = json.loads(table.schema.metadata[f"{_HEADER}.rows".encode()])
    columns = {name: table.column(i).to_pylist() for i, name in enumerate(table.column_names)}
    for name in shape["json"]:
        columns[name] = [None if value is None else json.loads(value) for value in columns[name]]
    layout = shape["layout"] or [0] * table.num_rows
    return [{name: columns[name][i] for name in shape["layouts"][which]} for i, which in enumerate(layout)]


def _decode_header(kind: Kind, data: bytes) -> dict[str, Any]:
    if kind == "crafts":
        length = int.from_bytes(data[:8], "little")
        text = json.loads(data[8 : 8 + length])["__metadata__"][_HEADER]
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = pq.read_schema(pa.BufferReader(data)).metadata[_HEADER.encode()]
    header: dict[str, Any] = json.loads(text)
    return header


def _check_ids(ids: Sequence[Any]) -> None:
    for name in ids:
        if not isinstance(name, str) or name in ("", "__metadata__"):
            raise ValueError(f"an id is a non-empty string, got {name!r}")
    if len(set(ids)) != len(ids):
        raise ValueError("ids must be unique")


# -- small JSON files ---------------------------------------------------------------------------------------------
def _seal(content: Mapping[str, Any]) -> bytes:
    """JSON with a checksum of its own inside."""
    text = json.dumps(content, sort_keys=True)
    sealed = {**json.loads(text), "checksum": hashlib.sha256(text.encode()).hexdigest()}
    return (json.dumps(sealed, sort_keys=True, indent=1) + "\n").encode()


def _unseal(path: Path) -> dict[str, Any]:
    """The content of a sealed file.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: it cannot be read.
        ValueError: it is damaged.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {_reason(error)}") from error
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object")
    checksum = content.pop("checksum", None)
    if hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() != checksum:
        raise ValueError(f"{path} does not match its checksum")
    return content


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's record.json; None when there is none, it is damaged, or of another key version."""
    path = folder / "record.json"
    try:
        content = _unseal(path)
    except FileNotFoundError:
        return None
    except ValueError:
        _log.warning("%s is damaged; the record is left out until it is written again", path)
        return None
    if content.get("key_version") != KEY_VERSION or content.get("key") != folder.name:
        return None
    return content


# -- files --------------------------------------------------------------------------------------------------------
def _write_atomic(path: Path, data: bytes, *, durable: bool = True, verify_folder: bool = True) -> None:
    """Give `path` the content `data`, completely or not at all.

    Args:
        path: file to write; its folder is made when missing.
        data: the bytes.
        durable: flush to the disk before the file gets its name.
        verify_folder: flush the folder as well (else the caller does).

    Raises:
        StoreError: one line naming the path.
    """
    attempts = 3
    for attempt in range(attempts):
        temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            temporary.replace(path)
            if durable and verify_folder:
                _sync_folder(path.parent)
            return
        except FileNotFoundError:
            # The folder was cleared or pruned by another process, or is not there yet.
            if attempt == attempts - 1:
                raise StoreError(f"cannot write {path}: its folder keeps disappearing") from None
            _make_folder(path.parent)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {_reason(error)}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot create {path}: {_reason(error)}") from error


def _sync_folder(path: Path) -> None:
    """Flush a folder, so that a rename in it survives a power failure; some file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sweep(folder: Path, damaged: bool) -> int:
    """Remove temporary files that a killed writer left, and on request what was set aside; returns bytes freed."""
    freed = 0
    now = time.time()
    for name in _names(folder):
        file = folder / name
        with contextlib.suppress(OSError):
            status = file.stat()
            # A living writer's file is younger; should it not be, the writer starts over.
            stale = name.startswith(".tmp-") and now - status.st_mtime > _STALE_SECONDS
            if stale or (damaged and name.endswith(".damaged")):
                file.unlink()
                freed += status.st_size
    return freed


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names, not paths: a record may have thousands of shards
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"cannot read {folder}: {_reason(error)}") from error


def _children(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(_names(folder))]


def _size(folder: Path) -> int:
    total = 0
    for name in _names(folder):
        with contextlib.suppress(OSError):
            total += (folder / name).stat().st_size
    return total


def _signature(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return (status.st_size, status.st_mtime_ns, status.st_ino)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return "no space left on the disk"
        if error.errno == errno.EDQUOT:
            return "the disk quota is used up"
        if error.strerror:
            return error.strerror
    return str(error) or type(error).__name__
