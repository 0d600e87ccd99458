"""MoRe (arXiv 2603.05078) on the VGGT family: frame-causal attention, streaming, and a second look for the cameras.

Its training losses are in :mod:`gate4d.methods.losses`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..integrations.base import Options
from ..integrations.table import AttentionTable, require_family, require_parts
from ..nn.cache import FrameKVCache
from ..nn.control import AttentionControl
from ..visibility import TokenLayout, Visibility
from .clips import stream_images
from .method import ClipMethod, ClipResult

CAUSAL = ("frame", "token")
COPIED = "additional_camera_token"  # [1, 2, 1, C], the first for frame 0 and the second for all others


class MoreFrame(NamedTuple):
    """One frame of a stream.

    Attributes:
        prediction: what the model returns for a clip of this frame.
        camera: ``[B, 9]``, what its camera head returns (of several rounds, the last).
        mask: bool ``[B, H, W]``, True = moving, where the prediction has ``motion`` logits ``[B, 1, H, W]`` or
            ``[B, 1, H, W, 1]``; else None.
    """

    prediction: Any
    camera: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class MoreResult(ClipResult):
    """A clip: ``predictions`` as streamed; ``cameras`` after the camera pass where ``refined``, else as streamed.

    Attributes:
        frame_masks: ``mask`` of :class:`MoreFrame`, one a frame.
    """

    frame_masks: list[Tensor | None]


class More(ClipMethod):
    """Grouped causal attention: causal over frames, full inside a frame.

    While patched, a plain forward of a VGGT is frame-causal in its global blocks and its camera head, which is how such
    a model is trained. :meth:`stream` gives the same outputs frame by frame, from caches of keys and values; frames may
    differ in size, and so in their number of tokens. StreamVGGT and STream3R have causal masks of their own, which a
    plain forward keeps; they stream like VGGT. So does the authors' model, whose forward stays as it is: grouped causal
    where it was built with ``SparseAttention``, with a camera head that sees the whole clip.

    A model whose frames hang together by more than attention (:class:`gate4d.models.alternating.AlternatingModel`,
    which trains by ``model(images, causal=True)``) has a method ``carry``: what it returns is the ``past`` of each
    forward of a stream, by which the model goes on. Its frames have one size. As its pose is one step after another,
    its camera pass takes all frames, also those that left the cache, whose numbers are kept; so that alone grows.

    **The camera pass.** After the stream "each frame's cached camera query attends once more to all cached keys and
    values". Read here as: the frames' camera tokens go through all blocks again, alone. In global block l they query
    all keys and values of its cache, later frames' too. A frame block sees its own frame only, about which nothing new
    is known, so what it added to the camera token is kept from the stream (C numbers a block and frame, instead of a
    cache of its keys and values). The camera head then reads all of these tokens at once, each seeing all. The last
    frame's camera token comes out of the blocks as it was, since it had seen everything. With a window only the frames
    still cached are looked at again; those that left keep their camera. That is this project's reading, for models
    without a token of their own for it.

    The authors' code (github.com/HellexF/MoRe) has one: an additional learned camera token a frame, behind the clip's
    tokens. It sees all whole frames in the global blocks, and takes the place of its frame's camera token in a frame
    block that runs a second time. A model with that token (``additional_camera_token``) gets this pass: after a stream
    the cameras that its forward gives for the clip (``dup_pose_enc``). The frame blocks' inputs are kept for it,
    ``blocks * P * C`` numbers a cached frame, and every cached frame runs through them once more.

    Args:
        window: frames that a query sees, its own included; None for all.
        anchors: leading frames that stay visible beside the window.
        camera_pass: whether :meth:`run` ends with it; a stream then keeps ``(blocks + 1) * C`` numbers a cached frame
            (or what is said above).
        causal: ``"frame"``, or, as an ablation, ``"token"``: in global blocks a token sees only itself and those
            before it, as in a language model.
    """

    takes = ("window", "anchors")
    streams = True
    has_cameras = True

    def __init__(
        self,
        model: nn.Module,
        table: AttentionTable,
        *,
        window: int | None = None,
        anchors: int = 0,
        camera_pass: bool = True,
        causal: str = "frame",
    ):
        rows = table.select("global")
        require_family("more", rows or table, "vggt", "streamvggt", "stream3r", "more", "more-sparse")
        require_parts("more", model, ("aggregator", "camera_head"))
        self.aggregator = model.aggregator
        require_parts(
            "more", self.aggregator, ("frame_blocks", "global_blocks", "patch_embed", "patch_start_idx", "patch_size")
        )
        Options(window, anchors)  # refuses what does not fit
        if causal not in CAUSAL:
            raise ValueError(f"causal must be one of {list(CAUSAL)}, got {causal!r}.")
        self.model = model
        self.window, self.anchors, self.camera_pass, self.causal = window, anchors, camera_pass, causal
        self.closed = False
        self.carry = getattr(model, "carry", None)
        own = self.carry is not None or rows[0].family != "vggt"  # its plain forward stays as it is
        if causal == "token" and own:
            raise ValueError("causal='token' needs a VGGT: this model has a forward of its own that stays as it is.")
        self.globals = [row.control for row in rows]
        self.trunk = [row.control for row in table.select("camera head")]
        self._check_order(len(rows))
        if not own:
            inside = [row.control for row in table.select("frame")]
            for control, frame in zip(self.globals, inside, strict=True):
                control.visible = _Causal(frame, window, anchors, causal)
            for control in self.trunk:
                control.visible = _Causal(None, window, anchors, "frame")

    def stream(self, frames: Any) -> MoreStream:
        """An iterator of :class:`MoreFrame`, with memory that a window bounds; arguments and errors as :meth:`run`.

        Its :meth:`MoreStream.camera_pass` can be called between frames and at the end.
        """
        return MoreStream(self, frames)

    def run(self, frames: Any) -> MoreResult:
        """The whole clip.

        Args:
            frames: images ``[T, 3, H, W]`` or ``[B, T, 3, H, W]`` in [0, 1], or an iterable of images ``[3, H, W]`` or
                ``[B, 3, H, W]``; sides are multiples of the model's patch size, and may change from frame to frame
                unless the model has a ``carry``. One frame is enough.

        Raises:
            ValueError, TypeError: frames do not fit, or there are none.
        """
        predictions: list[Any] = []
        masks: list[Tensor | None] = []

        def take(step: MoreFrame) -> None:
            predictions.append(step.prediction)
            masks.append(step.mask)

        return replace(self._through(frames, take), predictions=predictions, frame_masks=masks)

    def feed(self, frames: Any, take: Callable[[Any], object]) -> MoreResult:
        return self._through(frames, lambda step: take(step.prediction))

    def _through(self, frames: Any, take: Callable[[MoreFrame], object]) -> MoreResult:
        """A stream to its end, whose frames go to ``take``, and the camera pass."""
        stream, streamed = self.stream(frames), []
        for step in stream:
            take(step)
            streamed.append(step.camera)
            del step  # else the last frame's prediction lives on while the next one is made
        cameras, refined = torch.stack(streamed, dim=1), torch.zeros(len(streamed), dtype=torch.bool)
        if self.camera_pass:
            held, again = stream.camera_pass()
            cameras[:, held] = again.to(cameras.dtype)
            refined[held] = True
        return MoreResult([], [], cameras=cameras, refined=refined)

    def close(self) -> None:
        """Streams cannot go on."""
        self.closed = True

    def _check_order(self, depth: int) -> None:
        """What the camera pass and the stream take for granted about the aggregator."""
        order = list(getattr(self.aggregator, "aa_order", ("frame", "global")))
        size, frame = getattr(self.aggregator, "aa_block_size", 1), len(self.aggregator.frame_blocks)
        if order != ["frame", "global"] or size != 1 or frame != depth:
            raise ValueError(
                "method 'more' needs frame and global blocks in turn, as many of one as of the other, got order "
                f"{order}, block size {size}, {frame} frame and {depth} global blocks."
            )
        tokens = {n: p for n, p in self.aggregator.named_parameters(recurse=False) if p.dim() == 4}
        self.copied = tokens.pop(COPIED, None)
        self.specials = [n for n, p in tokens.items() if p.shape[:2] == (1, 2)]
        found = sum(tokens[n].shape[2] for n in self.specials)
        if found != self.aggregator.patch_start_idx:
            raise ValueError(
                f"method 'more' needs {self.aggregator.patch_start_idx} special tokens in parameters [1, 2, n, C] of "
                f"{type(self.aggregator).__name__}, the first for frame 0 and the second for all others, got {found}."
            )


class MoreStream(Iterator[MoreFrame]):
    """The frames of a stream; several may run by turns.

    Runs the model on one frame at a time, with caches in its global blocks and its camera head.
    """

    def __init__(self, method: More, frames: Any):
        self.method = method
        reference = next(method.model.parameters())
        self.past = None if method.carry is None else method.carry()
        place = {"device": reference.device, "dtype": reference.dtype}
        self.images = stream_images(frames, method.aggregator.patch_size, **place, one_size=self.past is not None)
        token = method.causal == "token"
        self.caches = [
            FrameKVCache(method.window, anchors=method.anchors, ragged=True, token_causal=token) for _ in method.globals
        ]
        self.trunk = [_PerCall(method.window, method.anchors) for _ in method.trunk]
        self.number = 0
        # Of the cached frames, by number: the camera token [B, C] at the first block, and what each frame block added;
        # of a model with copied camera tokens, each frame block's tokens [B, P, C] and their positions [B, P, 2].
        self.start: dict[int, Tensor] = {}
        self.steps: list[dict[int, Tensor]] = [{} for _ in self.caches]
        self.places: dict[int, Tensor | None] = {}
        self.seen: dict[str, Any] = {}  # of the last frame

    def __next__(self) -> MoreFrame:
        with torch.no_grad():
            prediction, camera = self._step(next(self.images))
            logits = prediction.get("motion") if isinstance(prediction, dict) else None
            if logits is not None and logits.dim() == 5:
                logits = logits[..., 0]
            return MoreFrame(prediction, camera, None if logits is None else logits[:, 0] > 0)

    def _step(self, image: Tensor) -> tuple[Any, Tensor]:
        """Prediction and camera ``[B, 9]`` of the next frame ``[B, 3, H, W]``."""
        if self.method.closed:
            raise RuntimeError("the patch was removed: finish the stream before, or start a new one.")
        model, later = self.method.model, {}
        if self.number:  # a clip of one frame takes the first of each pair of special tokens: give it the second
            tokens = {n: getattr(self.method.aggregator, n) for n in self.method.specials}
            later = {f"aggregator.{n}": p[:, 1:].expand_as(p) for n, p in tokens.items()}
        by_view = list(inspect.signature(type(model).forward).parameters)[1] == "views"  # StreamVGGT
        for trunk in self.trunk:
            trunk.calls = 0
        with self._caching(self.trunk), self._watching(), self._plain():
            inputs = [{"img": image}] if by_view else image[:, None]
            carried = {} if self.past is None else {"past": self.past}
            prediction = functional_call(model, later, (inputs,), carried)
        self.number += 1
        held = set(self.caches[0].frame_ids) if self.past is None else self.start.keys()
        for kept in (self.start, self.places, *self.steps):
            for left in kept.keys() - held:
                del kept[left]
        return prediction, self.seen["camera"]

    @torch.no_grad()
    def camera_pass(self) -> tuple[list[int], Tensor]:
        """Numbers of the frames that are cached, in order, and their cameras ``[B, n, 9]`` from a second look.

        Raises:
            ValueError: no frame was read yet, or the method was told to do without (``camera_pass=False``).
        """
        if not self.start:
            raise ValueError("camera_pass needs a stream that has read a frame, of a method with camera_pass=True.")
        held = sorted(self.start)
        x = inside = torch.stack([self.start[n] for n in held], dim=1)  # [B, n, C]
        pos = self.seen["pos"]
        pos = None if pos is None else pos[:, :1].expand(-1, len(held), -1)
        aggregator = self.method.aggregator
        with self._caching(None):
            for layer, block in enumerate(aggregator.global_blocks):
                inside = self._inside(aggregator.frame_blocks[layer], layer, x, held)
                x = _first(block(inside, pos=pos))
            form, args, kwargs = self.seen["head"]
            with torch.autocast(x.device.type, enabled=False):  # as VGGT does
                out = self.method.model.camera_head(form.filled(inside, x), *args, **kwargs)
        cached = [n for n in held if n in self.caches[0].frame_ids]
        return cached, _last(out)[:, [held.index(n) for n in cached]]

    def _copy(self, camera: Tensor) -> Tensor:
        """The copied token of the current frame, ``[B, C]`` like its camera token."""
        first = self.number == 0 and not getattr(self.method.aggregator, "same_token", False)
        return self.method.copied[:, 0 if first else 1, 0].to(camera).expand_as(camera)

    def _inside(self, block: nn.Module, layer: int, x: Tensor, held: list[int]) -> Tensor:
        """The tokens of the camera pass ``[B, n, C]`` after a frame block."""
        kept = self.steps[layer]
        if self.method.copied is None:
            return x + torch.stack([kept[n] for n in held], dim=1)
        moved = []
        for i, n in enumerate(held):  # each in the place of its frame's camera token; frames may differ in size
            tokens = torch.cat((x[:, i : i + 1], kept[n][:, 1:]), dim=1)
            moved.append(_first(block(tokens, pos=self.places[n]))[:, 0])
        return torch.stack(moved, dim=1)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """The authors' aggregators without the copied tokens, which a stream adds at its end, and without the cache
        that they keep themselves from call to call."""
        aggregator, set_aside = self.method.aggregator, {}
        for owner, name, value in (
            (self.method.model, "additional_token", False),
            (aggregator, "additional_token", False),
            (aggregator, "global_kv_cache", [{"k": None, "v": None} for _ in aggregator.global_blocks]),
        ):
            if name in owner.__dict__:
                set_aside[owner, name] = owner.__dict__[name]
                owner.__dict__[name] = value
        try:
            yield
        finally:
            for (owner, name), value in set_aside.items():
                owner.__dict__[name] = value

    @contextmanager
    def _caching(self, trunk: list[_PerCall] | None) -> Iterator[None]:
        """Caches in their places; for a second look (``trunk`` None) only to be read, and none for the camera head."""
        own = [control.visible for control in self.method.trunk]
        try:
            for control, cache in zip(self.method.globals, self.caches, strict=True):
                control.cache, cache.frozen = cache, trunk is None
            for number, control in enumerate(self.method.trunk):
                control.cache = None if trunk is None else trunk[number]
                control.visible = None
            yield
        finally:
            for control in self.method.globals:
                control.cache = None
            for control, visible in zip(self.method.trunk, own, strict=True):
                control.cache, control.visible = None, visible

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Notes the camera token on its way through the blocks, and what the camera head gets and gives."""
        aggregator, seen = self.method.aggregator, self.seen

        def inside(layer: int):
            def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
                before, after = args[0][:, 0], _first(out)[:, 0]
                copied = self.method.copied
                if layer == 0:
                    if copied is not None:
                        self.places[self.number] = kwargs.get("pos", args[1] if len(args) > 1 else None)
                    self.start[self.number] = before.clone() if copied is None else self._copy(before)
                self.steps[layer][self.number] = after - before if copied is None else args[0].clone()
                seen["frame"] = after.clone()

            return hook

        def over_all(block: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            seen["pos"] = kwargs.get("pos", args[1] if len(args) > 1 else None)
            seen["global"] = _first(out)[:, 0].clone()

        def head(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            seen["camera"] = _last(out)[:, 0]
            if self.method.camera_pass:
                form = _HeadInput.of(args[0], seen["frame"][:, None], seen["global"][:, None])
                # The pass takes all frames at once, from the first: there is no past.
                seen["head"] = form, args[1:], {n: x for n, x in kwargs.items() if n != "past"}

        with ExitStack() as stack:
            if self.method.camera_pass:
                for layer, block in enumerate(aggregator.frame_blocks):
                    stack.callback(block.register_forward_hook(inside(layer), with_kwargs=True).remove)
                last = aggregator.global_blocks[-1]
                stack.callback(last.register_forward_hook(over_all, with_kwargs=True).remove)
            stack.callback(self.method.model.camera_head.register_forward_hook(head, with_kwargs=True).remove)
            yield


class _HeadInput(NamedTuple):
    """How a camera head takes the camera tokens: which tensors, and around them what.

    Attributes:
        both: whether a token is the frame block's and the global block's in one, or the latter alone.
        tokens: whether all tokens of a frame are given, of which it takes the first.
        layers: length of the list of which it takes the last, 0 for a tensor.
    """

    both: bool
    tokens: bool
    layers: int

    @classmethod
    def of(cls, given: Any, frame: Tensor, everywhere: Tensor) -> _HeadInput:  # [B, 1, C] each, of the last blocks
        """ValueError if ``given`` is not made of the two."""
        layers = len(given) if isinstance(given, (list, tuple)) else 0
        last = given[-1] if layers else given
        form = cls(last.shape[-1] == 2 * everywhere.shape[-1], last.dim() == 4, layers)
        shown = last[:, :, 0] if form.tokens else last
        if not torch.equal(shown, cls(form.both, False, 0).filled(frame, everywhere)):
            raise ValueError(
                "camera_pass=True needs a camera head that reads the camera tokens of the last blocks as they are."
            )
        return form

    def filled(self, frame: Tensor, everywhere: Tensor) -> Any:  # [B, n, C] each
        x = torch.cat((frame, everywhere), dim=-1) if self.both else everywhere
        x = x[:, :, None] if self.tokens else x
        return [None] * (self.layers - 1) + [x] if self.layers else x


class _PerCall:
    """A cache for each time that a module runs in a frame: camera heads refine their poses in rounds."""

    def __init__(self, window: int | None, anchors: int):
        self.settings = window, anchors
        self.caches: list[FrameKVCache] = []
        self.calls = 0

    def __call__(self) -> FrameKVCache:
        if self.calls == len(self.caches):
            self.caches.append(FrameKVCache(self.settings[0], anchors=self.settings[1]))
        self.calls += 1
        return self.caches[self.calls - 1]


class _Causal:
    """Visibility of a clip given at once.

    Args:
        frame: control of the frame block before, which knows how many tokens a frame has; None for 1.
        window, anchors, causal: as in :class:`More`.
    """

    def __init__(self, frame: AttentionControl | None, window: int | None, anchors: int, causal: str):
        self.frame = frame
        self.window, self.anchors, self.causal = window, anchors, causal
        self.made: tuple[TokenLayout, Visibility] | None = None

    def __call__(self, q: Tensor, k: Tensor) -> Visibility:
        size = 1 if self.frame is None else self.frame.tokens[0]
        layout = TokenLayout(q.shape[2] // size, size)
        if self.made is None or self.made[0] != layout:
            make = Visibility.token_causal if self.causal == "token" else Visibility.frame_causal
            self.made = layout, make(layout, self.window, self.anchors)
        return self.made[1]


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _last(out: Any) -> Tensor:
    """Of the rounds of a camera head, the last."""
    return out[-1] if isinstance(out, (list, tuple)) else out
