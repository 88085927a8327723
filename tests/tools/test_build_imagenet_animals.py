"""The script that writes the names of ImageNet's animals, on a small wheel; and its result, as shipped."""

import zipfile
from importlib.resources import files

import pytest

from tools.build_imagenet_animals import build


def wheel(path, names):
    synsets = [f"n{index:08d}" for index in range(len(names))]
    lemmas = "".join(f"{synset}\t{name}\n" for synset, name in zip(synsets, names, strict=True))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("timm/data/_info/imagenet_synsets.txt", "\n".join(synsets) + "\n")
        archive.writestr("timm/data/_info/imagenet_synset_to_lemma.txt", "n99\tother\n" + lemmas)
    return path


def test_first_names_of_the_first_398_classes_are_written(tmp_path):
    names = [f"animal {index}, Animalis {index}" for index in range(398)] + ["abacus", "abaya"]
    out = tmp_path / "names.txt"
    assert build(wheel(tmp_path / "timm.whl", names), out) == tuple(f"animal {index}" for index in range(398))
    assert out.read_text().splitlines() == [f"animal {index}" for index in range(398)]


@pytest.mark.parametrize("names", [["tench"] * 398 + ["abacus"], [f"animal {index}" for index in range(500)]])
def test_another_order_of_classes_is_refused(tmp_path, names):
    with pytest.raises(ValueError, match=r"timm\.whl' orders the classes in another way; use timm 1\.0\.31"):
        build(wheel(tmp_path / "timm.whl", names), tmp_path / "names.txt")
    assert not (tmp_path / "names.txt").exists()


def test_the_list_is_a_resource_of_the_package():
    text = (files("diffusion_gym.prompts") / "data" / "imagenet_animals.txt").read_text(encoding="utf-8")
    assert text.count("\n") == 398 and text.endswith("puffer\n")
