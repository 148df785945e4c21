"""The check of a SAM2 yaml: it may build networks of sam2 only, and is refused before that."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sam_poll.core.errors import ModelError
from sam_poll.engines import load, resolve, sam2

DEMO = Path(str(resolve("demo").config)).read_text()


def with_trunk(tmp_path: Path, trunk: str, more: str = "") -> Path:
    """Return a valid config except for `model.image_encoder.trunk`, YAML in one line."""
    config = yaml.safe_load(DEMO)
    config["model"]["image_encoder"]["trunk"] = yaml.safe_load(trunk)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False) + more)
    return path


@pytest.mark.parametrize(
    ("trunk", "key"),
    [
        ("{_target_: os.system, command: 'touch MARK'}", "model.image_encoder.trunk._target_"),
        ("{a: {b: {_target_: os.system}}}", "model.image_encoder.trunk.a.b._target_"),
        ("[1, [{_target_: os.system}]]", "model.image_encoder.trunk[1][0]._target_"),
        ("{_target_: os.system, _partial_: true}", "model.image_encoder.trunk._target_"),
        ("{_recursive_: false, x: {_target_: os.system}}", "model.image_encoder.trunk.x._target_"),
        ("{_target_: hydra.utils.call, x: 1}", "model.image_encoder.trunk._target_"),
        (
            "{_target_: hydra.utils.get_method, path: os.system}",
            "model.image_encoder.trunk._target_",
        ),
        ("{_target_: builtins.eval, _args_: ['1']}", "model.image_encoder.trunk._target_"),
        ("{_target_: 7}", "model.image_encoder.trunk._target_"),
        ("{_target_: null}", "model.image_encoder.trunk._target_"),
        ("{_target_: '???'}", "model.image_encoder.trunk._target_"),
        ("{_target_: '${name}'}", "model.image_encoder.trunk._target_"),
        ("'${other}'", "model.image_encoder.trunk._target_"),
        ("{_target_: '${oc.decode:${name}}'}", "model.image_encoder.trunk._target_"),
        # Names that begin with sam2 and lead out of it, or to something that is not a network.
        ("{_target_: sam2.build_sam.torch.hub.load}", "model.image_encoder.trunk._target_"),
        (
            "{_target_: sam2.modeling.backbones.hieradet.torch.load}",
            "model.image_encoder.trunk._target_",
        ),
        (
            "{_target_: sam2.modeling.backbones.hieradet.partial}",
            "model.image_encoder.trunk._target_",
        ),
        ("{_target_: sam2.build_sam.build_sam2}", "model.image_encoder.trunk._target_"),
        ("{_target_: sam2.benchmark.anything}", "model.image_encoder.trunk._target_"),
        ("{_target_: sam2x.modeling.Hiera}", "model.image_encoder.trunk._target_"),
        ("{_target_: sam2.modeling.nowhere.Hiera}", "model.image_encoder.trunk._target_"),
        ("{_target_: torch.nn.modules.activation.os.system}", "model.image_encoder.trunk._target_"),
        ("{_target_: torch.load}", "model.image_encoder.trunk._target_"),
        # sam2's Hiera would read this with torch.load.
        (
            "{_target_: sam2.modeling.backbones.hieradet.Hiera, weights_path: x.pt}",
            "trunk.weights_path",
        ),
        ("{_target_: sam2.modeling.backbones.hieradet.Hiera, _args_: [96]}", "trunk._args_"),
        # Text after the first resolution, an interpolation in the next.
        (r"'\${other}'", "model.image_encoder.trunk"),
    ],
)
def test_config_that_builds_anything_but_networks_is_refused_with_the_key(
    tmp_path: Path, trunk: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: object, **__: object) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr(sam2, "instantiate", built)
    monkeypatch.chdir(tmp_path)
    path = with_trunk(
        tmp_path, trunk, "name: os.system\nother: {_target_: os.system, command: 'touch MARK'}\n"
    )
    with pytest.raises(ModelError) as caught:
        sam2.read_config(path)
    assert caught.value.place == str(path)
    assert f"{key}`" in caught.value.reason
    assert caught.value.remedy
    assert [found.name for found in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("defaults", ["[other]", "[_self_, {model: big}]", "{a: b}"])
def test_config_whose_defaults_name_other_files_is_refused(tmp_path: Path, defaults: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: {defaults}\n{DEMO}")
    with pytest.raises(ModelError, match="defaults"):
        sam2.read_config(path)


def test_config_with_interpolations_torch_layers_and_extra_keys_is_accepted(tmp_path: Path) -> None:
    text = DEMO.replace("dim_feedforward: 128", "dim_feedforward: ${wide}")
    activation = "activation: {_target_: torch.nn.GELU, _partial_: true}"
    text = text.replace("      kernel_size: 3\n", f"      kernel_size: 3\n      {activation}\n")
    assert "GELU" in text
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: [_self_]\nwide: 128\n{text}")
    model = sam2.build(sam2.read_config(path), str(path))
    assert model.image_size == 256
    assert model.memory_attention.layers[0].linear1.out_features == 128


def test_load_reports_the_reason_of_a_refused_config(tmp_path: Path) -> None:
    demo = resolve("demo")
    path = with_trunk(tmp_path, "{_target_: os.system}")
    with pytest.raises(ModelError, match=r"trunk\._target_.*os\.system"):
        load(resolve(str(demo.checkpoint), config=str(path)), device="cpu", warmup=False)
