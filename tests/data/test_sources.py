import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from metagen_jax.data import DataError, frozen_classes, load_images, sources

tfds = pytest.importorskip("tensorflow_datasets")
array_record = pytest.importorskip("array_record.python.array_record_module")

OMNIGLOT_NAMES = tuple(
    name for part in ("trainval", "test") for name in frozen_classes("omniglot", f"lake/{part}")
)


def write_tfds(root, name, splits, features, *, version="1.0.0", file_format="array_record"):
    """Prepares a set as TFDS would, which can't without TensorFlow."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    folder = root / name / version
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features)
    features.save_config(folder)
    serializer = ExampleSerializer(features.get_serialized_info())
    for split, examples in splits.items():
        file = folder / f"{name.split('/')[0]}-{split}.array_record-00000-of-00001"
        writer = array_record.ArrayRecordWriter(str(file), "group_size:1")
        for example in examples:
            writer.write(serializer.serialize_example(features.encode_example(example)))
        writer.close()
    described = [
        {
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "shardLengths": [str(len(examples))],
            "numBytes": "1",
        }
        for split, examples in splits.items()
    ]
    info = {"name": name, "version": version, "fileFormat": file_format, "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def png(pixels, mode=None):
    stream = io.BytesIO()
    image = Image.fromarray(pixels.squeeze())
    (image if mode is None else image.convert(mode)).save(stream, "png")
    stream.seek(0)
    return stream


def random_pixels(count, shape=(6, 7, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def write_shapes(root, *, pixels=None, **options):
    """A set "shapes" of coloured noise, 7 pictures to train and 3 to test, of classes a, b, c."""
    pixels = random_pixels(10) if pixels is None else pixels
    examples = [{"image": png(p), "label": "abc"[i % 3]} for i, p in enumerate(pixels)]
    features = {
        "image": tfds.features.Image(shape=pixels.shape[1:]),
        "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
    }
    write_tfds(root, "shapes", {"train": examples[:7], "test": examples[7:]}, features, **options)
    return pixels


@pytest.fixture
def folders(tmp_path):
    """Keyword arguments for load_images: a folder of sets and a folder for the cache."""
    (tmp_path / "sets").mkdir()
    return {"data_dir": tmp_path / "sets", "cache_dir": tmp_path / "cache"}


@pytest.fixture(scope="module")
def omniglot_folders(tmp_path_factory):
    """Omniglot's 1623 characters with one drawing each: the label's bits in ink, 1 bit a pixel."""
    root = tmp_path_factory.mktemp("omniglot")
    features = {
        "image": tfds.features.Image(shape=(3, 4, 3)),
        "label": tfds.features.ClassLabel(names=sorted(OMNIGLOT_NAMES)),
    }
    drawings = {
        name: png(255 * (1 - bits_of(label)), "1")
        for label, name in enumerate(sorted(OMNIGLOT_NAMES))
    }
    splits = {
        split: [{"image": drawings[name], "label": name} for name in names]
        for split, names in [("train", OMNIGLOT_NAMES[:964]), ("test", OMNIGLOT_NAMES[964:])]
    }
    write_tfds(root, "omniglot", splits, features, version="3.0.0")
    return {"data_dir": root, "cache_dir": root / "cache"}


def bits_of(label):
    return (label >> np.arange(12, dtype=np.uint32) & 1).astype(np.uint8).reshape(3, 4)


def test_pixels_labels_and_names_come_as_stored(folders):
    pixels = write_shapes(folders["data_dir"])
    data = load_images("shapes", "train", **folders)
    np.testing.assert_array_equal(data.images, pixels[:7])
    np.testing.assert_array_equal(data.labels, [0, 1, 2, 0, 1, 2, 0])
    assert data.class_names == ("a", "b", "c")
    assert (data.images.dtype, data.labels.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize(
    ("split", "chosen"),
    [("test", slice(7, 10)), ("train+test", slice(0, 10)), ("train[2:5]", slice(2, 5))],
)
def test_tfds_splits_are_understood(split, chosen, folders):
    pixels = write_shapes(folders["data_dir"])
    np.testing.assert_array_equal(load_images("shapes", split, **folders).images, pixels[chosen])


def test_grey_pictures_keep_one_channel(folders):
    pixels = write_shapes(folders["data_dir"], pixels=random_pixels(10, (5, 5, 1)))
    np.testing.assert_array_equal(load_images("shapes", "train", **folders).images, pixels[:7])


def test_size_resizes_by_lanczos(folders):
    pixels = write_shapes(folders["data_dir"])
    data = load_images("shapes", "train", size=4, **folders)
    lanczos = [
        np.asarray(Image.fromarray(p).resize((4, 4), Image.Resampling.LANCZOS)) for p in pixels
    ]
    np.testing.assert_array_equal(data.images, lanczos[:7])


def test_newest_version_is_taken_unless_one_is_named(folders):
    stored = {
        version: write_shapes(
            folders["data_dir"], pixels=random_pixels(10, seed=seed), version=version
        )
        for seed, version in enumerate(["9.0.0", "10.0.0", "1.0.0"])
    }
    for name, version in [("shapes", "10.0.0"), ("shapes:9.0.0", "9.0.0")]:
        images = load_images(name, "test", **folders).images
        np.testing.assert_array_equal(images, stored[version][7:])


def test_data_dir_defaults_to_the_environment(folders, monkeypatch):
    pixels = write_shapes(folders["data_dir"])
    monkeypatch.setenv("TFDS_DATA_DIR", str(folders["data_dir"]))
    monkeypatch.setenv("METAGEN_JAX_CACHE", str(folders["cache_dir"]))
    np.testing.assert_array_equal(load_images("shapes", "test").images, pixels[7:])
    assert len(list(folders["cache_dir"].iterdir())) == 1


def test_progress_runs_to_the_end_and_not_at_all_when_cached(folders, monkeypatch):
    monkeypatch.setattr(sources, "_DECODE_CHUNK", 3)
    write_shapes(folders["data_dir"])
    calls = []
    for _ in range(2):
        load_images("shapes", "train", progress=lambda *done: calls.append(done), **folders)
    assert calls == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize("split", ["vinyals/train", "lake/val", "random1200/trainval", "test"])
def test_omniglot_split_has_its_characters_as_0_and_255(split, omniglot_folders):
    data = load_images("omniglot", split, **omniglot_folders)
    frozen = frozen_classes("omniglot", "lake/test" if split == "test" else split)
    assert data.class_names == frozen
    assert sorted(data.labels) == list(range(len(frozen)))
    for image, label in zip(data.images[::20], data.labels[::20], strict=True):
        drawn = sorted(OMNIGLOT_NAMES).index(frozen[label])
        np.testing.assert_array_equal(image[..., 0], 255 * (1 - bits_of(drawn)))


def test_omniglot_splits_share_one_decoded_array(omniglot_folders, monkeypatch):
    load_images("omniglot", "lake/test", **omniglot_folders)
    monkeypatch.delattr(sources, "_decode")
    for split in ("train", "test", "train+test", "vinyals/test", "random1200/val"):
        load_images("omniglot", split, **omniglot_folders)


def test_omniglot_pictures_that_hold_0_and_1_come_as_0_and_255(folders):
    bits = random_pixels(10, (5, 5, 1)) % 2
    features = {
        "image": tfds.features.Image(shape=(5, 5, 1)),
        "label": tfds.features.ClassLabel(names=["a"]),
    }
    examples = [{"image": png(p), "label": "a"} for p in bits]
    write_tfds(folders["data_dir"], "omniglot", {"small1": examples}, features)
    data = load_images("omniglot", "small1", **folders)
    np.testing.assert_array_equal(data.images, 255 * bits)


def test_omniglot_pictures_are_those_that_tfds_decodes(data_dir, tmp_path):
    data = load_images("omniglot", "small1", data_dir=data_dir, cache_dir=tmp_path)
    decoded = tfds.data_source("omniglot", split="small1", data_dir=data_dir)
    for i in range(0, len(decoded), 100):
        np.testing.assert_array_equal(data.images[i, ..., 0] > 0, decoded[i]["image"][..., 0] > 0)
        assert data.labels[i] == decoded[i]["label"]
    assert np.unique(data.images).tolist() == [0, 255]
    # A drawing is a few strokes of ink, and ink is 0.
    assert 0.9 < (data.images == 255).mean() < 0.98
    assert set(np.bincount(data.labels)) == {0, 20}


def test_glyphs_come_cached_by_their_frozen_splits(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def two_of_each(names, *, size, progress):
        numbers = np.arange(len(names), dtype=np.uint32)[:, None, None, None, None]
        return np.broadcast_to(numbers % 251, (len(names), 2, size, size, 1)).astype(np.uint8)

    monkeypatch.setattr(sources, "render_glyphs", two_of_each)
    every_name = [*frozen_classes("glyphs", "trainval"), *frozen_classes("glyphs", "test")]
    for split in ("train", "test"):
        data = load_images("glyphs", split, cache_dir=tmp_path, size=4)
        assert data.class_names == frozen_classes("glyphs", split)
        assert data.images.shape == (2 * len(data.class_names), 4, 4, 1)
        drawn = [every_name.index(data.class_names[label]) % 251 for label in data.labels]
        np.testing.assert_array_equal(data.images[:, 0, 0, 0], drawn)
        monkeypatch.delattr(sources, "render_glyphs", raising=False)


def test_second_load_is_the_same_without_decoding(folders, monkeypatch):
    write_shapes(folders["data_dir"])
    first = load_images("shapes", "train", **folders)
    monkeypatch.delattr(sources, "_decode")
    second = load_images("shapes", "train", **folders)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert first.class_names == second.class_names


def test_cache_tells_splits_sizes_and_preparations_apart(folders, tmp_path):
    pixels = write_shapes(folders["data_dir"])
    other = write_shapes(tmp_path / "other", pixels=random_pixels(10, (6, 8, 3), seed=1))
    cache_dir = folders["cache_dir"]
    for _ in range(2):
        train = load_images("shapes", "train", **folders)
        small = load_images("shapes", "train", size=3, **folders)
        test = load_images("shapes", "test", **folders)
        again = load_images("shapes", "train", data_dir=tmp_path / "other", cache_dir=cache_dir)
        np.testing.assert_array_equal(train.images, pixels[:7])
        np.testing.assert_array_equal(test.images, pixels[7:])
        np.testing.assert_array_equal(again.images, other[:7])
        assert small.images.shape == (7, 3, 3, 3)
    assert len(list(cache_dir.iterdir())) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda intact: b"",
        lambda intact: b"not an array",
        lambda intact: intact[: len(intact) // 2],
        lambda intact: intact[:300] + bytes([intact[300] ^ 1]) + intact[301:],
    ],
    ids=["empty", "other", "cut", "flipped"],
)
def test_damaged_cache_is_rebuilt_with_a_warning(damage, folders):
    pixels = write_shapes(folders["data_dir"])
    load_images("shapes", "train", **folders)
    (file,) = folders["cache_dir"].iterdir()
    intact = file.read_bytes()
    file.write_bytes(damage(intact))
    with pytest.warns(UserWarning, match="rebuilding the cache"):
        data = load_images("shapes", "train", **folders)
    np.testing.assert_array_equal(data.images, pixels[:7])
    np.testing.assert_array_equal(load_images("shapes", "train", **folders).images, pixels[:7])


def test_cache_that_cannot_be_written_costs_a_warning(folders, tmp_path):
    pixels = write_shapes(folders["data_dir"])
    (tmp_path / "file").touch()
    folders["cache_dir"] = tmp_path / "file" / "cache"
    with pytest.warns(UserWarning, match="not cached"):
        data = load_images("shapes", "train", **folders)
    np.testing.assert_array_equal(data.images, pixels[:7])


def test_full_disk_leaves_no_half_of_a_cache_file(folders, monkeypatch):
    def half_written(stream, **arrays):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    write_shapes(folders["data_dir"])
    monkeypatch.setattr(np, "savez", half_written)
    with pytest.warns(UserWarning, match="No space left"):
        load_images("shapes", "train", **folders)
    assert list(folders["cache_dir"].iterdir()) == []


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("shapes", "dev", {}, "no split 'dev'; give one of train, test"),
        ("shapes", "train[", {}, "no split 'train\\['; give one of train, test"),
        ("shapes", "train[:0]", {}, "no pictures"),
        ("shapes", "train", {"size": 0}, "size is 0"),
        ("shapes", "train", {"data_dir": "/no/folder"}, "/no/folder does not exist; .*prepare"),
        ("shapes", "train", {"data_dir": __file__}, "test_sources.py is not a folder; give a"),
        (
            "circles",
            "train",
            {},
            "'circles' is not in data_dir .* holds shapes, sounds; .*tensorflow-cpu",
        ),
        ("shapes:2.0.0", "train", {}, "'shapes:2.0.0' is not in data_dir"),
        ("sounds", "train", {}, "'sounds' has the features label, loudness; .* 'image' .*: give"),
        ("omniglot", "vinyals", {}, "not in data_dir"),
        ("omniglot", "vinyals/dev", {}, "not in data_dir"),
        ("glyphs", "dev", {}, "no split 'dev'; give one of train, val, trainval, test"),
        ("glyphs", "train", {"data_dir": "/no/folder"}, "/no/folder does not exist; glyphs need"),
    ],
)
def test_user_mistakes_are_one_clear_line(name, split, options, message, folders):
    write_shapes(folders["data_dir"])
    sounds = {
        "loudness": tfds.features.Scalar(np.float32),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    write_tfds(folders["data_dir"], "sounds", {"train": [{"loudness": 1.0, "label": 0}]}, sounds)
    with pytest.raises(DataError, match=message) as raised:
        load_images(name, split, **(folders | options))
    assert "\n" not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    assert not folders["cache_dir"].exists()


def test_unknown_omniglot_split_lists_those_by_character_too(omniglot_folders):
    with pytest.raises(
        DataError, match=r"give one of train, test, vinyals/train, .*random1200/test"
    ):
        load_images("omniglot", "vinyals/dev", **omniglot_folders)


def test_pictures_of_many_sizes_need_a_size(folders):
    examples = [{"image": png(random_pixels(1, (5, w, 3))[0]), "label": 0} for w in (4, 9)]
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=1)}
    write_tfds(folders["data_dir"], "mixed", {"train": examples}, features)
    with pytest.raises(DataError, match="differ in size; give size"):
        load_images("mixed", "train", **folders)
    assert load_images("mixed", "train", size=8, **folders).images.shape == (2, 8, 8, 3)


def test_pictures_of_another_number_of_channels_are_named(folders):
    examples = [{"image": png(random_pixels(1, (5, 4, 3))[0]), "label": 0}]
    image = tfds.features.Image(shape=(5, 4, None))
    features = {"image": image, "label": tfds.features.ClassLabel(num_classes=1)}
    write_tfds(folders["data_dir"], "open", {"train": examples}, features)
    with pytest.raises(DataError, match="any number of channels; load_images needs 1, 3 or 4"):
        load_images("open", "train", **folders)


@pytest.mark.parametrize("labelled", [True, False])
def test_sets_without_labels_are_of_one_class_and_pictures_without_are_refused(labelled, folders):
    features = {"image": tfds.features.Image(shape=(6, 7, 3))}
    if labelled:
        features["label"] = tfds.features.ClassLabel(num_classes=1)
    example = {"image": png(random_pixels(1)[0])} | ({"label": -1} if labelled else {})
    write_tfds(folders["data_dir"], "blank", {"test": [example]}, features)
    if labelled:
        with pytest.raises(DataError, match="pictures without label"):
            load_images("blank", "test", **folders)
    else:
        images, labels, names = load_images("blank", "test", **folders)
        np.testing.assert_array_equal(images, random_pixels(1))
        assert (labels.tolist(), names) == ([0], ("blank",))


def test_a_set_in_tensorflows_format_is_refused_with_advice(folders):
    write_shapes(folders["data_dir"], file_format="tfrecord")
    with pytest.raises(DataError, match=r"prepared as tfrecord .* prepare it in another data_dir"):
        load_images("shapes", "train", **folders)


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("tensorflow_datasets", "tensorflow-datasets"),
        ("PIL", "pillow"),
    ],
)
def test_missing_package_is_named(module, package, folders, monkeypatch):
    write_shapes(folders["data_dir"])
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=f"pip install {package}"):
        load_images("shapes", "train", **folders)


def test_glyphs_without_matplotlib_name_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match="pip install matplotlib"):
        load_images("glyphs", "train", cache_dir=tmp_path)


def test_importing_data_loads_no_reader_of_data():
    program = (
        "import sys, metagen_jax.data; "
        "print({'tensorflow_datasets', 'PIL', 'matplotlib', 'tensorflow'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert output.stdout.strip() == "set()", output.stderr
