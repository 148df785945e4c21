"""Which models there are, where their files come from and go to, and what a user's `model:` means.

A downloaded file gets its final name only after its SHA-256 was right, so a file with that name is whole. What can
still go wrong here: the publisher moves a file (404), or the disk under the cache rots (`verify` tells).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sam_poll.engines.download import Progress, fetch, sha256_of
from sam_poll.errors import ModelError

BASE_URL = "https://dl.fbaipublicfiles.com/"
DEMO = Path(__file__).resolve().parent.parent / "data" / "demo"
CHECKPOINT_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, slots=True)
class Model:
    """A published checkpoint. `config` is sam2's packaged yaml (None for SAM1); `size` in bytes is a hint only."""

    name: str
    family: str
    config: str | None
    path: str
    size: int
    sha256: str

    @property
    def filename(self) -> str:
        """The file's name in the cache: the publisher's own."""
        return self.path.rsplit("/", 1)[-1]


def _sam1(size: str, tail: str, length: int, sha256: str) -> Model:
    return Model(f"sam_{size}", "sam1", None, f"segment_anything/sam_{size}_{tail}.pth", length, sha256)


def _sam2(version: str, size: str, letter: str, date: str, length: int, sha256: str) -> Model:
    name = f"sam{version}_hiera_{size}"
    config = f"configs/sam{version}/sam{version}_hiera_{letter}.yaml"
    return Model(name, "sam2", config, f"segment_anything_2/{date}/{name}.pt", length, sha256)


# Sizes and hashes: published copies, agreed by several sources; the hash decides, the size only feeds the progress bar.
_ALL = (
    _sam1("vit_b", "01ec64", 375042383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    _sam1("vit_l", "0b3195", 1249524607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    _sam1("vit_h", "4b8939", 2564550879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    _sam2("2", "tiny", "t", "072824", 155906050, "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125"),
    _sam2("2", "small", "s", "072824", 184309650, "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3"),
    _sam2(
        "2", "base_plus", "b+", "072824", 323493298, "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071"
    ),
    _sam2("2", "large", "l", "072824", 897952466, "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b"),
    _sam2("2.1", "tiny", "t", "092824", 156008466, "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"),
    _sam2("2.1", "small", "s", "092824", 184416285, "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"),
    _sam2(
        "2.1",
        "base_plus",
        "b+",
        "092824",
        323606802,
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
    ),
    _sam2("2.1", "large", "l", "092824", 898083611, "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"),
)
_END = 1 << 20  # bytes at the end of a file that hold the whole directory of a checkpoint
MODELS: dict[str, Model] = {model.name: model for model in _ALL}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What `engines.load` needs to know. `family` None: to be told from the weights.

    `config` is a yaml's path or one packaged with sam2 (`configs/sam2.1/sam2.1_hiera_t.yaml`); None: told from the
    weights. `sha256` is None where no hash is known.
    """

    name: str
    family: str | None = None
    checkpoint: Path | None = None
    config: str | None = None
    model_type: str | None = None
    sha256: str | None = None


def resolve(
    model: str,
    *,
    config: str | None = None,
    model_type: str | None = None,
    cache_dir: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> ModelSpec:
    """What `model` means: a catalogue name, `demo`, or a path; when empty, `MODEL` and `MODEL_CFG` of the environment.

    Nothing is read or downloaded here. A file without a known hash is allowed, and said in the log by `load`.
    """
    env = os.environ if env is None else env
    if not model:
        model = env.get("MODEL", "")
        config = config or env.get("MODEL_CFG") or None
    if not model:
        raise ModelError("no model is named", remedy="set `model:` to `demo`, a catalogue name or a checkpoint's path")
    if model == "fake":
        return ModelSpec("fake", "fake")
    if model == "demo":
        return ModelSpec("demo", "sam2", DEMO / "demo.pt", str(DEMO / "demo.yaml"))
    if model in MODELS:
        entry = MODELS[model]
        return ModelSpec(
            model,
            entry.family,
            path_of(model, cache=cache_dir, env=env),
            config or entry.config,
            model_type,
            entry.sha256,
        )
    path = Path(model).expanduser()
    if path.is_file() or path.suffix in CHECKPOINT_ENDINGS or os.sep in model:
        family = "sam2" if config else "sam1" if model_type else None
        return ModelSpec(path.stem, family, path, config, model_type)
    raise ModelError(
        f"there is no model `{model}`", remedy=f"use one of {', '.join(['demo', *MODELS])}, or a checkpoint's path"
    )


def identity(spec: ModelSpec) -> str:
    """A model's name with a number that changes with its weights.

    Where no hash is known it is made from the file's length and end: a file of PyTorch's ends with a checksum of each
    tensor.
    """
    number = spec.sha256
    if number is None and spec.checkpoint and spec.checkpoint.is_file():
        with spec.checkpoint.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - _END))
            number = hashlib.sha256(f"{length} ".encode() + file.read()).hexdigest()
    return f"{spec.name}@{number[:16]}" if number else spec.name


def cache_dir(env: Mapping[str, str] | None = None) -> Path:
    """Where downloaded models lie: SAM_POLL_CACHE, else sam_poll in XDG_CACHE_HOME, else ~/.cache/sam_poll."""
    env = os.environ if env is None else env
    if own := env.get("SAM_POLL_CACHE"):
        return Path(own).expanduser()
    return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "sam_poll"


def path_of(name: str, *, cache: Path | None = None, env: Mapping[str, str] | None = None) -> Path:
    """Where the catalogue model `name` lies, or would lie."""
    return (cache or cache_dir(env)) / _entry(name).filename


def _entry(name: str) -> Model:
    if name not in MODELS:
        raise ModelError(f"there is no model `{name}` to download", remedy=f"use one of {', '.join(MODELS)}")
    return MODELS[name]


def download(
    name: str, *, cache: Path | None = None, base_url: str = BASE_URL, progress: Progress | None = None
) -> Path:
    """The catalogue model `name` in the cache, downloaded and verified if it is not there yet. Raises ModelError.

    `progress` gets the bytes done and the bytes in all. A cut download is continued by the next call.
    """
    entry = _entry(name)
    url = f"{base_url.rstrip('/')}/{entry.path}"
    return fetch(url, path_of(name, cache=cache), sha256=entry.sha256, size_hint=entry.size, progress=progress)


def verify(model: Path | str) -> bool | None:
    """Whether a model's file has its known SHA-256. None: no hash is known for it. ModelError: there is no file."""
    path = path_of(model) if isinstance(model, str) and model in MODELS else Path(model)
    if not path.is_file():
        raise ModelError("there is no such file", place=str(path), remedy="download it with `sam-poll models download`")
    known = {entry.filename: entry.sha256 for entry in MODELS.values()}.get(path.name)
    return sha256_of(path) == known if known else None
