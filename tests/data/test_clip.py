"""Reading clips, and refusing what is none."""

import os
import sys
import wave

import av
import numpy as np
import pytest
import torch
from PIL import Image

from gate4d.data.clip import fitted_size, read_clip


def picture(value: int, height: int = 40, width: int = 60) -> np.ndarray:
    image = np.full((height, width, 3), value, np.uint8)
    image[:, : width // 2, 0] = 255 - value
    return image


@pytest.fixture
def folder(tmp_path):
    for i in (1, 2, 10):  # natural order differs from the order of strings
        Image.fromarray(picture(20 * i)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image either")
    return tmp_path


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_folder_in_natural_order_cropped_to_patches(folder):
    clip = read_clip(folder, patch=14)
    assert clip.frames.shape == (3, 28, 56, 3)
    assert clip.frames.dtype == torch.uint8
    assert clip.frames[:, 0, -1, 1].tolist() == [20, 40, 200]
    assert clip.masks is None


def test_whole_patches_are_left_as_they_are(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (2, 28, 42, 3), dtype=np.uint8)
    for i in range(2):
        Image.fromarray(noise[i]).save(tmp_path / f"{i}.png")
    assert torch.equal(read_clip(tmp_path, patch=14).frames, torch.from_numpy(noise))
    middle = read_clip(tmp_path, patch=28).frames
    assert torch.equal(middle, torch.from_numpy(noise)[:, :, 7:35])


def test_stride_and_max_frames(folder):
    assert read_clip(folder, stride=2).frames[:, 0, -1, 1].tolist() == [20, 200]
    assert len(read_clip(folder, max_frames=2).frames) == 2


def test_start_and_no_limit(tmp_path):
    for i in range(30):
        Image.fromarray(np.full((28, 28, 3), 8 * i, np.uint8)).save(tmp_path / f"{i}.png")

    def shown(**options):
        return (read_clip(tmp_path, **options).frames[:, 0, 0, 0] // 8).tolist()

    assert shown() == list(range(24))
    assert shown(max_frames=None) == list(range(30))
    assert shown(start=7, stride=5, max_frames=None) == [7, 12, 17, 22, 27]
    assert shown(start=27, max_frames=2) == [27, 28]
    with pytest.raises(ValueError, match=r"at least 2 frames are needed, got 1 from .* with stride=1 and start=29"):
        shown(start=29)
    with pytest.raises(ValueError, match="start must be an int >= 0, got -1"):
        shown(start=-1)


def test_start_of_a_video(video):
    level = read_clip(video, start=2, max_frames=None).frames.float().mean((1, 2, 3))
    whole = read_clip(video, max_frames=None).frames.float().mean((1, 2, 3))
    assert torch.equal(level, whole[2:])


def test_grey_palette_and_alpha_images(tmp_path):
    for i, mode in enumerate(("L", "P", "RGBA", "1")):
        Image.fromarray(picture(0)).convert(mode).save(tmp_path / f"{i}.png")
    assert read_clip(tmp_path).frames.shape == (4, 28, 56, 3)


def test_video(video):
    clip = read_clip(video, max_frames=5)
    assert clip.frames.shape == (5, 42, 56, 3)
    level = clip.frames.float().mean((1, 2, 3))
    assert (level - 40 * torch.arange(5)).abs().max() < 6  # lossy
    assert read_clip(video, stride=2).frames.shape[0] == 3


@pytest.mark.parametrize(("height", "width"), [(392, 518), (1080, 1920), (10, 10), (5, 4000), (4000, 5), (720, 1280)])
@pytest.mark.parametrize("max_patches", [1, 6, 414])
def test_fitted_size(height, width, max_patches):
    h, w = fitted_size(height, width, patch=14, max_patches=max_patches)
    assert h % 14 == w % 14 == 0
    assert h >= 14
    assert w >= 14
    assert (h // 14) * (w // 14) <= max_patches
    assert h <= max(height, 14)
    assert w <= max(width, 14)


@pytest.mark.parametrize(("height", "width"), [(5, 200), (200, 5), (1080, 1920), (10, 10)])
def test_any_picture_is_fitted(tmp_path, height, width):
    for i in range(2):
        Image.fromarray(picture(99, height, width)).save(tmp_path / f"{i}.png")
    size = fitted_size(height, width, patch=14, max_patches=6)
    assert read_clip(tmp_path, max_patches=6).frames.shape == (2, *size, 3)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"clip: nothing found at .*missing\.mp4"):
        read_clip(tmp_path / "missing.mp4")


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        read_clip(tmp_path)


def test_one_frame(tmp_path):
    Image.fromarray(picture(1)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="at least 2 frames are needed, got 1"):
        read_clip(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: b"garbage", lambda data: b"", lambda data: data[: len(data) // 2]])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_unreadable_frame_in_the_middle(tmp_path, damage, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(noise).save(tmp_path / f"{i}.{suffix}")
    bad = tmp_path / f"2.{suffix}"
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(ValueError, match=rf"frame 2 cannot be read, .*2\.{suffix}"):
        read_clip(tmp_path)


def test_frames_of_different_size(folder):
    Image.fromarray(picture(3, 50, 60)).save(folder / "frame3.png")
    with pytest.raises(ValueError, match=r"frame3\.png is 60x50 and the first frame is 60x40"):
        read_clip(folder)


@pytest.mark.parametrize("content", [b"", b"this is a text file\n" * 50, bytes(range(256)) * 40])
def test_not_a_video(tmp_path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"clip: .*clip\.mp4 is not a readable video"):
        read_clip(path)


def test_truncated_video(video):
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"clip\.mp4 (is not a readable video|cannot be decoded|has no video stream)"):
        read_clip(video)


def test_sound_only(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with pytest.raises(ValueError, match="has no video stream"):
        read_clip(tmp_path / "sound.wav")


@pytest.mark.parametrize(("module", "what"), [("PIL", "images"), ("av", "video")])
def test_missing_extra_is_named(folder, monkeypatch, module, what):
    monkeypatch.setitem(sys.modules, module, None)
    path = folder if module == "PIL" else folder / "notes.txt"
    with pytest.raises(ImportError, match=rf"Reading .*{what} needs .*gate4d\[demo\]"):
        read_clip(path)


@pytest.mark.parametrize(
    ("option", "value"), [("max_frames", 1), ("stride", 0), ("patch", 0), ("max_patches", 0), ("stride", 1.5)]
)
def test_bad_options(folder, option, value):
    with pytest.raises(ValueError, match=option):
        read_clip(folder, **{option: value})


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_are_scaled(tmp_path, kind):
    """Pillow alone turns every value above 255 into white."""
    ramp = np.linspace(0, 65535, 28 * 28).round().astype(np.uint16).reshape(28, 28)
    for i in range(2):
        Image.fromarray(ramp).save(tmp_path / f"{i}.{kind}")
    frames = read_clip(tmp_path, patch=14).frames
    expected = np.rint(ramp / 257).astype(np.uint8)
    assert torch.equal(frames, torch.from_numpy(expected)[None, ..., None].expand(2, -1, -1, 3))


def test_32_bits_without_a_range_are_named(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((28, 28), 0.5, np.float32)).save(tmp_path / f"{i}.tif")
    with pytest.raises(ValueError, match=r"frame 0 cannot be read, .*no known range"):
        read_clip(tmp_path)


def test_times_of_a_video_and_of_images_named_by_them(video, tmp_path):
    torch.testing.assert_close(read_clip(video).times, torch.arange(6).double() / 10)
    torch.testing.assert_close(read_clip(video, stride=2).times, torch.tensor([0.0, 0.2, 0.4]).double())
    for names, times in (
        (
            ["1341846313.592026", "1341846313.628014", "1341846313.7"],
            [1341846313.592026, 1341846313.628014, 1341846313.7],
        ),
        (["1403636579763555584", "1403636579813555456"], [1403636579.763555584, 1403636579.813555456]),
        (["frame1", "frame2"], None),
        (["1", "2"], None),  # numbers of frames
        (["1.5", "frame2"], None),
    ):
        folder = tmp_path / names[0]
        folder.mkdir()
        for i, name in enumerate(names):
            Image.fromarray(picture(20 * i)).save(folder / f"{name}.png")
        clip = read_clip(folder)
        assert clip.frames[:, 0, -1, 1].tolist() == [20 * i for i in range(len(names))]
        assert clip.times is None if times is None else clip.times.tolist() == times


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(ValueError, match="is neither a file nor a folder"):
        read_clip(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"frame 0 cannot be read, .*it is not a file"):
        read_clip(tmp_path)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 40), (40, 3)])
def test_frames_that_can_show_nothing_are_refused(tmp_path, height, width):
    for i in range(2):
        Image.fromarray(picture(99, height, width)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=rf"frames must be at least 4 pixels .* is {width}x{height}"):
        read_clip(tmp_path, patch=14)
    with pytest.raises(ValueError, match=rf"is {width}x{height}"):
        read_clip(tmp_path, patch=8)
