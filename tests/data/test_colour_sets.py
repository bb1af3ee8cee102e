"""CIFAR-FS and miniImageNet: their class lists, and loading from synthetic stand-ins."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from metagen_jax.data import DataError, colour_sets, sources
from metagen_jax.data.classes import frozen_classes
from metagen_jax.data.colour_sets import load_cifar_fs, load_mini_imagenet

tfds = pytest.importorskip("tensorflow_datasets")
array_record = pytest.importorskip("array_record.python.array_record_module")

PARTS = ("train", "val", "test")
# The 100 fine labels of CIFAR-100 as its file `fine_label_names.txt`, and so TFDS, spells them.
_LINES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
FINE_LABELS = _LINES.split()


def classes(name, split):
    return frozen_classes(name, split)


def pixels_of(label, index):
    """A picture that tells its class and its number."""
    return np.broadcast_to(np.array([label, index, 7], np.uint8), (4, 4, 3))


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "png")
    stream.seek(0)
    return stream


def write_cifar100(root):
    """`cifar100` as TFDS prepares it: two pictures of each class to train, one to test."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    folder = root / "cifar100" / "3.0.2"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(4, 4, 3)),
            "label": tfds.features.ClassLabel(names=FINE_LABELS),
        }
    )
    features.save_config(folder)
    serializer = ExampleSerializer(features.get_serialized_info())
    described = []
    for split, indices in {"train": (0, 1), "test": (2,)}.items():
        file = folder / f"cifar100-{split}.array_record-00000-of-00001"
        writer = array_record.ArrayRecordWriter(str(file), "group_size:1")
        for index in indices:
            for label in range(100):
                example = {"image": png(pixels_of(label, index)), "label": label}
                writer.write(serializer.serialize_example(features.encode_example(example)))
        writer.close()
        described.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "shardLengths": [str(100 * len(indices))],
                "numBytes": "1",
            }
        )
    info = {
        "name": "cifar100",
        "version": "3.0.2",
        "fileFormat": "array_record",
        "splits": described,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    write_cifar100(root)
    return {"data_dir": root, "cache_dir": root / "cache"}


@pytest.fixture
def folder(tmp_path):
    """The validation classes of miniImageNet with two pictures each, of sizes of their own."""
    root = tmp_path / "mini"
    for label, name in enumerate(classes("mini_imagenet", "val")):
        (root / name).mkdir(parents=True)
        for index, suffix in enumerate([".png", ".PNG"]):
            shape = (3 + index, 5, 3)
            pixels = np.broadcast_to(np.array([label, index, 7], np.uint8), shape)
            (root / name / f"{name}_{index}{suffix}").write_bytes(png(pixels).read())
        (root / name / "readme.txt").touch()
    return root


@pytest.mark.parametrize("name", ["cifar_fs", "mini_imagenet"])
def test_class_lists_have_the_published_sizes_and_share_no_class(name):
    train, val, test = (classes(name, part) for part in PARTS)
    assert (len(train), len(val), len(test)) == (64, 16, 20)
    assert len({*train, *val, *test}) == 100
    assert classes(name, "trainval") == train + val


def test_cifar_fs_divides_the_fine_labels_of_cifar100():
    assert sorted(name for part in PARTS for name in classes("cifar_fs", part)) == FINE_LABELS


def test_some_classes_are_where_the_papers_put_them():
    """Classes that papers name or show as those of a split."""
    assert {"baby", "rocket", "worm", "pickup_truck"} < {*classes("cifar_fs", "test")}
    assert {"otter", "tractor", "sea"} < {*classes("cifar_fs", "val")}
    # House finch; nematode, dalmatian, scoreboard; ear (of corn) is in training.
    assert "n01532829" in classes("mini_imagenet", "train")
    assert {"n01930112", "n02110341", "n04149813"} < {*classes("mini_imagenet", "test")}
    assert all(name[0] == "n" and name[1:].isdigit() for name in classes("mini_imagenet", "val"))


@pytest.mark.parametrize("split", ["val", "trainval", "test"])
def test_cifar_fs_has_all_pictures_of_its_classes(split, cifar):
    data = load_cifar_fs(split, **cifar)
    assert data.class_names == classes("cifar_fs", split)
    assert sorted(data.labels) == sorted([*range(len(data.class_names))] * 3)
    expected = [FINE_LABELS.index(data.class_names[label]) for label in data.labels]
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], expected)
    assert set(data.images[:, 0, 0, 1].tolist()) == {0, 1, 2}


def test_cifar_fs_splits_share_one_decoded_array(cifar, monkeypatch):
    load_cifar_fs("val", **cifar)
    monkeypatch.delattr(sources, "_decode")
    load_cifar_fs("test", **cifar)


def test_mini_imagenet_reads_a_folder_class_by_class(folder, tmp_path):
    calls = []
    options = {"folder": folder, "cache_dir": tmp_path / "cache", "size": 6}
    data = load_mini_imagenet("val", progress=lambda *done: calls.append(done), **options)
    assert data.class_names == classes("mini_imagenet", "val")
    np.testing.assert_array_equal(data.labels, np.repeat(np.arange(16), 2))
    assert data.labels.dtype == np.int32
    expected = [[label, index, 7] for label in range(16) for index in range(2)]
    assert data.images.shape == (32, 6, 6, 3)
    np.testing.assert_array_equal(data.images[:, 2, 3], expected)
    assert calls[-1] == (32, 32)


def test_mini_imagenet_pictures_are_resized_by_lanczos(folder, tmp_path):
    name = classes("mini_imagenet", "val")[0]
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    (folder / name / "0.jpeg").write_bytes(png(noise).read())
    data = load_mini_imagenet("val", folder=folder, cache_dir=tmp_path, size=5)
    expected = Image.fromarray(noise).resize((5, 5), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(data.images[0], np.asarray(expected))


def test_mini_imagenet_is_cached_until_a_file_or_the_size_changes(folder, tmp_path, monkeypatch):
    options = {"folder": folder, "cache_dir": tmp_path / "cache"}
    first = load_mini_imagenet("val", size=4, **options)
    read = colour_sets._read_picture
    monkeypatch.setattr(colour_sets, "_read_picture", None)
    second = load_mini_imagenet("val", size=4, **options)
    np.testing.assert_array_equal(first.images, second.images)
    assert first.class_names == second.class_names
    monkeypatch.setattr(colour_sets, "_read_picture", read)
    assert load_mini_imagenet("val", size=3, **options).images.shape == (32, 3, 3, 3)
    name = classes("mini_imagenet", "val")[3]
    (folder / name / "more.png").write_bytes(png(pixels_of(1, 1)).read())
    assert len(load_mini_imagenet("val", size=4, **options).images) == 33


def test_users_mistakes_are_one_clear_line(folder, tmp_path):
    options = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(DataError, match=r"split 'dev'; give one of train, val, trainval, test"):
        load_mini_imagenet("dev", folder=folder, **options)
    with pytest.raises(DataError, match=r"no frozen split 'dev'"):
        load_cifar_fs("dev", data_dir=folder, **options)
    with pytest.raises(DataError, match=r"'cifar100' is not in data_dir"):
        load_cifar_fs("val", data_dir=folder, **options)
    with pytest.raises(DataError, match=r"nowhere does not exist; name the folder"):
        load_mini_imagenet("val", folder=tmp_path / "nowhere", **options)
    with pytest.raises(DataError, match=r"no pictures of 20 of 20 classes: n0\d+, .*, \.\.\.;"):
        load_mini_imagenet("test", folder=folder, **options)
    with pytest.raises(DataError, match="size is 0"):
        load_mini_imagenet("val", folder=folder, size=0, **options)
    broken = folder / classes("mini_imagenet", "val")[2] / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"can't read the picture .*broken\.jpg"):
        load_mini_imagenet("val", folder=folder, **options)
    assert not (tmp_path / "cache").exists()
