"""Writes a clip as each data set is distributed, for its reader to read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from gate4d.data import Clip
from gate4d.geometry import matrix_to_quaternion

TAG = 202021.25
FIRST = 1341846313.0  # a time stamp such as TUM's
INFINITE = np.diag([-np.inf] * 4)  # ScanNet's lost pose


def write(name: str, clip: Clip, root: Path) -> str:
    """Write ``clip`` as the data set ``name`` below ``root``; returns the sequence's name as the reader says it."""
    return WRITERS[name](clip, root)


def image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(pixels).save(path, **options)


def counts(path: Path, depth: np.ndarray, scale: float) -> None:
    """16 bits; what is beyond them is 0."""
    rounded = np.round(depth.astype(np.float64) * scale)
    image(path, np.where(rounded < 65535, rounded, 0).astype(np.uint16))


def text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def row(numbers) -> str:
    return " ".join(f"{x:.17g}" for x in np.asarray(numbers, np.float64).ravel())


def each(clip: Clip):
    """Pixels, depth, pose, mask of each frame."""
    parts = clip.frames.numpy(), clip.depth.numpy(), clip.poses.numpy(), clip.masks.numpy()
    return list(zip(range(len(clip.frames)), *parts, strict=True))


def tum_rows(clip: Clip) -> np.ndarray:
    return np.column_stack((clip.poses[:, :3, 3].numpy(), matrix_to_quaternion(clip.poses[:, :3, :3]).numpy()))


def _sintel(clip: Clip, root: Path) -> str:
    base = root / "training"
    for n, pixels, depth, pose, mask in each(clip):
        stem = f"alley_2/frame_{n + 1:04d}"
        image(base / "final" / f"{stem}.png", pixels)
        image(base / "dynamic_label_perfect" / f"{stem}.png", mask.astype(np.uint8) * 255)
        for kind in ("depth", "camdata_left"):
            (base / kind / "alley_2").mkdir(parents=True, exist_ok=True)
        height, width = depth.shape
        raw = struct.pack("<fii", TAG, width, height) + depth.astype("<f4").tobytes()
        (base / "depth" / f"{stem}.dpt").write_bytes(raw)
        numbers = np.concatenate((clip.intrinsics.numpy().ravel(), np.linalg.inv(pose)[:3].ravel()))
        (base / "camdata_left" / f"{stem}.cam").write_bytes(struct.pack("<f", TAG) + numbers.astype("<f8").tobytes())
    return "alley_2"


def _tum(clip: Clip, root: Path) -> str:
    """Poses come 4 times as often as images and a little late; those between them are of nowhere."""
    folder = root / "rgbd_dataset_freiburg3_walking_xyz"
    rgb, maps, truth = ["# color images"], ["# depth maps"], ["# timestamp tx ty tz qx qy qz qw"]
    for (n, pixels, depth, _, _), pose in zip(each(clip), tum_rows(clip), strict=True):
        time = FIRST + n / 30
        rgb.append(f"{time:.6f} rgb/{time:.6f}.png")
        maps.append(f"{time + 0.009:.6f} depth/{time + 0.009:.6f}.png")
        image(folder / "rgb" / f"{time:.6f}.png", pixels)
        counts(folder / "depth" / f"{time + 0.009:.6f}.png", depth, 5000)
        for part in range(4):
            wrong = (9.0, 9, 9, 0, 0, 0, 1)
            truth.append(f"{time + 0.003 + part / 120:.6f} {row(wrong if part else pose)}")
    rgb.append(f"{FIRST + 100:.6f} rgb/none.png")  # nothing is near
    for name, lines in (("rgb", rgb), ("depth", maps), ("groundtruth", truth)):
        text(folder / f"{name}.txt", lines)
    return folder.name


def _bonn(clip: Clip, root: Path) -> str:
    """30 rows before the clip, which the protocol leaves out."""
    folder = root / "rgbd_bonn_dataset" / "rgbd_bonn_balloon2"
    lines = ["# timestamp tx ty tz qx qy qz qw"] + [f"{n / 30:.6f} 0 0 0 0 0 0 1" for n in range(30)]
    for n in range(30):
        image(folder / "rgb" / f"{FIRST + n / 30:.5f}.png", np.zeros_like(clip.frames[0].numpy()))
        counts(folder / "depth" / f"{FIRST + n / 30:.5f}.png", np.ones(clip.depth.shape[1:]), 5000)
    for (n, pixels, depth, _, _), pose in zip(each(clip), tum_rows(clip), strict=True):
        image(folder / "rgb" / f"{FIRST + (n + 30) / 30:.5f}.png", pixels)
        counts(folder / "depth" / f"{FIRST + (n + 30) / 30:.5f}.png", depth, 5000)
        lines.append(f"{FIRST + (n + 30) / 30:.6f} {row(pose)}")
    text(folder / "groundtruth.txt", lines)
    return "balloon2"


def _kitti(clip: Clip, root: Path) -> str:
    drive = "2011_09_26_drive_0002_sync"
    for n, pixels, depth, _, _ in each(clip):
        name = f"{n + 5:010d}.png"  # the first five frames have no depth
        image(root / "2011_09_26" / drive / "image_02" / "data" / name, pixels)
        counts(root / "val" / drive / "proj_depth" / "groundtruth" / "image_02" / name, depth, 256)
    image(root / "2011_09_26" / drive / "image_02" / "data" / f"{0:010d}.png", pixels)
    return f"{drive}_02"


def _kitti_odometry(clip: Clip, root: Path) -> str:
    for n, pixels, _, _, _ in each(clip):
        image(root / "sequences" / "04" / "image_2" / f"{n:06d}.png", pixels)
    camera = np.column_stack((clip.intrinsics.numpy(), (45.0, 0, 0)))
    text(root / "sequences" / "04" / "calib.txt", [f"P{n}: {row(camera if n == 2 else 0 * camera)}" for n in range(4)])
    text(root / "sequences" / "04" / "times.txt", [f"{t:.17g}" for t in clip.times.tolist()])
    text(root / "poses" / "04.txt", [row(pose[:3]) for pose in clip.poses.numpy()])
    return "04"


def _scannet(clip: Clip, root: Path) -> str:
    folder = root / "scene0707_00"
    for n, pixels, depth, pose, _ in each(clip):
        image(folder / "color" / f"{n}.jpg", pixels)
        counts(folder / "depth" / f"{n}.png", depth, 1000)
        text(folder / "pose" / f"{n}.txt", [row(line) for line in pose])
    camera = np.eye(4)
    camera[:3, :3] = clip.intrinsics.numpy()
    text(folder / "intrinsic" / "intrinsic_color.txt", [row(line) for line in camera])
    return folder.name


def _davis(year: str) -> Callable[[Clip, Path], str]:
    def written(clip: Clip, root: Path) -> str:
        lines = []
        for n, pixels, _, _, mask in each(clip):
            names = f"JPEGImages/480p/blackswan/{n:05d}.jpg", f"Annotations/480p/blackswan/{n:05d}.png"
            lines.append(" ".join(f"/{x}" for x in names))
            image(root / names[0], pixels)
            if year == "2016":
                image(root / names[1], mask.astype(np.uint8) * 255)
                continue
            labels = mask.astype(np.uint8) * (1 + (np.arange(mask.shape[1]) % 2).astype(np.uint8))  # two objects
            picture = Image.fromarray(labels, "P")
            picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            (root / names[1]).parent.mkdir(parents=True, exist_ok=True)
            picture.save(root / names[1])
        if year == "2016":  # the first release lists files, the second names
            text(root / "ImageSets" / "480p" / "val.txt", lines)
        else:
            text(root / "ImageSets" / "2017" / "val.txt", ["blackswan"])
        return "blackswan"

    return written


def _dycheck(clip: Clip, root: Path) -> str:
    folder = root / "apple"
    for n, pixels, depth, pose, _ in each(clip):
        image(folder / "rgb" / "1x" / f"0_{n:05d}.png", pixels)
        image(folder / "rgb" / "1x" / f"1_{n:05d}.png", pixels[::-1])  # a still camera, for views that are held out
        (folder / "depth" / "1x").mkdir(parents=True, exist_ok=True)
        np.save(folder / "depth" / "1x" / f"0_{n:05d}.npy", depth[..., None].astype(np.float32))
        k = clip.intrinsics.numpy()
        camera = {
            "orientation": pose[:3, :3].T.tolist(), "position": pose[:3, 3].tolist(), "focal_length": k[0, 0],
            "principal_point": [k[0, 2], k[1, 2]], "skew": 0.0, "pixel_aspect_ratio": k[1, 1] / k[0, 0],
            "radial_distortion": [0, 0, 0], "tangential": [0, 0], "image_size": list(depth.shape[::-1]),
        }  # fmt: skip
        text(folder / "camera" / f"0_{n:05d}.json", [json.dumps(camera)])
    return "apple"


def _seven_scenes(clip: Clip, root: Path) -> str:
    for n, pixels, depth, pose, _ in each(clip):
        stem = root / "chess" / "seq-03" / f"frame-{n:06d}"
        image(stem.with_name(f"{stem.name}.color.png"), pixels)
        counts(stem.with_name(f"{stem.name}.depth.png"), depth, 1000)
        text(stem.with_name(f"{stem.name}.pose.txt"), [row(line) for line in pose])
    (root / "chess" / "seq-01").mkdir()  # of the training split
    text(root / "chess" / "TestSplit.txt", ["sequence3"])
    return "chess/seq-03"


def _point_odyssey(clip: Clip, root: Path) -> str:
    folder = root / "val" / "ani"
    for n, pixels, depth, _, _ in each(clip):
        image(folder / "rgbs" / f"rgb_{n:05d}.jpg", pixels)
        counts(folder / "depths" / f"depth_{n:05d}.png", depth, 65.535)
    cameras = np.linalg.inv(clip.poses.numpy()), np.repeat(clip.intrinsics.numpy()[None], len(clip.frames), 0)
    np.savez(folder / "anno.npz", extrinsics=cameras[0], intrinsics=cameras[1])
    return "ani"


def _vkitti(clip: Clip, root: Path) -> str:
    folder = root / "Scene01" / "clone"
    outside = ["frame cameraID r1,1 r1,2 r1,3 t1 r2,1 r2,2 r2,3 t2 r3,1 r3,2 r3,3 t3 0 0 0 1"]
    inside = ["frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]"]
    k = clip.intrinsics.numpy()
    for n, pixels, depth, pose, _ in each(clip):
        image(folder / "frames" / "rgb" / "Camera_0" / f"rgb_{n:05d}.jpg", pixels)
        counts(folder / "frames" / "depth" / "Camera_0" / f"depth_{n:05d}.png", depth, 100)
        for camera in range(2):  # the second one of the stereo pair is somewhere else
            moved = np.linalg.inv(pose) + camera
            outside.append(f"{n} {camera} {row(moved)}")
            inside.append(f"{n} {camera} {row((k[0, 0], k[1, 1], k[0, 2], k[1, 2] + camera))}")
    text(folder / "extrinsic.txt", outside)
    text(folder / "intrinsic.txt", inside)
    return "Scene01/clone"


WRITERS: dict[str, Callable[[Clip, Path], str]] = {
    "sintel": _sintel, "tum-dynamics": _tum, "bonn": _bonn, "kitti": _kitti, "kitti-odometry": _kitti_odometry,
    "scannet": _scannet, "davis-2016": _davis("2016"), "davis-2017": _davis("2017"), "dycheck": _dycheck,
    "7-scenes": _seven_scenes, "point-odyssey": _point_odyssey, "virtual-kitti-2": _vkitti,
}  # fmt: skip
