"""A synthetic world whose truth is known exactly, and an analyser that reads any clip of it back.

One coloured shape moves over an endless textured backdrop. `World.draw_scene` decides, `World.render` paints,
`render_world` fills a folder with real mp4 files and captions, and `analyse` measures colour, shape, motion and camera
of a clip without a learned network, so that "it followed the prompt" is a number. Positions are (x, y) in pixels of the
view, y pointing down, with pixel centres at whole numbers.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Complex64, Float, Float32, UInt8

from reelflow.config import configuration, to_dict
from reelflow.data.video import write_video
from reelflow.errors import ConfigError, DataError, nearest

__all__ = [
    "COLOURS",
    "COMBINATIONS",
    "MOTIONS",
    "SHAPES",
    "Combination",
    "Reading",
    "Rendered",
    "Scene",
    "World",
    "analyse",
    "caption",
    "prompt",
    "render_world",
    "score_clip",
    "split_combinations",
]

AT_ONCE = 64  # clips handed to the threads together; an interrupt waits for no more than these
PAINT = {  # RGB, about 60 degrees of hue apart
    "red": (218, 46, 44),
    "green": (52, 172, 70),
    "blue": (48, 84, 222),
    "yellow": (234, 208, 52),
    "magenta": (208, 56, 196),
    "cyan": (52, 200, 212),
}
REACH = {"disc": 1.0, "square": 0.89, "triangle": 1.25, "ring": 1.1}  # farthest extent along an axis, in radii
STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0), "circling": (0, 0)}
WORDS = {  # three ways to say each motion, one per grammatical form used in PHRASINGS
    "left": ("moving left", "drifting to the left", "moves left"),
    "right": ("moving right", "drifting to the right", "moves right"),
    "up": ("moving up", "drifting up", "moves up"),
    "down": ("moving down", "drifting down", "moves down"),
    "still": ("staying still", "not moving", "stays still"),
    "circling": ("moving in circles", "going around", "moves in circles"),
}
PHRASINGS = (  # the first is the canonical one, used by `prompt`
    "a {colour} {shape} {moving}",
    "{colour} {shape} {drifting}",
    "the {shape} is {colour} and {moves}",
    "there is a {colour} {shape} {moving}",
    "a {shape} in {colour} {drifting}",
    "a video of a {colour} {shape} {moving}",
)

COLOURS, SHAPES, MOTIONS = tuple(PAINT), tuple(REACH), tuple(STEP)


class Combination(NamedTuple):
    """What a prompt names."""

    colour: str
    shape: str
    motion: str


COMBINATIONS = tuple(itertools.starmap(Combination, itertools.product(COLOURS, SHAPES, MOTIONS)))


@configuration
class Scene:
    """Everything that determines a clip of a given world; lengths in pixels, times in frames.

    The object's centroid in frame t is `origin + t * velocity + orbit * (cos, sin)(phase + t * spin)`.
    """

    colour: str
    shape: str
    motion: str
    radius: float
    shade: float  # factor on the palette colour
    origin: tuple[float, float]
    velocity: tuple[float, float]
    orbit: float
    phase: float  # radians
    spin: float  # radians per frame
    pan: tuple[float, float]  # camera velocity
    backdrop: int  # seed of the texture
    phrasing: int  # index into the caption templates

    def __post_init__(self) -> None:
        _check_names(self.colour, self.shape, self.motion)
        if not 0 <= self.phrasing < len(PHRASINGS):
            raise ConfigError(f"phrasing must be in 0..{len(PHRASINGS) - 1}, got {self.phrasing}")

    @property
    def combination(self) -> Combination:
        return Combination(self.colour, self.shape, self.motion)


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A clip and its truth."""

    frames: UInt8[np.ndarray, "T H W 3"]
    caption: str
    label: int  # index into COMBINATIONS
    trajectory: Float32[np.ndarray, "T 2"]  # the object's centroid in the view
    mask: Float32[np.ndarray, "T H W"]  # share of each pixel that the object covers
    pan: Float32[np.ndarray, "T 2"]  # where the view's corner is in the world, from (0, 0)


@configuration
class World:
    """Size and look of the clips; sizes and speeds of what moves follow min(height, width).

    Motion is relative to the view: under a panning camera a "still" object stays put on the screen.
    """

    height: int = 64
    width: int = 64
    num_frames: int = 17
    fps: float = 8.0
    contrast: float = 0.25  # of the backdrop, 0 (flat) to 1
    max_pan: float = 0.0  # fastest camera, pixels per frame

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 24:
            raise ConfigError(
                f"a world needs at least 24 x 24 pixels to tell shapes apart, got {self.height} x {self.width}"
            )
        if self.num_frames < 5:
            raise ConfigError(f"a world needs at least 5 frames to tell motions apart, got {self.num_frames}")
        if not (self.fps > 0 and math.isfinite(self.fps)):
            raise ConfigError(f"fps must be positive, got {self.fps}")
        if not 0 <= self.contrast <= 1:
            raise ConfigError(f"contrast must be between 0 and 1, got {self.contrast}")
        if not 0 <= self.max_pan <= self.size / 8:
            raise ConfigError(f"max_pan must be between 0 and {self.size / 8:g} pixels per frame, got {self.max_pan}")

    @property
    def size(self) -> int:
        """The shorter side, in pixels: the unit of every length in the world."""
        return min(self.height, self.width)

    def draw_scene(
        self,
        rng: np.random.Generator,
        *,
        colour: str | None = None,
        shape: str | None = None,
        motion: str | None = None,
    ) -> Scene:
        """Draw a scene in which the object stays wholly inside the view; names that are not given are drawn too.

        Straight motion covers 1.2 to 2 pixels per frame of a 64 pixel view (less where a long clip leaves no room),
        a circle is a clock hand's: from the top, clockwise, with a radius of 10 to 13 % of the view, in 16 to 21 frames
        (at least 0.75 turns per clip).

        Raises:
            ConfigError: a name is unknown; the nearest is offered.
        """
        drawn = COMBINATIONS[rng.integers(len(COMBINATIONS))]
        given = {"colour": colour, "shape": shape, "motion": motion}
        colour, shape, motion = drawn._replace(**{k: v for k, v in given.items() if v is not None})
        _check_names(colour, shape, motion)
        steps = self.num_frames - 1
        radius = rng.uniform(0.19, 0.23) * self.size
        low = REACH[shape] * radius + 1
        high = np.array([self.width - 1, self.height - 1]) - low

        speed = np.minimum(rng.uniform(1.2, 2.0) * self.size / 64, 0.95 * (high - low) / steps)
        orbit = min(rng.uniform(0.10, 0.13) * self.size, 0.45 * (high - low).min()) if motion == "circling" else 0.0
        turns = max(0.75, rng.uniform(0.75, 1.0) * steps / 16)
        angle, pan = rng.uniform(0, 2 * math.pi), rng.uniform(0, self.max_pan)
        scene = Scene(
            colour=colour,
            shape=shape,
            motion=motion,
            radius=radius,
            shade=rng.uniform(0.92, 1.06),
            origin=(0.0, 0.0),
            velocity=_pair(speed * STEP[motion]),
            orbit=orbit,
            phase=-math.pi / 2,
            spin=2 * math.pi * turns / steps,
            pan=(pan * math.cos(angle), pan * math.sin(angle)),
            backdrop=int(rng.integers(2**32)),
            phrasing=int(rng.integers(len(PHRASINGS))),
        )
        path = self.trajectory(scene)
        return dataclasses.replace(scene, origin=_pair(rng.uniform(low - path.min(0), high - path.max(0))))

    def trajectory(self, scene: Scene) -> Float[np.ndarray, "T 2"]:
        """Follow the object's centroid through the view, in pixels (x, y)."""
        t = np.arange(self.num_frames)[:, None]
        angle = scene.phase + t * scene.spin
        return scene.origin + t * np.array(scene.velocity) + scene.orbit * np.hstack([np.cos(angle), np.sin(angle)])

    def render(self, scene: Scene) -> Rendered:
        """Paint `scene`: a flat, anti-aliased shape over the backdrop that the camera sees."""
        path = self.trajectory(scene)
        pan = np.arange(self.num_frames)[:, None] * np.array(scene.pan)
        backdrop = np.rint(self._backdrop(scene, pan if pan.any() else pan[:1])).astype(np.uint8)
        frames = np.broadcast_to(backdrop, (self.num_frames, *backdrop.shape[1:])).copy()
        mask = np.zeros(frames.shape[:3], np.float32)

        # Only a square box around the object is touched.
        box = math.ceil(2 * REACH[scene.shape] * scene.radius) + 3
        corner = np.clip(np.ceil(path - box / 2), 0, [self.width - box, self.height - box]).astype(int)
        cells = corner[:, None] + np.arange(box)[None, :, None] - path[:, None]  # T box 2, relative to the centroid
        x, y = cells[:, None, :, 0].astype(np.float32), cells[:, :, None, 1].astype(np.float32)
        coverage = np.clip(0.5 - _distance(scene.shape, x, y, scene.radius), 0, 1)
        paint = np.minimum(np.multiply(PAINT[scene.colour], scene.shade), 255).astype(np.float32)
        for t, (left, top) in enumerate(corner):
            window = (t, slice(top, top + box), slice(left, left + box))
            behind = frames[window].astype(np.float32)
            frames[window] = np.rint(behind + coverage[t, :, :, None] * (paint - behind))
            mask[window] = coverage[t]
        return Rendered(
            frames=frames,
            caption=caption(scene),
            label=COMBINATIONS.index(scene.combination),
            trajectory=path.astype(np.float32),
            mask=mask,
            pan=pan.astype(np.float32),
        )

    def _backdrop(self, scene: Scene, pan: Float[np.ndarray, "P 2"]) -> Float[np.ndarray, "P H W 3"]:
        """Sum a few long, muted plane waves: an endless texture, exact at any sub-pixel camera position."""
        rng, num_waves = np.random.default_rng(scene.backdrop), 8
        base = rng.uniform(80, 170) + rng.uniform(-16, 16, 3)
        cycles, phase = rng.uniform(0.4, 1.8, num_waves), rng.uniform(0, 2 * math.pi, num_waves)
        heading = (np.arange(num_waves) + rng.uniform(size=num_waves)) * math.pi / num_waves  # spread over all angles
        tint = (1 + rng.uniform(-0.35, 0.35, (num_waves, 3))) / cycles[:, None]
        tint *= 64 * self.contrast / np.sqrt((tint**2).mean(1).sum() / 2)  # levels, root mean square

        # cos(kx x + ky y + phase) is the real part of a row factor times a column factor: the sum is a matrix product.
        wave = 2j * math.pi * cycles / self.size
        across = np.exp(wave * np.cos(heading) * (np.arange(self.width)[:, None] + pan[:, None, :1]))  # P W waves
        down = np.exp(wave * np.sin(heading) * (np.arange(self.height)[:, None] + pan[:, None, 1:]) + 1j * phase)
        rows = (down[:, :, None] * tint.T).astype(np.complex64)  # P H 3 waves
        columns = across.swapaxes(1, 2).astype(np.complex64)[:, None]
        return np.clip(base[:, None] + (rows @ columns).real, 0, 255).swapaxes(2, 3)


def caption(scene: Scene) -> str:
    """Describe `scene` in its own phrasing, in ten words or fewer."""
    return _phrase(scene.phrasing, scene.combination)


def prompt(colour: str, shape: str, motion: str) -> str:
    """Describe a combination in the canonical phrasing, as in "a red ring moving left".

    Raises:
        ConfigError: a name is unknown; the nearest is offered.
    """
    _check_names(colour, shape, motion)
    return _phrase(0, Combination(colour, shape, motion))


def split_combinations(
    *, held_out_fraction: float = 0.11, seed: int
) -> tuple[tuple[Combination, ...], tuple[Combination, ...]]:
    """Return (train, held out) combinations, such that each name is held out equally often, give or take one.

    The held-out ones walk the diagonals of the colour x motion table, so every pair of names still occurs in train.

    Raises:
        ConfigError: the fraction is not between 0 and 0.25 (one shape for each cell of the table).
    """
    if not 0 <= held_out_fraction <= 0.25:
        raise ConfigError(f"held_out_fraction must be between 0 and 0.25, got {held_out_fraction}")
    rng = np.random.default_rng(seed)
    colours, shapes, motions = ([names[i] for i in rng.permutation(len(names))] for names in (COLOURS, SHAPES, MOTIONS))
    held_out = {
        Combination(colours[k % 6], shapes[(k + k // 12) % 4], motions[(k + k // 6) % 6])
        for k in range(round(held_out_fraction * len(COMBINATIONS)))
    }
    return tuple(c for c in COMBINATIONS if c not in held_out), tuple(c for c in COMBINATIONS if c in held_out)


def render_world(
    folder: Path,
    world: World,
    *,
    num_clips: int,
    combinations: Sequence[Combination] = COMBINATIONS,
    seed: int,
    on_clip: Callable[[int, int], None] | None = None,
) -> None:
    """Fill `folder` with NNNNN.mp4 and NNNNN.txt (the caption), and `world.json`: the truth of every clip.

    Combinations take turns in shuffled rounds, so their counts differ by at most one. Clip i depends on the seed and
    on i alone. `world.json` comes last: it marks a folder that is complete. `on_clip(done, num_clips)` follows along.

    Raises:
        ConfigError: there is nothing to render.
        DataError: the folder already holds something.
    """
    if num_clips < 1 or not combinations:
        raise ConfigError(
            f"nothing to render: {num_clips} clips of {len(combinations)} combinations; both must be >= 1"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not an empty folder; give a new one, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)

    def make(index: int) -> dict[str, Any]:
        round_number, turn = divmod(index, len(combinations))
        order = np.random.default_rng([seed, 0, round_number]).permutation(len(combinations))
        scene = world.draw_scene(np.random.default_rng([seed, 1, index]), **combinations[order[turn]]._asdict())
        clip, name = world.render(scene), f"{index:05d}"
        write_video(folder / f"{name}.mp4", clip.frames, fps=world.fps)
        _write_text(folder / f"{name}.txt", clip.caption + "\n")
        return {
            "file": f"{name}.mp4",
            "caption": clip.caption,
            "label": clip.label,
            "scene": dataclasses.asdict(scene),
            "trajectory": clip.trajectory.round(3).tolist(),
            "pan": clip.pan.round(3).tolist(),
        }

    clips: list[dict[str, Any]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of a clip's time is its encoding, which runs beside Python
        for start in range(0, num_clips, AT_ONCE):
            for clip in pool.map(make, range(start, min(start + AT_ONCE, num_clips))):
                clips.append(clip)
                if on_clip:
                    on_clip(len(clips), num_clips)
    _write_text(folder / "world.json", json.dumps({"world": to_dict(world), "seed": seed, "clips": clips}))


# --- reading a clip back ---------------------------------------------------------------------------------------------

# R + w G + w^2 B, with w a cube root of one: a plane without lightness, where the angle is hue and the length chroma.
OPPONENT = np.array([[1, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], np.float32)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a clip shows; None and NaN where it cannot be told."""

    colour: str | None
    shape: str | None
    motion: str | None  # relative to the view
    trajectory: Float32[np.ndarray, "T 2"]  # centroid; NaN in frames without the object
    pan: Float32[np.ndarray, "T 2"]  # camera position in the world, from (0, 0)
    confidence: float  # share of frames that show the object x likeness of its outline to the best template; 0 if none


def analyse(frames: UInt8[np.ndarray, "T H W 3"]) -> Reading:
    """Read any clip back with no learned network, robust to blur, noise, compression and shifted colours.

    The backdrop is muted and the object is not, so a plane without lightness separates them: the hue that most of the
    colourful pixels share is the object's, and the distance to it gives a soft mask. The mask's centroid tells the
    motion; the mask averaged around its centroid over all frames is compared with blurred templates of each shape.

    Raises:
        ConfigError: the clip has no frames, or is smaller than 8 x 8.
    """
    num_frames, height, width, _ = frames.shape
    size = min(height, width)
    if num_frames < 1 or size < 8:
        raise ConfigError(f"a clip to analyse needs a frame of at least 8 x 8, got {num_frames} of {height} x {width}")
    chroma = _chroma(frames)
    colour, backdrop, paint = _dominant_colour(chroma)
    if colour is None:
        return _unread(frames)
    mask = 1 - abs(chroma - paint) / abs(backdrop - paint)
    mask *= mask > 0.3  # leaves texture and noise behind
    area, centroid = _centroid(mask)
    typical = float(np.median(area))
    if not 0.02 * size**2 < typical < 0.4 * size**2:
        return _unread(frames)
    radius = math.sqrt(typical / math.pi)
    mask *= _near(centroid, 2 * radius, np.arange(height), np.arange(width))  # and stray specks
    area, centroid = _centroid(mask)

    seen = area > 0.3 * typical
    if not seen.any():
        return _unread(frames)
    trajectory = np.where(seen[:, None], centroid, np.float32(np.nan))
    shape, likeness = _shape(mask[seen], trajectory[seen], radius)
    motion = _motion(np.flatnonzero(seen), trajectory[seen], size) if seen.mean() > 0.7 else None
    camera = _camera(frames, trajectory, 1.6 * radius)
    return Reading(colour, shape, motion, trajectory, camera, float(np.clip(seen.mean() * likeness, 0, 1)))


def score_clip(frames: UInt8[np.ndarray, "T H W 3"], colour: str, shape: str, motion: str) -> dict[str, bool]:
    """Say whether a clip shows the colour, the shape and the motion asked for, and all three at once.

    Raises:
        ConfigError: a name is unknown; the nearest is offered.
    """
    _check_names(colour, shape, motion)
    read = analyse(frames)
    right = {"colour": read.colour == colour, "shape": read.shape == shape, "motion": read.motion == motion}
    return right | {"all": all(right.values())}


def _unread(frames: UInt8[np.ndarray, "T H W 3"]) -> Reading:
    nowhere = np.full((len(frames), 2), np.nan, np.float32)
    return Reading(None, None, None, nowhere, _camera(frames, nowhere, 0.0), 0.0)


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """Turn R G B (the last axis) into one complex number, chroma x exp(i hue)."""
    plane = rgb.reshape(-1, 3).astype(np.float32) @ OPPONENT
    return plane.view(np.complex64).reshape(rgb.shape[:-1])


def _dominant_colour(chroma: Complex64[np.ndarray, "T H W"]) -> tuple[str | None, complex, complex]:
    """Name the hue of what stands out (None if nothing does), with the chroma of the backdrop and of the object."""
    _, height, width = chroma.shape
    sample = chroma[:, ::2, ::2].ravel()
    backdrop = complex(np.median(sample.real), np.median(sample.imag))
    contrast = abs(sample - backdrop)
    smallest = 0.04 * min(height, width) / max(height, width)  # well inside the smallest object's share of the view
    peak = np.quantile(contrast, 1 - smallest)
    vivid = sample[contrast > 0.7 * peak]
    hues = _chroma(np.array(list(PAINT.values())))
    closest = (vivid[:, None] * (hues / abs(hues)).conj()).real.argmax(1)
    votes = np.bincount(closest, abs(vivid), minlength=len(COLOURS))
    best = int(votes.argmax())
    if peak < 40 or votes[best] < 0.6 * votes.sum():
        return None, backdrop, backdrop
    paint = vivid[closest == best]
    return COLOURS[best], backdrop, complex(np.median(paint.real), np.median(paint.imag))


def _centroid(mask: Float32[np.ndarray, "T H W"]) -> tuple[Float32[np.ndarray, "T"], Float32[np.ndarray, "T 2"]]:
    """Measure each frame's area (pixels) and centroid (x, y)."""
    columns, rows = mask.sum(1), mask.sum(2)
    area = rows.sum(1)
    moments = np.stack([columns @ np.arange(columns.shape[1]), rows @ np.arange(rows.shape[1])], 1)
    return area, (moments / np.maximum(area, 1)[:, None]).astype(np.float32)


def _near(centre: Float32[np.ndarray, "T 2"], reach: float, y: np.ndarray, x: np.ndarray) -> Bool[np.ndarray, "T H W"]:
    """Mark the square around each frame's centre, on a grid of rows y and columns x; nothing where it is NaN."""
    return (abs(x - centre[:, :1]) < reach)[:, None, :] & (abs(y - centre[:, 1:]) < reach)[:, :, None]


def _shape(
    mask: Float32[np.ndarray, "T H W"], centre: Float32[np.ndarray, "T 2"], radius: float
) -> tuple[str | None, float]:
    """Correlate the mask, averaged around its centroid at a common scale, with each shape's templates."""
    grid = _template_grid()[:, None] * radius
    x, y = centre[:, 0, None, None], centre[:, 1, None, None]
    across = np.maximum(1 - abs(np.arange(mask.shape[2]) - x - grid), 0)  # T grid W: bilinear weights
    down = np.maximum(1 - abs(np.arange(mask.shape[1]) - y - grid), 0)
    outline = _standardised((down @ mask @ across.swapaxes(1, 2)).mean(0))
    likeness = (_templates() @ outline.ravel()).max(1)
    best = int(likeness.argmax())
    return (SHAPES[best] if likeness[best] > 0.75 else None), float(likeness[best])


def _template_grid() -> Float32[np.ndarray, "grid"]:
    return np.linspace(-1.9, 1.9, 40, dtype=np.float32)


@functools.cache
def _templates() -> Float32[np.ndarray, "shapes variants pixels"]:
    """Draw each shape around its centroid with unit equal-area radius, at several scales and blurs."""
    grid = _template_grid()
    cell, far = float(grid[1] - grid[0]), abs(grid[:, None] - grid)
    blurs = [np.exp(-0.5 * (far / sigma) ** 2) for sigma in (0.06, 0.14, 0.25)]
    bank = []
    for shape in SHAPES:
        fine = np.linspace(-2, 2, 400, dtype=np.float32)
        unit = math.sqrt((_distance(shape, fine, fine[:, None], 1.0) < 0).mean() * 16 / math.pi)
        for scale, blur in itertools.product((0.86, 0.93, 1.0, 1.08, 1.16), blurs):
            sharp = np.clip(0.5 - _distance(shape, grid, grid[:, None], scale / unit) / cell, 0, 1)
            bank.append(_standardised(blur @ sharp @ blur).ravel())
    return np.stack(bank).reshape(len(SHAPES), -1, grid.size**2)


def _motion(t: np.ndarray, path: Float32[np.ndarray, "T 2"], size: int) -> str | None:
    """Name a motion: hardly any spread is still, a line along an axis is a direction, one way round is circling."""
    if len(t) < 5:
        return None
    t, path = t - t.mean(), path - path.mean(0)
    spread = np.sqrt((path**2).sum(1).mean())
    if spread < 0.0016 * size * min(np.ptp(t), 16):  # a third of the slowest straight motion
        return "still"
    velocity = t @ path / (t @ t)
    if np.sqrt(((path - t[:, None] * velocity) ** 2).sum(1).mean()) < 0.5 * spread:
        minor, major = sorted(abs(velocity))
        if minor > 0.6 * major:
            return None
        x, y = velocity
        return ("left" if x < 0 else "right") if abs(x) == major else ("up" if y < 0 else "down")
    # Least-squares circle (Kasa 1976): x^2 + y^2 = 2 a x + 2 b y + c.
    a, b, _ = np.linalg.lstsq(np.column_stack([2 * path, np.ones(len(t))]), (path**2).sum(1), rcond=None)[0]
    spokes = path - [a, b]
    length, turned = np.hypot(*spokes.T), np.diff(np.unwrap(np.arctan2(spokes[:, 1], spokes[:, 0])))
    round_enough = length.std() < 0.3 * length.mean()
    one_way = abs(turned.sum()) > max(math.pi, 0.8 * abs(turned).sum())
    return "circling" if round_enough and one_way else None


def _camera(
    frames: UInt8[np.ndarray, "T H W 3"], centre: Float32[np.ndarray, "T 2"], margin: float
) -> Float32[np.ndarray, "T 2"]:
    """Add up the backdrop's frame-to-frame shifts (Lucas & Kanade 1981), `margin` pixels away from the object."""
    cell, (num_frames, height, width) = 4, frames.shape[:3]  # averaging cells quietens noise
    rows, columns = height // cell, width // cell
    cells = frames[:, : rows * cell, : columns * cell].reshape(num_frames, rows, cell, columns * cell * 3)
    light = cells.sum(2, dtype=np.float32).reshape(num_frames, rows, columns, cell * 3).mean(3) / cell
    between, change = (light[1:] + light[:-1]) / 2, light[1:] - light[:-1]
    slope_y, slope_x = np.gradient(between, cell, axis=(1, 2))
    y, x = ((np.arange(n) + 0.5) * cell - 0.5 for n in (rows, columns))
    near = _near(centre, margin + cell, y, x)
    clear = ~(near[1:] | near[:-1])
    slope = (np.stack([slope_x, slope_y], -1) * clear[..., None]).reshape(-1, rows * columns, 2)
    squares = slope.swapaxes(1, 2) @ slope + np.eye(2, dtype=np.float32)  # a flat backdrop tells nothing: no movement
    shift = np.linalg.solve(squares, slope.swapaxes(1, 2) @ change.reshape(-1, rows * columns, 1))[..., 0]
    return np.vstack([np.zeros((1, 2), np.float32), shift.cumsum(0)]).astype(np.float32)


# --- small parts -----------------------------------------------------------------------------------------------------


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline of a shape whose centroid is at the origin, negative inside."""
    match shape:
        case "disc":
            return np.hypot(x, y) - radius
        case "square":
            return np.maximum(abs(x), abs(y)) - REACH["square"] * radius
        case "triangle":  # equilateral, pointing up
            return np.maximum(y, 0.75**0.5 * abs(x) - 0.5 * y) - REACH["triangle"] / 2 * radius
        case _:  # ring, with a hole of half the radius
            return abs(np.hypot(x, y) - 0.8 * radius) - 0.3 * radius


def _phrase(phrasing: int, names: Combination) -> str:
    moving, drifting, moves = WORDS[names.motion]
    return PHRASINGS[phrasing].format(
        colour=names.colour, shape=names.shape, moving=moving, drifting=drifting, moves=moves
    )


def _check_names(colour: str, shape: str, motion: str) -> None:
    for kind, name, known in (("colour", colour, COLOURS), ("shape", shape, SHAPES), ("motion", motion, MOTIONS)):
        if name not in known:
            raise ConfigError(f"unknown {kind} {name!r}; {nearest(name, known)}")


def _pair(xy: np.ndarray) -> tuple[float, float]:
    return float(xy[0]), float(xy[1])


def _standardised(image: np.ndarray) -> np.ndarray:
    """Zero mean and unit norm, so that a dot product is a correlation."""
    centred = image - image.mean()
    return (centred / max(float(np.linalg.norm(centred)), 1e-6)).astype(np.float32)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
