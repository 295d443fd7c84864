"""From a name to a model: every source, the seed of its weights, weights that fit and that do not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fallow import models
from fallow.errors import DataError, FallowError, MissingExtra, UsageError
from fallow.integrations import loading
from fallow.integrations.loading import channels_taken, inputs_taken, load_model, side_taken

RUN = {"model": "resnet20", "data": "digits", "rates": "linear"}
VIT = {
    "model_type": "vit",
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
GPT = {"model_type": "gpt2", "vocab_size": 40, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 2}
BERT = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def of(name: object, **options: object) -> nn.Module:
    """A model for images of digits."""
    return load_model(str(name), **{"classes": 10, "channels": 1, "image": 8, **options})  # type: ignore[arg-type]


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def save(weights: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """A folder of transformers' with a configuration."""
    pytest.importorskip("transformers")

    def write(values: dict, name: str = "config") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return write


# --- sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "timm:test_resnet", "torchvision:resnet18"])
def test_each_source_gives_a_model_for_the_images_at_hand(name: str):
    if ":" in name:
        pytest.importorskip(name.partition(":")[0])
    channels = channels_taken(name, 1)
    model = of(name, classes=7, channels=channels).eval()
    assert inputs_taken(name) == "images"
    assert model(torch.randn(2, channels, 16, 16)).shape == (2, 7)


def test_our_transformer_is_built_for_the_size():
    assert of("vit_small", image=(8, 12)).eval()(torch.randn(1, 1, 8, 12)).shape == (1, 10)


def test_torchvision_takes_three_channels_and_says_so():
    pytest.importorskip("torchvision")
    assert channels_taken("torchvision:resnet18", 1) == 3
    with pytest.raises(UsageError, match="three channels, got 1"):
        of("torchvision:resnet18")


def test_torchvisions_classifiers_that_train_with_side_outputs_give_one():
    pytest.importorskip("torchvision")
    out = of("torchvision:googlenet", channels=3).train()(torch.randn(2, 3, 32, 32))
    assert isinstance(out, Tensor)


def test_a_configuration_makes_a_classifier_of_as_many_classes(config):
    folder = config(VIT)
    model = of(f"hf:{folder}", classes=7).eval()
    assert model(torch.randn(2, 3, 16, 16)).logits.shape == (2, 7)
    assert (inputs_taken(f"hf:{folder}"), channels_taken(f"hf:{folder}", 1)) == ("images", 3)
    assert same(model, of(f"hf:{folder / 'config.json'}", classes=7))


@pytest.mark.parametrize(("values", "inputs"), [(GPT, "tokens"), (BERT, "masked tokens")])
def test_a_configuration_makes_a_language_model(config, values: dict, inputs: str):
    name = f"hf:{config(values)}"
    model = of(name).eval()
    assert inputs_taken(name) == inputs
    assert model(input_ids=torch.zeros(2, 5, dtype=torch.long)).logits.shape == (2, 5, 40)


def test_a_type_or_a_class_stands_for_its_defaults():
    pytest.importorskip("transformers")
    from fallow.integrations import _hugging_face

    assert _hugging_face.read_config("ViTConfig").to_dict() == _hugging_face.read_config("vit").to_dict()
    assert inputs_taken("hf:bert") == "masked tokens" and inputs_taken("hf:GPT2Config") == "tokens"


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet20", None), ("timm:test_resnet", None), ("timm:test_vit", 160), ("torchvision:resnet18", None)],
)
def test_the_only_size_a_model_takes_is_known_beforehand(name: str, side: int | None):
    if ":" in name:
        pytest.importorskip(name.partition(":")[0])
    assert side_taken(of(name, channels=3)) == side


def test_the_size_of_a_configuration_is_known_beforehand(config):
    assert side_taken(of(f"hf:{config(VIT)}")) == 16


# --- random weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "timm:test_vit", "hf"])
def test_weights_are_a_function_of_the_seed_alone(config, name: str):
    name = f"hf:{config(VIT)}" if name == "hf" else name
    first = of(name, seed=3)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert same(first, of(name, seed=3)) and not same(first, of(name, seed=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_those_that_a_seeded_constructor_gives():
    torch.manual_seed(5)
    assert same(of("resnet20", seed=5), models.resnet20(classes=10, channels=1))


# --- weights of a file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin"])
def test_weights_come_from_a_local_file(tmp_path: Path, name: str):
    want = of("resnet20", seed=1)
    file = save(want.state_dict(), tmp_path / name)
    assert same(of("resnet20", weights=file), want)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_inside_a_checkpoint_are_found(tmp_path: Path, key: str):
    want = of("resnet20", seed=1)
    file = tmp_path / "c.pt"
    torch.save({key: want.state_dict(), "epoch": 3}, file)
    assert same(of("resnet20", weights=file), want)


def test_weights_that_do_not_fit_are_named(tmp_path: Path):
    weights = of("resnet20", classes=7).state_dict()
    del weights["group1.0.branch.conv1.weight"]
    weights["more"] = torch.zeros(1)
    file = save(weights, tmp_path / "w.safetensors")
    with pytest.raises(UsageError) as caught:
        of("resnet20", weights=file)
    for words in (
        str(file),
        "1 missing (group1.0.branch.conv1.weight)",
        "1 not in the model (more)",
        "2 of another shape (head.weight (7, 64) for (10, 64), head.bias (7,) for (10,))",
    ):
        assert words in str(caught.value)


def test_of_many_misfits_a_few_are_named(tmp_path: Path):
    file = save({"x": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(
        UsageError, match=r"missing \(stem.conv.weight, stem.norm.weight, stem.norm.bias, \.\.\.\)"
    ):
        of("resnet20", weights=file)


class Loud:
    """Its unpickling would be seen."""

    def __reduce__(self):
        return pytest.fail, ("something was executed",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("w.safetensors", b"\x10", "not a whole .safetensors"),
        ("w.pt", b"", "cannot be read|is not opened"),
        ("w.pt", b"PK\x03\x04 cut off", "cannot be read"),
        ("w.pt", b"text", "cannot be read|is not opened"),
    ],
)
def test_a_damaged_file_of_weights_is_refused(tmp_path: Path, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        of("resnet20", weights=tmp_path / name)


def test_a_file_that_would_execute_something_is_not_opened(tmp_path: Path):
    torch.save({"x": Loud()}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="holds more than weights"):
        of("resnet20", weights=tmp_path / "w.pt")


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    torch.save([torch.zeros(1)], tmp_path / "w.pt")
    with pytest.raises(DataError, match="does not hold tensors by name"):
        of("resnet20", weights=tmp_path / "w.pt")
    with pytest.raises(DataError, match="there is no file of weights"):
        of("resnet20", weights=tmp_path / "nowhere.pt")


def test_weights_for_colour_images_are_told_by_their_first_convolution(tmp_path: Path):
    colour = save(of("resnet20", channels=3).state_dict(), tmp_path / "c.pt")
    grey = save(of("resnet20").state_dict(), tmp_path / "g.pt")
    assert [channels_taken("resnet20", 1, file) for file in (None, colour, grey)] == [1, 3, 1]


def test_weights_beside_a_configuration_are_taken(config, tmp_path: Path):
    want = of(f"hf:{config(VIT)}", classes=7, seed=1)
    want.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    assert same(of(f"hf:{tmp_path / 'saved'}", classes=7), want)
    with pytest.raises(UsageError, match=r"2 of another shape \(classifier.bias \(7,\) for \(10,\)"):
        of(f"hf:{tmp_path / 'saved'}", classes=10)


# --- runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RUN))
    return folder


def test_the_folder_of_a_run_gives_the_trained_model(run: Path):
    want = of("resnet20", seed=2)
    save(want.state_dict(), run / "model.safetensors")
    assert same(of(run), want)
    other = of("resnet20", seed=3)
    assert same(of(run, weights=save(other.state_dict(), run / "other.pt")), other)


def test_a_run_without_weights_says_how_it_gets_them(run: Path):
    with pytest.raises(DataError, match="has no weights .*model.safetensors yet.*--resume"):
        of(run)


def test_a_run_whose_configuration_is_cut_off_is_refused(run: Path):
    (run / "config.json").write_text('{"model": ')
    with pytest.raises(DataError, match="cannot be read"):
        of(run)


def test_a_folder_named_like_a_model_does_not_stand_in_its_way(run: Path, monkeypatch: pytest.MonkeyPatch):
    run.rename(run.parent / "resnet20")
    monkeypatch.chdir(run.parent)
    assert same(of("resnet20", seed=4), load_model("resnet20", classes=10, channels=1, image=8, seed=4))


def test_a_folder_of_transformers_is_not_taken_for_a_run(config):
    folder = config(VIT)
    with pytest.raises(UsageError, match=f"is not the folder of a run: .* say hf:{folder}"):
        of(folder)


# --- names that cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet57", "did you mean resnet56"),
        ("tim:resnet18", "the model must be .*did you mean timm:"),
        ("timm:resnet1", "did you mean timm:resnet1"),
        ("timm:hf-hub:timm/resnet18", "has none of that name"),
        ("torchvision:resnet19", "did you mean torchvision:resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "has no classifier"),
        ("hf:vitt", "did you mean hf:vit"),
        ("hf:google/vit-base-patch16-224", "fallow downloads nothing"),
        ("hf:clap", "neither an image classifier nor a language model of ClapConfig"),
        ("hf:.", "holds no config.json"),
    ],
)
def test_an_unknown_name_says_what_there_is(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if name.partition(":")[0] in ("timm", "torchvision", "hf"):
        pytest.importorskip(name.partition(":")[0].replace("hf", "transformers"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words) as caught:
        of(name, channels=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"model_type": "nonesuch"}, {}, {**VIT, "hidden_size": -1}, {**VIT, "patch_size": "a"}]
)
def test_a_configuration_that_cannot_be_is_one_line(config, values: dict):
    with pytest.raises(UsageError) as caught:
        of(f"hf:{config(values)}")
    assert "\n" not in str(caught.value)


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_made(
    config, monkeypatch: pytest.MonkeyPatch
):
    from fallow.integrations import _hugging_face

    monkeypatch.setattr(_hugging_face.os, "sysconf", lambda _: 100)
    with pytest.raises(UsageError, match="GB of weights"):
        of(f"hf:{config(VIT)}")


@pytest.mark.parametrize(
    ("name", "library"), [("timm:x", "timm"), ("torchvision:x", "torchvision"), ("hf:x", "transformers")]
)
def test_a_missing_library_names_the_extra(name: str, library: str, monkeypatch: pytest.MonkeyPatch):
    from fallow.integrations import _hugging_face

    def gone(*_: object) -> None:
        raise MissingExtra(f"this needs {library}")

    for module, function in ((loading, "need_timm"), (loading, "need"), (_hugging_face, "need_transformers")):
        monkeypatch.setattr(module, function, gone)
    with pytest.raises(FallowError, match=f"this needs {library}"):
        of(name)
