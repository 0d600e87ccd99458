"""Bad and extreme clips, the same for every method: a named error or finite results, never NaN."""

import warnings

import pytest
import torch
from standins import croco, factories, others

import gate4d
from gate4d.methods.results import collect

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

MODELS = {"easi3r": croco.Dust3rSteps, "more": factories.dense_vggt, "vggt4d": factories.deep_vggt,
          "mut3r": factories.dense_cut3r, "ttt3r": factories.dense_cut3r}  # fmt: skip
SIZE = {"easi3r": (32, 48), "more": (28, 42), "vggt4d": (28, 42), "mut3r": (32, 48), "ttt3r": (32, 48)}


@pytest.fixture(scope="module", params=MODELS)
def patched(request):
    torch.manual_seed(0)
    with gate4d.patch(MODELS[request.param](), method=request.param) as handle:
        yield request.param, handle


def finite(method, result):
    found = collect(result, SIZE[method])
    for name, x in (*found.scores.items(), ("heat", found.heat), ("poses", found.poses), ("points", found.points)):
        assert x is None or bool(x.isfinite().all()), name
    assert (found.masks is None) == (method == "ttt3r")
    return found


@pytest.mark.parametrize("kind", ["still", "black", "white", "two frames", "one frame"])
def test_extreme_clips_stay_finite(patched, kind):
    method, handle = patched
    count = {"two frames": 2, "one frame": 1}.get(kind, 6)
    clip = torch.rand(1, 3, *SIZE[method]).expand(count, -1, -1, -1)
    if kind in ("black", "white"):
        clip = torch.full_like(clip, float(kind == "white"))
    if method == "vggt4d" and count < 4:  # its window has sources 2, 4 and 6 frames away
        with pytest.raises(ValueError, match=rf"layout has {count} frame\(s\); .* Give a longer clip"):
            handle.run(clip)
        return
    if method == "easi3r" and count < 3:
        with pytest.raises(ValueError, match=f"at least 3 images.* got {count}"):
            handle.run(clip)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = finite(method, handle.run(clip))
    said = [str(w.message) for w in caught if "masks are" in str(w.message)]
    # With equal patches VGGT4D has no threshold, and says so; masks that are neither empty nor full need no word.
    degenerate = found.masks is not None and bool(found.masks.all() | ~found.masks.any())
    assert bool(said) == degenerate or method == "easi3r"  # it may also speak of its first pass
    if method in ("easi3r", "vggt4d") and kind in ("black", "white"):
        assert degenerate


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        (lambda h, w: torch.rand(0, 3, h, w), ValueError, "at least 1 frame|must be one clip"),
        (lambda h, w: torch.rand(6, 4, h, w), ValueError, "must have shape|must be one clip"),
        (lambda h, w: torch.rand(6, 3, h + 1, w), ValueError, "sides that are multiples of 1[46]"),
        (
            lambda h, w: torch.full((6, 3, h, w), torch.nan),
            ValueError,
            r"must hold values in \[0, 1\], got \[nan, nan\]",
        ),
        (lambda h, w: torch.rand(6, 3, h, w) * 255, ValueError, r"must hold values in \[0, 1\]"),
        (lambda h, w: torch.zeros(6, 3, h, w, dtype=torch.uint8), TypeError, "must be (a )?floating-point image"),
        (lambda h, w: ["a", "b"], TypeError, "got .*str"),
    ],
)
def test_bad_clips_are_named(patched, clip, error, message):
    method, handle = patched
    with pytest.raises(error, match=message):
        handle.run(clip(*SIZE[method]))


def test_frames_of_different_sizes(patched):
    method, handle = patched
    height, width = SIZE[method]
    clip = [torch.rand(3, height, width * (1 + t % 2)) for t in range(4)]
    if method == "more":  # documented: tokens may vary from frame to frame
        result = handle.run(clip)
        assert result.cameras.isfinite().all()
        with pytest.raises(ValueError, match="frames all have the size"):
            collect(result, SIZE[method])
    else:
        with pytest.raises(ValueError, match=r"frames? must have one size|images of one size"):
            handle.run(clip)


@pytest.mark.parametrize("method", MODELS)
def test_the_wrong_family_is_named_and_nothing_is_left_behind(method):
    for make in ((factories.dense_cut3r if method in ("more", "vggt4d") else factories.dense_vggt), others.Pi3):
        model = make()
        with pytest.raises(ValueError, match=f"method '{method}' needs a model of the family"):
            gate4d.patch(model, method=method)
        gate4d.patch(model).remove()


def test_one_patch_has_no_saliency():
    with gate4d.patch(factories.deep_vggt(), method="vggt4d") as handle, pytest.raises(ValueError, match="2 patches"):
        handle.run(torch.rand(6, 3, 14, 14))
