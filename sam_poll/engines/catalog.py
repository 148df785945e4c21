"""The catalogue of published checkpoints, their download, and the meaning of the `model:` setting.

Models of the Hugging Face hub are named `owner/name` (`hub`). A downloaded file gets its final name
only after its SHA-256 has been verified, so a file with that name is complete.

Limitations: a file that the publisher has moved cannot be downloaded (HTTP 404); a file that has
been damaged on disk since its download is found only by `verify`. Where no SHA-256 is published,
the one of the first download is kept beside the file and only later changes are noticed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sam_poll.core.errors import ModelError
from sam_poll.engines import hub
from sam_poll.engines.download import Progress, fetch, recorded_sha256, sha256_of

# The publishers' servers, as named in the READMEs of segment-anything and sam2, of sam-hq, and of
# MobileSAM.
BASE_URL = "https://dl.fbaipublicfiles.com/"
SAM_HQ_URL = "https://huggingface.co/lkeab/hq-sam/resolve/main/"
MOBILE_SAM_URL = "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/"
DEMO = Path(__file__).resolve().parent.parent / "data" / "demo"
CHECKPOINT_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, slots=True)
class Model:
    """A published checkpoint.

    `config` is the yaml packaged with sam2 (None for other families), `path` the file's path below
    `base`, the publisher's address. `size` is approximate, in bytes. `sha256` is None where none is
    published. `license` is the licence of the weights.
    """

    name: str
    family: str
    config: str | None
    path: str
    size: int
    sha256: str | None
    base: str = BASE_URL
    license: str = "Apache-2.0"

    @property
    def filename(self) -> str:
        """Return the file's name in the cache, which is the publisher's name."""
        return self.path.rsplit("/", 1)[-1]


def _sam1(size: str, tail: str, length: int, sha256: str) -> Model:
    return Model(
        f"sam_{size}", "sam1", None, f"segment_anything/sam_{size}_{tail}.pth", length, sha256
    )


def _sam2(version: str, size: str, letter: str, date: str, length: int, sha256: str) -> Model:
    name = f"sam{version}_hiera_{size}"
    config = f"configs/sam{version}/sam{version}_hiera_{letter}.yaml"
    return Model(name, "sam2", config, f"segment_anything_2/{date}/{name}.pt", length, sha256)


def _sam_hq(size: str, length: int, sha256: str | None) -> Model:
    name = f"sam_hq_{size}"
    return Model(name, "sam-hq", None, f"{name}.pth", length, sha256, base=SAM_HQ_URL)


# Sizes and hashes are those of published copies, on which several sources agree. A download is
# accepted by its hash; the size limits the download and feeds the progress bar. The sizes of SAM-HQ
# are those of the weights in float32, by the architecture.
_ALL = (
    _sam1(
        "vit_b",
        "01ec64",
        375042383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    _sam1(
        "vit_l",
        "0b3195",
        1249524607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    _sam1(
        "vit_h",
        "4b8939",
        2564550879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    _sam2(
        "2",
        "tiny",
        "t",
        "072824",
        155906050,
        "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125",
    ),
    _sam2(
        "2",
        "small",
        "s",
        "072824",
        184309650,
        "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3",
    ),
    _sam2(
        "2",
        "base_plus",
        "b+",
        "072824",
        323493298,
        "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071",
    ),
    _sam2(
        "2",
        "large",
        "l",
        "072824",
        897952466,
        "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b",
    ),
    _sam2(
        "2.1",
        "tiny",
        "t",
        "092824",
        156008466,
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
    ),
    _sam2(
        "2.1",
        "small",
        "s",
        "092824",
        184416285,
        "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
    ),
    _sam2(
        "2.1",
        "base_plus",
        "b+",
        "092824",
        323606802,
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
    ),
    _sam2(
        "2.1",
        "large",
        "l",
        "092824",
        898083611,
        "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
    ),
    _sam_hq(
        "vit_tiny",
        42355080,
        "0f32c075ccdd870ae54db2f7630e7a0878ede5a2b06d05d6fe02c65a82fb7196",
    ),
    _sam_hq("vit_b", 379227328, None),
    _sam_hq("vit_l", 1254705344, None),
    _sam_hq(
        "vit_h",
        2570745024,
        "a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35",
    ),
    Model(
        "mobile_sam",
        "mobile-sam",
        None,
        "mobile_sam.pt",
        40728226,
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        base=MOBILE_SAM_URL,
    ),
)
# Bytes at the end of a checkpoint that hold the whole directory of its zip archive.
_TAIL_BYTES = 1 << 20
MODELS: dict[str, Model] = {model.name: model for model in _ALL}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The model that `engines.load` is to load.

    `family` (`sam1`, `sam2`, `sam-hq`, `mobile-sam`, `edgetam`, `fake`) is None where the weights
    decide. `checkpoint` is a file, or a folder in the form of the Hugging Face hub; it is None for
    a model of the `hub`, whose folder `folder_or_file` finds. `config` is the path of a yaml, or
    one packaged with sam2 (`configs/sam2.1/sam2.1_hiera_t.yaml`), or None where the weights decide.
    `model_type` is a type of `sam1.check_type`. `sha256` is None where no hash is known. `download`
    is the argument of `sam-poll models download` that fetches the model, None where there is none.
    """

    name: str
    family: str | None = None
    checkpoint: Path | None = None
    config: str | None = None
    model_type: str | None = None
    sha256: str | None = None
    download: str | None = None
    hub: hub.HubModel | None = None


def resolve(
    model: str,
    *,
    config: str | None = None,
    model_type: str | None = None,
    cache_dir: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> ModelSpec:
    """Return the model that `model` names: a catalogue name, `demo`, a path, or a model of the hub.

    When `model` is empty, `MODEL` and `MODEL_CFG` of the environment count. No file is read or
    downloaded. A file without a known hash is allowed; `load` logs it.

    Raises ModelError where there is no such model.
    """
    env = os.environ if env is None else env
    if not model:
        model = env.get("MODEL", "")
        config = config or env.get("MODEL_CFG") or None
    if not model:
        raise ModelError(
            "no model is named",
            remedy="set `model:` to `demo`, to a catalogue name or to the path of a checkpoint",
        )
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
            download=model,
        )
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelSpec(path.resolve().name, None, path, config, model_type)
    of_hub = None if path.is_file() or path.suffix in CHECKPOINT_ENDINGS else hub.parse(model)
    if of_hub:
        known = hub.MODELS.get(of_hub.repo)
        family = known.family if known else None
        return ModelSpec(model, family, None, config, model_type, download=model, hub=of_hub)
    if path.is_file() or path.suffix in CHECKPOINT_ENDINGS or os.sep in model:
        family = None
        if config:
            family = "sam2"
        elif model_type:
            family = "sam-hq" if model_type.startswith("sam_hq") else "sam1"
        return ModelSpec(path.stem, family, path, config, model_type)
    raise ModelError(
        f"there is no model `{model}`",
        remedy=f"use one of {', '.join(['demo', *MODELS, *hub.MODELS])}, "
        "or the path of a checkpoint",
    )


def folder_or_file(spec: ModelSpec) -> Path | None:
    """Return where the model is, or would be: a file or a folder.

    None for a model of the hub that has not been downloaded, and for one without weights.
    """
    return hub.local_folder(spec.hub) if spec.hub else spec.checkpoint


def identity(spec: ModelSpec) -> str:
    """Return the model's name with a fingerprint of its weights: `NAME@HEX`.

    Where no hash is known, the fingerprint is computed from the file's length and its end, because
    a PyTorch file ends with a checksum of each tensor. That of a model of the hub is its commit.
    """
    fingerprint = spec.sha256
    path = folder_or_file(spec)
    if path and path.is_dir():
        fingerprint = hub.fingerprint(path)
    elif fingerprint is None and path and path.is_file():
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - _TAIL_BYTES))
            fingerprint = hashlib.sha256(f"{length} ".encode() + file.read()).hexdigest()
    return f"{spec.name}@{fingerprint[:16]}" if fingerprint else spec.name


def cache_dir(env: Mapping[str, str] | None = None) -> Path:
    """Return the folder of downloaded models.

    It is SAM_POLL_CACHE, else `sam_poll` in XDG_CACHE_HOME, else `~/.cache/sam_poll`.
    """
    env = os.environ if env is None else env
    if configured := env.get("SAM_POLL_CACHE"):
        return Path(configured).expanduser()
    return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "sam_poll"


def path_of(name: str, *, cache: Path | None = None, env: Mapping[str, str] | None = None) -> Path:
    """Return the path of the catalogue model `name` in the cache, downloaded or not."""
    return (cache or cache_dir(env)) / _entry(name).filename


def _entry(name: str) -> Model:
    if name not in MODELS:
        raise ModelError(
            f"there is no model `{name}` to download",
            remedy=f"use one of {', '.join([*MODELS, *hub.MODELS])}, "
            "or a model of the hub, `owner/name`",
        )
    return MODELS[name]


@dataclass(frozen=True, slots=True)
class Listed:
    """A model that can be downloaded, for `sam-poll models`. `size` is approximate, in bytes.

    `path` is where it is, None where it is not. `size` and `license` are None where only the hub
    knows them. `terms` are the limits of a licence that is not a free one.
    """

    family: str
    size: int | None
    license: str | None
    path: Path | None
    terms: str = ""


def listed(name: str) -> Listed:
    """Return what is known of a model that can be downloaded. Raises ModelError for others."""
    of_hub = None if name in MODELS else hub.parse(name)
    if not of_hub:
        entry = _entry(name)
        path = path_of(name)
        there = path if path.is_file() else None
        return Listed(entry.family, entry.size, entry.license, there)
    known = hub.MODELS.get(of_hub.repo)
    folder = hub.local_folder(of_hub)
    if known:
        return Listed(known.family, known.size, known.license, folder, known.terms)
    return Listed("", None, None, folder)


def download(
    name: str,
    *,
    cache: Path | None = None,
    base_url: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the path of a model, downloading and verifying it if need be.

    `name` is one of the catalogue, or of a model of the hub, which is a folder.

    `base_url` replaces the publisher's address. `progress` is called with the bytes done and the
    bytes in total. An interrupted download is continued by the next call. Raises ModelError.
    """
    of_hub = None if name in MODELS else hub.parse(name)
    if of_hub:
        return hub.download(of_hub, progress)
    entry = _entry(name)
    url = f"{(base_url or entry.base).rstrip('/')}/{entry.path}"
    return fetch(
        url,
        path_of(name, cache=cache),
        sha256=entry.sha256,
        size_hint=entry.size,
        progress=progress,
    )


class Verdict(Enum):
    """What is known of a file's hash, in words for the user."""

    PUBLISHED = "as published"
    RECORDED = "as first downloaded; no published hash is known"
    UNKNOWN = "no hash is known for it"
    DIFFERENT = "DIFFERENT"


def verify(model: Path | str) -> Verdict:
    """Compare the SHA-256 of a model's file with the catalogue's, or with its first download's.

    `model` is a catalogue name, a model of the hub, or a path. Raises ModelError where there is no
    file.
    """
    path: Path | None = Path(model)
    if isinstance(model, str):
        path = folder_or_file(resolve(model))
    if path and path.is_dir():
        return {True: Verdict.PUBLISHED, False: Verdict.DIFFERENT, None: Verdict.UNKNOWN}[
            hub.verify(path)
        ]
    if path is None or not path.is_file():
        raise ModelError(
            "there is no such file",
            place=str(path or model),
            remedy="download it with `sam-poll models download`",
        )
    published = {entry.filename: entry.sha256 for entry in MODELS.values()}.get(path.name)
    known = published or recorded_sha256(path)
    if not known:
        return Verdict.UNKNOWN
    if sha256_of(path) != known:
        return Verdict.DIFFERENT
    return Verdict.PUBLISHED if published else Verdict.RECORDED
