"""A model's yaml builds networks of sam2, and nothing else; it is refused before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sam_poll.engines import load, resolve, sam2
from sam_poll.errors import ModelError

DEMO = Path(str(resolve("demo").config)).read_text()


def with_trunk(tmp_path: Path, trunk: str, more: str = "") -> Path:
    """A config that is right but for `model.image_encoder.trunk`, a YAML value in one line, and other keys."""
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
        ("{_target_: hydra.utils.get_method, path: os.system}", "model.image_encoder.trunk._target_"),
        ("{_target_: builtins.eval, _args_: ['1']}", "model.image_encoder.trunk._target_"),
        ("{_target_: 7}", "model.image_encoder.trunk._target_"),
        ("{_target_: null}", "model.image_encoder.trunk._target_"),
        ("{_target_: '???'}", "model.image_encoder.trunk._target_"),
        ("{_target_: '${name}'}", "model.image_encoder.trunk._target_"),
        ("'${other}'", "model.image_encoder.trunk._target_"),
        ("{_target_: '${oc.decode:${name}}'}", "model.image_encoder.trunk._target_"),
        # Names that begin with sam2 and lead out of it, or to what is no network.
        ("{_target_: sam2.build_sam.torch.hub.load}", "model.image_encoder.trunk._target_"),
        ("{_target_: sam2.modeling.backbones.hieradet.torch.load}", "model.image_encoder.trunk._target_"),
        ("{_target_: sam2.modeling.backbones.hieradet.partial}", "model.image_encoder.trunk._target_"),
        ("{_target_: sam2.build_sam.build_sam2}", "model.image_encoder.trunk._target_"),
        ("{_target_: sam2.benchmark.anything}", "model.image_encoder.trunk._target_"),
        ("{_target_: sam2x.modeling.Hiera}", "model.image_encoder.trunk._target_"),
        ("{_target_: sam2.modeling.nowhere.Hiera}", "model.image_encoder.trunk._target_"),
        ("{_target_: torch.nn.modules.activation.os.system}", "model.image_encoder.trunk._target_"),
        ("{_target_: torch.load}", "model.image_encoder.trunk._target_"),
        # sam2's Hiera would read this with torch.load.
        ("{_target_: sam2.modeling.backbones.hieradet.Hiera, weights_path: x.pt}", "trunk.weights_path"),
        ("{_target_: sam2.modeling.backbones.hieradet.Hiera, _args_: [96]}", "trunk._args_"),
        # What is text after the first resolution, and an interpolation in the next.
        (r"'\${other}'", "model.image_encoder.trunk"),
    ],
)
def test_a_config_that_names_anything_but_networks_is_refused_with_its_place(
    tmp_path: Path, trunk: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: object, **__: object) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr(sam2, "instantiate", built)
    monkeypatch.chdir(tmp_path)
    path = with_trunk(tmp_path, trunk, "name: os.system\nother: {_target_: os.system, command: 'touch MARK'}\n")
    with pytest.raises(ModelError) as caught:
        sam2.read_config(path)
    assert caught.value.place == str(path)
    assert f"{key}`" in caught.value.reason
    assert caught.value.remedy
    assert [found.name for found in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("defaults", ["[other]", "[_self_, {model: big}]", "{a: b}"])
def test_a_config_that_leans_on_other_files_is_refused(tmp_path: Path, defaults: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: {defaults}\n{DEMO}")
    with pytest.raises(ModelError, match="defaults"):
        sam2.read_config(path)


def test_interpolations_layers_of_torch_and_own_keys_are_fine(tmp_path: Path) -> None:
    text = DEMO.replace("dim_feedforward: 128", "dim_feedforward: ${wide}")
    activation = "activation: {_target_: torch.nn.GELU, _partial_: true}"
    text = text.replace("      kernel_size: 3\n", f"      kernel_size: 3\n      {activation}\n")
    assert "GELU" in text
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: [_self_]\nwide: 128\n{text}")
    model = sam2.build(sam2.read_config(path), str(path))
    assert model.image_size == 256
    assert model.memory_attention.layers[0].linear1.out_features == 128


def test_a_refused_config_ends_the_load_with_its_reason(tmp_path: Path) -> None:
    demo = resolve("demo")
    path = with_trunk(tmp_path, "{_target_: os.system}")
    with pytest.raises(ModelError, match=r"trunk\._target_.*os\.system"):
        load(resolve(str(demo.checkpoint), config=str(path)), device="cpu", warmup=False)
