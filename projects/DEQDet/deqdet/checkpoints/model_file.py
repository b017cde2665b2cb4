"""Model files: weights, config, class names and pixel format in one file, in a format that cannot hold code.

A model file is a .safetensors file. Everything but the tensors is in the header's metadata, a flat dict of strings:

    deqdet.format        "1", the version of this layout
    deqdet.version       the version of deqdet that wrote the file
    deqdet.config        the config as YAML, without keys that belong to one machine or run (LOCAL_KEYS)
    deqdet.classes       a JSON list of the class names
    deqdet.pixel_format  "RGB" or "BGR", the channel order of the model's input
    deqdet.sha256        a checksum of the tensors (name, dtype, shape and bytes) and the other metadata

and any notes of the writer, under other keys.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from detectron2.config import CfgNode, get_cfg

from ..config import add_deqdet_config
from ..config_keys import find_section, read_key
from ..data import number_classes
from ..errors import one_line
from ..extras import how_to_install
from ..version import __version__
from .files import CheckpointError, not_safetensors, read_file, write_safetensors

FORMAT = 1
OURS = "deqdet."  # prefix of the metadata keys that are not notes
PIXEL_FORMATS = ("RGB", "BGR")
# Properties of one machine or run, not of the model; they have their defaults when the file is loaded.
LOCAL_KEYS = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "MODEL.DEVICE",
    "MODEL.TRUST_PICKLE",
    "MODEL.TIMM.WEIGHTS",
    "DATASETS.REGISTER",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
    "WRITERS",
)
STATISTICS = (".running_mean", ".running_var")  # of BatchNorm; a variance may be far outside float16's range


@dataclass(frozen=True, kw_only=True)
class ModelHeader:
    """What the header of a model file says about the model."""

    config: str  # YAML
    class_names: tuple[str, ...]
    pixel_format: str  # "RGB" or "BGR"
    metadata: dict[str, str]  # the rest: deqdet.version, deqdet.format and notes
    source: str  # the file's path, for messages

    @property
    def known_names(self) -> tuple[str, ...]:
        """The class names, or an empty tuple if they are only the placeholders "class 0", "class 1", ... ."""
        return () if self.class_names == tuple(number_classes(len(self.class_names))) else self.class_names


@dataclass(frozen=True, kw_only=True)
class ModelFile(ModelHeader):
    """The contents of a model file."""

    weights: dict[str, Tensor]  # on the CPU; weights stored as float16 are converted to float32


def write_model_file(
    path: str | Path,
    *,
    weights: Mapping[str, Tensor],
    cfg: CfgNode,
    class_names: Sequence[str],
    half: bool = False,
    notes: Mapping[str, str] = {},
) -> None:
    """Write a model file atomically.

    Args:
        path: must end in .safetensors.
        weights: the model's state dict.
        cfg: the model's config.
        class_names: one for each of the model's classes, in the order of its outputs.
        half: store floating-point tensors, except for BatchNorm's running statistics, as float16.
        notes: further strings for the header.

    Raises:
        CheckpointError: the file cannot be written, class_names or INPUT.FORMAT do not fit the model, or `half` is
            given and a value is too large for float16 (names the tensor).
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} cannot be written: a model file's name must end in .safetensors")
    if len(class_names) != cfg.MODEL.DEQDET.NUM_CLASSES:
        raise CheckpointError(
            f"{len(class_names)} class names for a model of {cfg.MODEL.DEQDET.NUM_CLASSES} classes "
            "(MODEL.DEQDET.NUM_CLASSES): give one name for each class"
        )
    if cfg.INPUT.FORMAT not in PIXEL_FORMATS:
        raise CheckpointError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}: it must be RGB or BGR")
    if taken := [key for key in notes if key.startswith(OURS)]:
        raise ValueError(f"notes must not begin with {OURS!r}: {', '.join(taken)}")
    weights = {name: _to_half(name, x) if half else x for name, x in weights.items()}
    metadata = {
        **notes,
        f"{OURS}format": str(FORMAT),
        f"{OURS}version": __version__,
        f"{OURS}config": _portable_config(cfg),
        f"{OURS}classes": json.dumps(list(class_names), ensure_ascii=False),
        f"{OURS}pixel_format": cfg.INPUT.FORMAT,
    }
    write_safetensors(weights, path, metadata | {f"{OURS}sha256": _checksum(weights, metadata)})


def read_model_file(path: str | Path) -> ModelFile:
    """Read a model file and verify its checksum.

    Raises:
        CheckpointError: the file is missing, damaged or not a safetensors file, it has no config, or a newer
            version of deqdet wrote it.
    """
    with _opened(path) as (file, metadata):
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    written = metadata.pop(f"{OURS}sha256", None)
    if written != _checksum(weights, metadata):
        raise CheckpointError(f"{path} is damaged (its checksum does not match): download or publish it again")
    weights = {name: x.float() if x.dtype == torch.float16 else x for name, x in weights.items()}
    return ModelFile(weights=weights, **vars(_parse_header(path, metadata)))


def read_model_header(path: str | Path) -> ModelHeader:
    """Read what a model file says about its model, without reading the tensors.

    The checksum is not verified, since it covers the tensors. `read_model_file` does it when they are loaded.

    Raises:
        CheckpointError: as `read_model_file`, except that damaged tensors go unnoticed.
    """
    with _opened(path) as (_, metadata):
        metadata.pop(f"{OURS}sha256", None)
        return _parse_header(path, metadata)


def read_entries(path: Path) -> Mapping:
    """Read all entries of a model file or of any other checkpoint; those of a model file are its weights, as "model".

    Raises:
        CheckpointError: as `read_model_file` or `read_file`.
    """
    return {"model": read_model_file(path).weights} if is_model_file(path) else read_file(path)


def is_model_file(path: str | Path) -> bool:
    """Return whether a file is a model file according to its header; the tensors are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            return f"{OURS}format" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_model_config(header: ModelHeader) -> CfgNode:
    """Return the model's config; keys that belong to one machine or run (LOCAL_KEYS) have their defaults.

    The config is parsed by YAML's safe loader, which builds plain values only; detectron2's own loader would run code
    that a tag names.

    Raises:
        CheckpointError: the config is not YAML with plain values, or has a key or value that this version does not
            know.
    """
    source = header.source
    try:
        loaded = yaml.safe_load(header.config)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the config in {source} is not YAML with plain values: {one_line(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"the config in {source} is not a YAML mapping")
    cfg = get_cfg()
    add_deqdet_config(cfg)
    defaults = cfg.clone()
    check_keys(loaded, cfg, "", source)
    try:
        cfg.merge_from_other_cfg(CfgNode(loaded))
    except (AssertionError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the config in {source} has a value that does not fit: {one_line(error)}") from error
    for key in LOCAL_KEYS:  # which a file by another program may contain
        section, name = find_section(cfg, key)
        section[name] = read_key(defaults, key)
    return cfg


def check_keys(loaded: Mapping, known: CfgNode, prefix: str, source: str) -> None:
    """Check that the config has each loaded key, at every depth, except in sections that allow any key.

    Raises:
        CheckpointError: a key is unknown.
    """
    for key, value in loaded.items():
        if key not in known and not known.is_new_allowed():
            raise CheckpointError(
                f"the config in {source} has the unknown key {prefix}{key}: a newer version of deqdet wrote the file "
                "(update deqdet), or a plug-in added the key (plug-ins keep theirs under MODEL.DEQDET.PLUGIN)"
            )
        if isinstance(value, dict) and isinstance(known.get(key), CfgNode):
            check_keys(value, known[key], f"{prefix}{key}.", source)


def resolve_file(path_or_url: str) -> Path:
    """Return a local path unchanged, or download a file from the Hugging Face hub if it is not in the cache.

    Args:
        path_or_url: a path, or hf://OWNER/NAME[@REVISION][/FILE.safetensors]. FILE may include folders; the default is
            model.safetensors.

    Raises:
        CheckpointError: an hf:// name has another form, the package huggingface_hub is not installed, or the file
            cannot be downloaded.
    """
    if not path_or_url.startswith("hf://"):
        return Path(path_or_url)
    owner, _, rest = path_or_url.removeprefix("hf://").partition("/")
    repository, _, filename = rest.partition("/")
    name, _, revision = repository.partition("@")
    filename = filename or "model.safetensors"
    if not owner or not name or not filename.endswith(".safetensors") or ".." in filename.split("/"):
        raise CheckpointError(f"{path_or_url} is not of the form hf://OWNER/NAME[@REVISION][/FILE.safetensors]")
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(f"{path_or_url} needs the package huggingface_hub: {how_to_install('hub')}") from error
    try:
        found = huggingface_hub.hf_hub_download(
            repo_id=f"{owner}/{name}", filename=filename, revision=revision or None
        )
    except Exception as error:  # of the package, its HTTP library or the operating system
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{path_or_url} cannot be downloaded ({reason})") from error
    return Path(found)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[safe_open, dict[str, str]]]:
    """Open a model file, and give the file and its metadata, without safetensors' own entry "format".

    Raises:
        CheckpointError: the file cannot be read, or is not a model file that this version knows.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            _check_format(path, metadata)
            metadata.pop("format", None)
            yield file, metadata
    except (SafetensorError, OSError) as error:
        raise not_safetensors(Path(path), error) from error


def _parse_header(path: str | Path, metadata: Mapping[str, str]) -> ModelHeader:
    """Return the header, given all metadata but the checksum.

    Raises:
        CheckpointError: an entry is missing or wrong.
    """
    notes = dict(metadata)
    try:
        header = ModelHeader(
            config=notes.pop(f"{OURS}config"),
            class_names=tuple(map(str, json.loads(notes.pop(f"{OURS}classes")))),
            pixel_format=notes.pop(f"{OURS}pixel_format"),
            metadata=notes,
            source=str(path),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a model file that deqdet wrote ({one_line(error)})") from error
    if header.pixel_format not in PIXEL_FORMATS:
        found = header.pixel_format
        raise CheckpointError(f"{path} is not a model file that deqdet wrote (its pixel format is {found!r})")
    return header


def _check_format(path: str | Path, metadata: Mapping[str, str]) -> None:
    found = metadata.get(f"{OURS}format")
    if found is None:
        raise CheckpointError(f"{path} holds weights without a config: give --config-file with it")
    if not found.isdecimal():
        raise CheckpointError(f"{path} is not a model file that deqdet wrote (its format is {found!r})")
    if int(found) > FORMAT:
        raise CheckpointError(
            f"{path} has format {found}, but this version of deqdet reads formats up to {FORMAT}: update deqdet"
        )


def _portable_config(cfg: CfgNode) -> str:
    """Return the config as YAML, without LOCAL_KEYS."""
    plain = yaml.safe_load(cfg.dump())
    for key in LOCAL_KEYS:
        section, name = find_section(plain, key)
        section.pop(name, None)
    return yaml.safe_dump(plain)


def _to_half(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point() or name.endswith(STATISTICS):
        return value
    half = value.to(torch.float16)
    if not torch.equal(half.isfinite(), value.isfinite()):
        largest = value.abs()[value.isfinite()].max().item()
        raise CheckpointError(f"{name} has the value {largest:.6g}, too large for float16: publish it as float32")
    return half


def _checksum(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Compute the SHA-256 of the contents of a model file."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
