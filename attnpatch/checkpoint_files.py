"""Checkpoints as files: weights read and written tensor by tensor, and what may be replaced.

Conversion copies every tensor that it does not replace byte for byte, whatever its dtype and whether or not the
model class knows it. Only a few megabytes are in memory at a time.
"""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnpatch.atomic import write_json
from attnpatch.errors import CheckpointError, one_line

CONFIG = "config.json"
MANIFEST = "attnpatch_manifest.json"
CARD = "README.md"
SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
OLD, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

CHUNK = 1 << 20
"""Bytes read and written at once. It has to stay in the cache: writing took 4 times as long in pieces of 16 MiB."""

# In the order in which the safetensors library sorts them; its files hold the last ones first.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}

_WEIGHT_SUFFIXES = {
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
}
_TRAINING_FILES = {"all_results.json", "complete.json", "eval_results.json", "train_results.json", "trainer_state.json"}
_NOT_COPIED = {CONFIG, CARD, MANIFEST, SAFE_INDEX, OLD_INDEX, "adapter_config.json", *_TRAINING_FILES}


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its name, dtype (as safetensors writes it), shape, file name, and its bytes.

    `chunks` gives the bytes piece by piece; a piece is good until the next one is asked for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    nbytes: int
    chunks: Callable[[], Iterator[Any]]

    def tensor(self) -> Tensor:
        """The tensor, in memory of its own."""
        raw = bytearray(self.nbytes)
        at = 0
        for chunk in self.chunks():
            raw[at : at + len(chunk)] = chunk
            at += len(chunk)
        if not raw:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(raw, dtype=DTYPES[self.dtype]).reshape(self.shape)

    def crc32(self) -> int:
        """CRC-32 of the bytes: finds damage, and is ten times as fast as a cryptographic digest."""
        crc = 0
        for chunk in self.chunks():
            crc = zlib.crc32(chunk, crc)
        return crc


def entry_of(name: str, tensor: Tensor, shard: str) -> Entry:
    """The entry of a tensor in memory; it is read when the entry is."""
    if tensor.dtype not in _NAMES:
        raise CheckpointError(f"tensor {name} has the dtype {tensor.dtype}, which safetensors cannot hold")

    def chunks() -> Iterator[Any]:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
        raw = memoryview(data)
        for at in range(0, len(raw), CHUNK):
            yield raw[at : at + CHUNK]

    nbytes = tensor.numel() * tensor.element_size()
    return Entry(name, _NAMES[tensor.dtype], tuple(tensor.shape), shard, nbytes, chunks)


@dataclass(frozen=True)
class Weights:
    """All tensors of a checkpoint by name. shards: file names in order; metadata: of the safetensors headers."""

    entries: Mapping[str, Entry]
    shards: tuple[str, ...]
    metadata: Mapping[str, str]
    sharded: bool
    header_crc32: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def dtype(self) -> str:
        """The floating-point dtype that most bytes have, as safetensors writes it ("F32")."""
        sizes: dict[str, int] = {}
        for entry in self.entries.values():
            if DTYPES[entry.dtype].is_floating_point:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        if not sizes:
            raise CheckpointError("the checkpoint holds no floating-point weights")
        return max(sizes, key=lambda name: sizes[name])


def open_weights(folder: Path) -> Weights:
    """Find the weight files of a folder, in transformers' order of preference, and read their headers.

    Raises:
        CheckpointError: there are none, one is missing, damaged, or holds code.
    """
    for single, index, read in ((SAFE, SAFE_INDEX, _read_safetensors), (OLD, OLD_INDEX, _read_bin)):
        if (folder / single).is_file():
            return _collect(folder, [single], None, read)
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{folder / index} is damaged: it has no weight_map")
            return _collect(folder, sorted(set(weight_map.values())), weight_map, read)
    raise CheckpointError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"{folder} holds a PEFT adapter and no model: merge it into its base model first"
    other = sorted(p.name for p in folder.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
    found = f"; it has only {', '.join(other[:4])}" if other else ""
    return f"{folder} has no weights: neither {SAFE} nor {OLD}, whole or in shards{found}"


def _collect(folder: Path, files: list[str], weight_map: Mapping[str, str] | None, read: Any) -> Weights:
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {"format": "pt"}
    crcs: dict[str, int] = {}
    shards = []
    seen: dict[Any, str] = {}
    for name in files:
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{folder}: its index names the shard {name!r}, which is not a plain file name")
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks the shard {name}, which its index names")
        shard = name.replace("pytorch_model", "model").removesuffix(".bin").removesuffix(".safetensors")
        shard += ".safetensors"
        shards.append(shard)
        found, held, crcs[shard] = read(path, shard, seen)
        entries.update(found)
        metadata.update(held)
    lost = sorted(name for name in weight_map or () if name not in entries and read is _read_safetensors)
    if lost:
        raise CheckpointError(f"{folder} is damaged: its shards lack {len(lost)} tensors of its index ({lost[0]}, ...)")
    return Weights(entries, tuple(shards), metadata, weight_map is not None, crcs)


def _read_safetensors(path: Path, shard: str, seen: Any) -> tuple[dict[str, Entry], dict[str, str], int]:
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks the header: its length, every dtype, and that the tensors fill the file exactly.
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            raw = file.read(length)
            header = json.loads(raw)
    except (SafetensorError, ValueError, struct.error) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} is damaged ({size:,} bytes; {one_line(error, 200)}): copy or download it again"
        ) from error
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has the dtype {about['dtype']}, which attnpatch cannot read")
        start, end = about["data_offsets"]
        chunks = _byte_range(path, 8 + length + start, end - start)
        entries[name] = Entry(name, about["dtype"], tuple(about["shape"]), shard, end - start, chunks)
    return entries, metadata, zlib.crc32(raw)


def _byte_range(path: Path, start: int, length: int) -> Callable[[], Iterator[memoryview]]:
    def chunks() -> Iterator[memoryview]:
        # One buffer for all pieces: fresh memory for each would cost more than the copying.
        buffer = memoryview(bytearray(min(CHUNK, length)))
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = length
            while left:
                count = file.readinto(buffer[: min(CHUNK, left)])
                if not count:
                    raise CheckpointError(f"{path} ends early: it changed while it was read")
                left -= count
                yield buffer[:count]

    return chunks


def _read_bin(path: Path, shard: str, seen: dict[Any, str]) -> tuple[dict[str, Entry], dict[str, str], int]:
    state = load_bin(path)
    entries = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} holds {name!r}, a {type(tensor).__name__}, where only tensors belong")
        # Tied weights stand in old files under each of their names; safetensors files have them once.
        storage = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and seen.setdefault(storage, name) != name:
            continue
        entries[name] = entry_of(name, tensor, shard)
    return entries, {}, 0


def load_bin(path: Path) -> dict[str, Any]:
    """The tensors of an old PyTorch file, without running what it may hold besides.

    Raises:
        CheckpointError: damaged, or not only tensors.
    """
    for mmap in (True, False):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            break
        except pickle.UnpicklingError as error:
            text = str(error)
            if "Unsupported" in text or "GLOBAL" in text or "not an allowed" in text or "WeightsUnpickler" in text:
                raise CheckpointError(
                    f"{path} holds code or objects besides weights, and attnpatch never runs what a checkpoint brings: "
                    "get the safetensors form, or convert the file in a place where you trust it"
                ) from error
            raise CheckpointError(f"{path} is damaged: {one_line(error, 200)}") from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, struct.error) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise  # the disk's fault and not the file's
            # Files older than PyTorch 1.6 cannot be mapped into memory.
            if mmap and "mmap" in str(error):
                continue
            raise CheckpointError(f"{path} is damaged: {one_line(error, 200)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, where a mapping of names to tensors belongs")
    return state


def write_weights(
    folder: Path,
    entries: Iterable[Entry],
    shards: Iterable[str],
    metadata: Mapping[str, str],
    sharded: bool,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write tensors into safetensors files, in the layout that the safetensors library gives them.

    Args:
        folder: where to. shards: the files; every entry names the one it goes to.
        sharded: whether an index is written as well.
        progress: called with the number of bytes after each piece.

    Returns:
        File name -> {"header_crc32", "tensors": {name: crc32}}.
    """
    by_shard: dict[str, list[Entry]] = {name: [] for name in shards}
    for entry in entries:
        by_shard[entry.shard].append(entry)
    by_shard = {name: held for name, held in by_shard.items() if held}
    sums: dict[str, Any] = {}
    for name, held in by_shard.items():
        held.sort(key=lambda entry: (-_RANK[entry.dtype], entry.name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        at = 0
        for entry in held:
            span = [at, at + entry.nbytes]
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
            at += entry.nbytes
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        crcs = {}
        # The checksum of a piece is formed while it is written; both leave the interpreter free.
        with (folder / name).open("wb") as file, ThreadPoolExecutor(1) as pool:
            file.write(struct.pack("<Q", len(raw)) + raw)
            for entry in held:
                crc = 0
                for chunk in entry.chunks():
                    checksum = pool.submit(zlib.crc32, chunk, crc)
                    file.write(chunk)
                    crc = checksum.result()
                    if progress is not None:
                        progress(len(chunk))
                crcs[entry.name] = crc
        sums[name] = {"header_crc32": zlib.crc32(raw), "tensors": crcs}
    if sharded:
        weight_map = {entry.name: name for name, held in by_shard.items() for entry in held}
        total = sum(entry.nbytes for held in by_shard.values() for entry in held)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / SAFE_INDEX, index)
    return sums


def changed_tensors(weights: Weights, manifest: Mapping[str, Any]) -> list[str]:
    """What in the weight files is not as the manifest has it: names of tensors and of files."""
    changed = []
    for shard, sums in manifest.get("files", {}).items():
        if weights.header_crc32.get(shard) != sums["header_crc32"]:
            changed.append(shard)
            continue
        for name, crc in sums["tensors"].items():
            entry = weights.entries.get(name)
            if entry is None or entry.crc32() != crc:
                changed.append(name)
    known = set(manifest.get("files", {}))
    return changed + [shard for shard in weights.shards if shard not in known]


def source_name(path: str | Path) -> str:
    """What a checkpoint is called in files that are published: its hub id, or the last part of a local path."""
    folder = Path(path).expanduser()
    parts = folder.resolve().parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):  # in the hub's cache
        return parts[-3].removeprefix("models--").replace("--", "/")
    if folder.is_dir() or looks_local(path):
        return folder.resolve().name
    return str(path)


def looks_local(path: str | Path) -> bool:
    """Whether a path that does not exist here can only have been meant for a folder, and not for a hub id."""
    text = str(path)
    return isinstance(path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `convert` noted about the files of a checkpoint; None where it wrote none."""
    path = folder / MANIFEST
    return read_json(path) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it is no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: not valid JSON ({one_line(error, 200)})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(data).__name__} where an object belongs")
    return data


def copy_small_files(source: Path, target: Path) -> list[str]:
    """Copy what belongs to a checkpoint besides weights, config and card: tokenizer, generation config, licence,
    and the modules of sentence-transformers. Returns the names."""
    copied = []
    for path in sorted(source.iterdir()):
        name = path.name
        if not path.is_file() or name.startswith(".") or name in _NOT_COPIED:
            continue
        # Code that a repository brings is never taken over, and a patched model never needs it.
        if path.suffix in _WEIGHT_SUFFIXES or path.suffix == ".py" or name.endswith(".index.json"):
            continue
        shutil.copyfile(path, target / name)
        copied.append(name)
    for part in _module_folders(source):
        # The parts after the transformer, such as 1_Pooling; a dense layer among them has weights of its own.
        shutil.copytree(source / part, target / part)
        copied.append(f"{part}/")
    return copied


def _module_folders(source: Path) -> list[str]:
    path = source / "modules.json"
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        parts = [str(module["path"]) for module in modules]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error, 200)}") from error
    return [part for part in parts if part and Path(part).name == part and (source / part).is_dir()]


def check_target(target: Path, force: bool, sources: Iterable[Path] = ()) -> None:
    """Refuse a target that would cost the user something.

    Raises:
        CheckpointError: it is a file, holds something and `force` is off, holds something else than a checkpoint,
            or is, contains or lies in a source.
    """
    place = target.resolve()
    for source in sources:
        other = source.resolve()
        if place == other:
            raise CheckpointError(f"source and target are the same folder, {target}; the source is never overwritten")
        if place.is_relative_to(other) or other.is_relative_to(place):
            raise CheckpointError(f"target {target} and source {source} lie in one another; choose another target")
    if not target.exists():
        if target.is_symlink():
            raise CheckpointError(f"target {target} is a link that leads nowhere")
        return
    if not target.is_dir():
        raise CheckpointError(f"target {target} is a file; a checkpoint is a folder")
    if not any(target.iterdir()):
        return
    if not force:
        raise CheckpointError(f"target {target} exists and is not empty; --force (force=True) replaces it")
    if not (target / CONFIG).is_file():
        raise CheckpointError(
            f"target {target} is not empty and holds no checkpoint ({CONFIG} is missing); it is not replaced even with "
            "--force: remove it yourself, or choose another target"
        )
