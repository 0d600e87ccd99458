"""Every data set: a rendered clip written as it is distributed comes back exactly, up to the format's quantisation."""

import numpy as np
import pytest

from gate4d.data import render_clip
from gate4d.data.datasets import DATASETS, Selection, formats, read_dataset
from tests.helpers.datasets import INFINITE, WRITERS, row, write

# Counts a metre of the depth maps; fp32 maps come back exactly.
SCALES = {
    "sintel": None, "tum-dynamics": 5000, "bonn": 5000, "kitti": 256, "scannet": 1000, "dycheck": None,
    "7-scenes": 1000, "point-odyssey": 65.535, "virtual-kitti-2": 100,
}  # fmt: skip
POSES = set(DATASETS) - {"kitti", "davis-2016", "davis-2017"}
MASKS = {"sintel", "davis-2016", "davis-2017"}
OWN_CAMERA = {"sintel", "kitti-odometry", "scannet", "dycheck", "point-odyssey", "virtual-kitti-2"}
ALL = {"bonn": Selection(30)}  # rows of the fixture before the clip


@pytest.fixture(scope="module")
def clip():
    return render_clip(12, 24, 32, seed=6)


def all_of(name, root):
    (sequence,) = read_dataset(name, root, selection=ALL.get(name, Selection()))
    return sequence


def test_each_data_set_has_a_fixture():
    assert set(WRITERS) == set(DATASETS)


@pytest.mark.parametrize("name", DATASETS)
def test_what_was_written_is_read(name, clip, tmp_path):
    said = write(name, clip, tmp_path)
    sequence = all_of(name, tmp_path)
    assert (sequence.name, len(sequence)) == (said, 12)
    lossy = sequence.frames[0].suffix == ".jpg"  # full colour, best quality: rounding of the transform and of YCbCr
    for n in range(12):
        difference = np.abs(sequence.image(n).astype(int) - clip.frames[n].numpy())
        assert difference.max() <= (4 if lossy else 0)
    assert sequence.has("depth") == (name in SCALES)
    for n in range(12) if name in SCALES else ():
        depth, true = sequence.depth(n), clip.depth[n].double().numpy()
        if SCALES[name] is None:
            np.testing.assert_array_equal(depth, true)
        else:
            known = true * SCALES[name] < 65534
            np.testing.assert_allclose(depth[known], true[known], atol=0.5001 / SCALES[name], rtol=0)
            assert known.mean() > 0.5
    assert sequence.has("cameras") == (name in POSES)
    if name in POSES:
        np.testing.assert_allclose(sequence.poses, clip.poses.numpy(), atol=1e-12)
    assert sequence.has("masks") == (name in MASKS)
    for n in range(12) if name in MASKS else ():
        np.testing.assert_array_equal(sequence.mask(n), clip.masks[n].numpy())
    if name in OWN_CAMERA:
        np.testing.assert_allclose(sequence.intrinsics, np.repeat(clip.intrinsics.numpy()[None], 12, 0), atol=1e-12)


@pytest.mark.parametrize("name", [n for n in DATASETS if n != "7-scenes"])
def test_frames_of_the_protocol(name, clip, tmp_path):
    write(name, clip, tmp_path)
    (sequence,) = read_dataset(name, tmp_path)
    chosen = range(12)[:: 3 if name in ("tum-dynamics", "scannet") else 1]
    assert sequence.frames == tuple(all_of(name, tmp_path).frames[n] for n in chosen)
    if name in POSES:
        np.testing.assert_allclose(sequence.poses, clip.poses.numpy()[chosen], atol=1e-12)


def test_long_sequences_end_where_the_protocol_does(tmp_path):
    long = render_clip(115, 8, 8, seed=1)
    for name, expected in (("bonn", range(110)), ("kitti", range(110)), ("sintel", range(115))):
        write(name, long, tmp_path / name)
        (sequence,) = read_dataset(name, tmp_path / name)
        assert len(sequence) == len(expected)
        np.testing.assert_array_equal(sequence.image(len(expected) - 1), long.frames[expected[-1]].numpy())
    write("7-scenes", long, tmp_path / "7")
    with pytest.raises(ValueError, match="leaves 1 frames of chess/seq-03"):
        list(read_dataset("7-scenes", tmp_path / "7"))
    (sequence,) = read_dataset("7-scenes", tmp_path / "7", selection=Selection(10, 50, 2))
    assert [x.name for x in sequence.frames] == ["frame-000010.color.png", "frame-000060.color.png"]


def test_association_takes_the_closest_free_stamps():
    """By hand: 1.00 and 1.01 both want 1.004; the closer one, 1.00, gets it, and 1.01 the next; 5 has nobody."""
    assert formats.associate([1.0, 1.01, 5.0], [1.004, 1.025, 1.0301, 3.0]) == [(1.0, 1.004), (1.01, 1.025)]
    assert formats.associate([1.0], [1.02]) == []  # less than 0.02 s, as the tools have it
    rng = np.random.default_rng(0)
    a, b = np.sort(rng.uniform(0, 1, (2, 60)).round(6), 1)
    free_a, free_b, expected = set(a), set(b), []
    for _, x, y in sorted((abs(x - y), x, y) for x in a for y in b if abs(x - y) < 0.02):
        if x in free_a and y in free_b:
            free_a.remove(x)
            free_b.remove(y)
            expected.append((x, y))
    assert formats.associate(a, b) == sorted(expected)


def test_a_quaternion_need_not_have_length_one():
    quarter = [[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3]]
    np.testing.assert_allclose(formats.tum_pose((1, 2, 3, 0, 0, 2, 2), "here")[:3], quarter, atol=1e-15)
    with pytest.raises(ValueError, match="here: a pose must be"):
        formats.tum_pose((1, 2, 3, 0, 0, 0, 0), "here")


@pytest.mark.parametrize("name", DATASETS)
def test_a_folder_of_another_data_set_is_named(name, clip, tmp_path):
    other = "sintel" if name != "sintel" else "scannet"
    write(other, clip, tmp_path)
    with pytest.raises(ValueError, match=f"does not hold {name}, it looks like {other}") as error:
        read_dataset(name, tmp_path)
    assert DATASETS[name].layout in str(error.value)
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_dataset(name, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data set that is known"):
        read_dataset(name, tmp_path / "empty")
    assert [n for n, d in DATASETS.items() if d.is_at(tmp_path)] == [other]


def test_unmatched_stamps(clip, tmp_path):
    folder = tmp_path / write("tum-dynamics", clip, tmp_path)
    lines = (folder / "groundtruth.txt").read_text().splitlines()
    late = [f"{float(line.split()[0]) + 1000:.6f} {line.split(None, 1)[1]}" for line in lines[1:]]
    (folder / "groundtruth.txt").write_text("\n".join(late))
    with pytest.raises(ValueError, match=r"rgb.txt and .*groundtruth.txt have no stamps less than 0.02 s apart"):
        list(read_dataset("tum-dynamics", tmp_path))


@pytest.mark.parametrize(
    ("name", "pattern"), [("sintel", "*.dpt"), ("bonn", "depth/*.png"), ("dycheck", "*.npy"), ("davis-2017", "0*.png")]
)
def test_a_truncated_map_is_named(name, pattern, clip, tmp_path):
    write(name, clip, tmp_path)
    file = sorted(tmp_path.rglob(pattern))[-1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    sequence = all_of(name, tmp_path)
    with pytest.raises(ValueError, match="truncated") as error:
        (sequence.mask if name == "davis-2017" else sequence.depth)(11)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("tum-dynamics", "groundtruth.txt"), ("bonn", "groundtruth.txt"), ("scannet", "pose/3.txt"),
     ("point-odyssey", "anno.npz"), ("virtual-kitti-2", "extrinsic.txt"), ("davis-2016", "00003.png"),
     ("dycheck", "0_00003.json"), ("sintel", "frame_0003.cam"), ("kitti", "data/0000000007.png")],
)  # fmt: skip
def test_missing_ground_truth_is_named(name, pattern, clip, tmp_path):
    write(name, clip, tmp_path)
    (file,) = tmp_path.rglob(pattern)
    file.unlink()
    with pytest.raises(FileNotFoundError) as error:
        all_of(name, tmp_path)
    assert str(file) in str(error.value)


def test_depth_of_eight_bits_is_refused(clip, tmp_path):
    write("bonn", clip, tmp_path)
    sequence = all_of("bonn", tmp_path)
    from PIL import Image

    Image.fromarray(clip.frames[0, ..., 0].numpy()).save(sequence.depth_files[0])
    with pytest.raises(ValueError, match="16 bits"):
        sequence.depth(0)


def test_lost_poses_and_the_sky(clip, tmp_path):
    folder = tmp_path / write("scannet", clip, tmp_path)
    (folder / "pose" / "2.txt").write_text("\n".join(row(x) for x in INFINITE))
    assert not np.isfinite(all_of("scannet", tmp_path).poses[2]).all()
    far = tmp_path / "far.png"
    from PIL import Image

    Image.fromarray(np.array([[0, 65535, 250]], np.uint16)).save(far)
    np.testing.assert_array_equal(formats.read_depth_png(far, 100, (65535,)), [[0, 0, 2.5]])


def test_counts_that_differ_and_bad_lines(clip, tmp_path):
    write("kitti-odometry", clip, tmp_path)
    file = tmp_path / "poses" / "04.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"holds 11 poses, .* holds 12 images"):
        all_of("kitti-odometry", tmp_path)
    file.write_text("\n".join([*lines[:-1], lines[-1] + " x"]))
    with pytest.raises(ValueError, match=r"04.txt, line 12: numbers are wanted"):
        all_of("kitti-odometry", tmp_path)


def test_names_that_are_not_there(clip, tmp_path):
    write("scannet", clip, tmp_path)
    with pytest.raises(ValueError, match="dataset must be one of sintel, "):
        read_dataset("nyu", tmp_path)
    with pytest.raises(ValueError, match="no sequence of scannet named scene9"):
        list(read_dataset("scannet", tmp_path, only=("scene9",)))
