"""Files of every sort become the right frames or a clear error, and frames become files or nothing."""

import os
import resource
from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.data.video import Clip, VideoWriter, probe, read_clip, write_contact_sheet, write_image, write_video
from reelflow.errors import ConfigError, MediaError


def numbered(num_frames, height=32, width=48):
    """Frames whose brightness is their number: frame k is k * 10 everywhere."""
    return np.broadcast_to(
        (np.arange(num_frames) * 10).astype(np.uint8)[:, None, None, None], (num_frames, height, width, 3)
    )


def quadrants(height=32, width=48):
    """Red and green above blue and white."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2, 0] = 255
    image[: height // 2, width // 2 :, 1] = 255
    image[height // 2 :, : width // 2, 2] = 255
    image[height // 2 :, width // 2 :] = 255
    return image


def numbers(clip):
    return (clip.frames.float().mean((1, 2, 3)) / 10).round().int().tolist()


def corner_names(image):
    known = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white", (0, 0, 0): "black"}
    height, width = image.shape[:2]
    rows, columns = (height // 4, 3 * height // 4), (width // 4, 3 * width // 4)
    return [known[tuple((image[i, j] > 127).int().tolist())] for i in rows for j in columns]


def encode(
    path, frames, *, codec, pixels="yuv420p", times=None, tick=Fraction(1, 1000), rotate=None, source="rgb24", **options
):
    """Write a file as strangers do: any codec, any pixel format, any timestamps (in ticks), rotated or mirrored."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        if times is not None:
            stream.time_base = stream.codec_context.time_base = tick
        if rotate is not None:
            stream.set_display_rotation(rotate[0], hflip=rotate[1])
        for k, pixels_k in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_k), format=source)
            if times is not None:
                frame.pts, frame.time_base = times[k], tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "video.mp4"
    write_video(path, numbered(20), fps=10)
    return path


# ---- clips ---------------------------------------------------------------------------------------------------------


def test_every_level_survives_the_way_to_float_and_back():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    clip = Clip(levels, 8.0, "levels")
    pixels = clip.to_float()
    assert pixels.shape == (3, 2, 16, 16)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    again = Clip.from_float(pixels, fps=8.0, source="levels")
    assert torch.equal(again.frames, levels)


def test_values_out_of_range_are_clipped_and_nan_is_refused():
    pixels = torch.tensor([-3.0, 3.0, 0.0]).reshape(3, 1, 1, 1)
    assert Clip.from_float(pixels, fps=1.0, source="s").frames.flatten().tolist() == [0, 255, 128]
    with pytest.raises(MediaError, match="seed 4: the clip holds NaN"):
        Clip.from_float(pixels * torch.nan, fps=1.0, source="seed 4")


# ---- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".mkv"])
def test_a_written_video_reads_back_with_its_frames_rate_and_size(tmp_path, suffix):
    write_video(tmp_path / f"a{suffix}", torch.from_numpy(numbered(9).copy()), fps=12.5)
    clip = read_clip(tmp_path / f"a{suffix}")
    assert numbers(clip) == list(range(9))
    assert clip.fps == pytest.approx(12.5)
    assert clip.frames.shape == (9, 32, 48, 3)
    assert clip.source == str(tmp_path / f"a{suffix}")
    info = probe(tmp_path / f"a{suffix}")
    assert (info.height, info.width, info.rotation, info.num_frames_at(12.5)) == (32, 48, 0, 9)
    assert info.duration == pytest.approx(9 / 12.5, abs=0.01)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_mkv_is_lossless_at_any_size(tmp_path_factory, num_frames, height, width, seed):
    path = tmp_path_factory.mktemp("lossless") / "a.mkv"
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), np.uint8)
    write_video(path, frames, fps=24000 / 1001)
    assert np.array_equal(read_clip(path).frames.numpy(), frames)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_saturated_colours_do_not_shift(tmp_path, suffix):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (30, 140, 90)]
    frames = np.repeat(np.asarray(colours, np.uint8)[None, None], 32, axis=1).repeat(16, axis=2).repeat(3, axis=0)
    write_video(tmp_path / f"a{suffix}", frames, fps=8)
    back = read_clip(tmp_path / f"a{suffix}").frames.numpy().astype(float).reshape(3, 32, len(colours), 16, 3)
    assert np.abs(back.mean((0, 1, 3)) - colours).max() < 3


def test_mp4_is_what_every_player_plays_with_its_index_in_front(video):
    with av.open(str(video)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace) == ("h264", "yuv420p", 1)
    data = video.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".mkv", ".png"])
def test_the_same_frames_give_the_same_bytes(tmp_path, suffix):
    frames = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    for name in "ab":
        write_video(tmp_path / f"{name}{suffix}", frames, fps=8)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


# ---- windows and rates ---------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 59), count=st.integers(1, 10), suffix=st.sampled_from([".mp4", ".mkv", ".webm"]))
def test_a_window_equals_the_same_frames_of_the_whole(long_videos, first, count, suffix):
    path, whole = long_videos[suffix]
    count = min(count, 60 - first)
    for fps in (None, 30):
        window = read_clip(path, num_frames=count, fps=fps, start=first / 30)
        assert torch.equal(window.frames, whole.frames[first : first + count])


@pytest.fixture(scope="module")
def long_videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    frames = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)
    for suffix, codec in ((".mp4", "libx264"), (".mkv", "mpeg4"), (".webm", "libvpx-vp9")):
        encode(folder / f"a{suffix}", frames, codec=codec, times=range(60), tick=Fraction(1, 30), g=12)
    return {p.suffix: (p, read_clip(p)) for p in folder.iterdir()}


def test_a_window_late_in_a_file_is_reached_without_decoding_what_lies_before(long_videos, monkeypatch):
    from reelflow.data import video

    decoded = []
    original = video._decoded
    monkeypatch.setattr(
        video, "_decoded", lambda *a, **k: (decoded.append(frame[0]) or frame for frame in original(*a, **k))
    )
    read_clip(long_videos[".mp4"][0], num_frames=2, start=50 / 30)
    assert 36 / 30 <= decoded[0] <= 50 / 30, "begins at a key frame, and there is one every 12 frames"
    assert len(decoded) <= 50 - 36 + 3
    decoded.clear()
    read_clip(long_videos[".mp4"][0], num_frames=2)
    assert len(decoded) == 3


def test_a_lower_rate_takes_the_frame_on_the_screen_at_each_instant(tmp_path):
    encode(tmp_path / "a.mp4", numbered(25), codec="libx264", times=range(25), tick=Fraction(1, 25))
    clip = read_clip(tmp_path / "a.mp4", fps=8)
    assert numbers(clip) == [0, 3, 6, 9, 12, 15, 18, 21]  # the floor of k * 25 / 8
    assert clip.fps == 8
    assert probe(tmp_path / "a.mp4").num_frames_at(8) == 8
    assert numbers(read_clip(tmp_path / "a.mp4", fps=50, num_frames=5)) == [0, 0, 1, 1, 2]
    assert numbers(read_clip(tmp_path / "a.mp4", fps=8, num_frames=3, start=0.5)) == [12, 15, 18]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_is_resampled_by_timestamps(tmp_path, suffix):
    path = tmp_path / f"vfr{suffix}"
    encode(path, numbered(5), codec="libx264", times=[0, 100, 500, 540, 900])
    assert probe(path).variable_rate or suffix == ".mkv"  # whose header claims a constant rate
    assert numbers(read_clip(path, fps=10, num_frames=10)) == [0, 1, 1, 1, 1, 2, 3, 3, 3, 4]
    assert numbers(read_clip(path)) == [0, 1, 2, 3, 4]


def test_timestamps_rounded_by_the_container_do_not_shift_frames(tmp_path):
    encode(tmp_path / "a.mkv", numbered(24), codec="libx264", times=[round(k * 1000 / 24) for k in range(24)])
    assert numbers(read_clip(tmp_path / "a.mkv", fps=24)) == list(range(24))
    assert numbers(read_clip(tmp_path / "a.mkv", fps=12)) == list(range(0, 24, 2))


def test_too_short_names_the_file_what_was_asked_and_what_was_found(video):
    with pytest.raises(MediaError, match=r"video\.mp4: asked for 33 frames at 8 fps from 0 s on, found 16"):
        read_clip(video, num_frames=33, fps=8)
    with pytest.raises(MediaError, match=r"video\.mp4: asked for some frames from 7 s on, found 0"):
        read_clip(video, start=7)


@pytest.mark.parametrize(
    "wrong", [{"num_frames": 0}, {"fps": 0}, {"fps": float("nan")}, {"start": -1.0}, {"size": (0, 64)}]
)
def test_impossible_windows_are_refused(video, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        read_clip(video, **wrong)


# ---- pictures of every kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ((0, False), ["red", "green", "blue", "white"]),
        ((90, False), ["green", "white", "red", "blue"]),  # counter-clockwise
        ((-90, False), ["blue", "red", "white", "green"]),
        ((180, False), ["white", "blue", "green", "red"]),
        ((0, True), ["green", "red", "white", "blue"]),
    ],
)
def test_rotation_and_mirroring_in_the_file_are_applied(tmp_path, turn, expected):
    encode(tmp_path / "a.mov", quadrants()[None].repeat(2, 0), codec="libx264", rotate=turn)
    clip, info = read_clip(tmp_path / "a.mov"), probe(tmp_path / "a.mov")
    assert corner_names(clip.frames[0]) == expected
    assert clip.frames.shape[1:3] == (info.height, info.width) == ((48, 32) if abs(turn[0]) == 90 else (32, 48))
    assert info.rotation == (180 if turn[1] else -turn[0] % 360)
    assert read_clip(tmp_path / "a.mov", size=(40, 20)).frames.shape == (2, 40, 20, 3)


def test_the_orientation_of_a_phone_photo_is_applied(tmp_path):
    encode(tmp_path / "a.jpg", quadrants()[None], codec="mjpeg", pixels="yuvj420p")
    jpeg = (tmp_path / "a.jpg").read_bytes()
    entry = bytes([0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, 6, 0, 0])  # Orientation (0x0112) = 6: turn 90 degrees clockwise
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + b"\0\x01" + entry + b"\0\0\0\0"
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "b.jpg").write_bytes(jpeg[:2] + segment + jpeg[2:])
    assert corner_names(read_clip(tmp_path / "b.jpg").frames[0]) == ["blue", "red", "white", "green"]


@pytest.mark.parametrize(
    ("suffix", "codec", "pixels", "source"),
    [
        (".mov", "qtrle", "argb", "rgba"),
        (".png", "png", "rgba", "rgba"),
        (".webm", "libvpx-vp9", "yuva420p", "rgba"),
        (".mkv", "ffv1", "gbrap16le", "rgba"),
    ],
)
def test_transparent_pixels_are_laid_over_black(tmp_path, suffix, codec, pixels, source):
    image = np.full((1, 32, 32, 4), 255, np.uint8)
    image[:, :, 8:16, 3], image[:, :, 16:, 3] = 128, 0
    encode(tmp_path / f"a{suffix}", image, codec=codec, pixels=pixels, source=source)
    assert probe(tmp_path / f"a{suffix}").has_alpha
    columns = read_clip(tmp_path / f"a{suffix}").frames[0].float().mean((0, 2))
    assert columns[2] > 250
    assert abs(columns[12] - 128) < 8
    assert columns[24] < 5


@pytest.mark.parametrize(
    ("suffix", "codec", "pixels"),
    [
        (".mp4", "libx264", "yuv444p"),
        (".mkv", "ffv1", "yuv420p10le"),
        (".mkv", "ffv1", "yuv420p"),
        (".avi", "mpeg4", "yuv420p"),
        (".mov", "prores_ks", "yuv422p10le"),
        (".mov", "mjpeg", "yuvj420p"),
        (".mkv", "ffv1", "rgb48le"),
        (".mov", "png", "rgb24"),
    ],
)
def test_any_codec_pixel_format_and_odd_size_gives_the_same_colours(tmp_path, suffix, codec, pixels):
    encode(tmp_path / f"a{suffix}", quadrants(33, 47)[None].repeat(3, 0), codec=codec, pixels=pixels)
    clip = read_clip(tmp_path / f"a{suffix}")
    assert clip.frames.shape == (3, 33, 47, 3)
    for i, j, colour in ((8, 10, (255, 0, 0)), (8, 36, (0, 255, 0)), (24, 10, (0, 0, 255)), (24, 36, (255, 255, 255))):
        assert (clip.frames[0, i, j].float() - torch.tensor(colour)).abs().max() < 12


def test_grey_video_becomes_grey_rgb(tmp_path):
    encode(tmp_path / "a.mkv", numbered(3), codec="ffv1", pixels="gray")
    clip = read_clip(tmp_path / "a.mkv")
    assert numbers(clip) == [0, 1, 2]
    assert torch.equal(clip.frames[..., 0], clip.frames[..., 2])


def test_the_picture_covers_the_size_asked_for_and_its_centre_is_kept(tmp_path):
    wide = np.zeros((1, 40, 120, 3), np.uint8)
    wide[:, :, 40:80, 0] = 255  # the middle third is red
    write_video(tmp_path / "wide.mkv", wide, fps=8)
    square = read_clip(tmp_path / "wide.mkv", size=(20, 20)).frames[0].float()
    assert square.shape == (20, 20, 3)
    assert square[:, 1:-1, 0].min() > 250
    assert square[..., 1:].max() < 5
    assert read_clip(tmp_path / "wide.mkv", size=(64, 97)).frames.shape == (1, 64, 97, 3)


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    write_video(tmp_path / "stripes.mkv", stripes, fps=8)
    small = read_clip(tmp_path / "stripes.mkv", size=(16, 16)).frames.float()[0, 2:-2, 2:-2]
    assert (small - 127.5).abs().max() < 8


@pytest.mark.parametrize("name", ["still.png", "still.jpg", "still%03d.png", "concat:a.png"])
def test_an_image_is_a_clip_of_one_frame_whatever_its_name(tmp_path, name):
    data = quadrants()[None]
    encode(tmp_path / "a.jpg", data, codec="mjpeg", pixels="yuvj420p")
    write_image(tmp_path / "a.png", data[0])
    (tmp_path / f"a{name[-4:]}").rename(tmp_path / name)
    clip = read_clip(tmp_path / name, num_frames=1, fps=8)
    assert corner_names(clip.frames[0]) == ["red", "green", "blue", "white"]
    assert len(read_clip(tmp_path / name).frames) == 1
    with pytest.raises(MediaError, match="asked for 17 frames at 8 fps from 0 s on, found 1"):
        read_clip(tmp_path / name, num_frames=17, fps=8)


def test_sound_beside_the_picture_does_no_harm(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        video, audio = container.add_stream("libx264", rate=10), container.add_stream("aac", rate=16000)
        video.height, video.width, video.pix_fmt = 32, 48, "yuv420p"
        for pixels in numbered(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        for k in range(10):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 16000, k * 1600
            container.mux(audio.encode(sound))
        for stream in (video, audio):
            container.mux(stream.encode(None))
    assert numbers(read_clip(tmp_path / "a.mp4")) == list(range(10))
    assert probe(tmp_path / "a.mp4").duration == pytest.approx(1.0)


# ---- broken files --------------------------------------------------------------------------------------------------


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac" if path.suffix == ".mp4" else "pcm_s16le", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 3200), np.int16), format="s16", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


def test_what_is_not_a_video_is_named_with_its_fault(tmp_path, video):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("a red ring moving left\n" * 50)
    (tmp_path / "text.txt").write_text("a red ring moving left\n" * 50)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2,\nvideo.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "half.mp4").write_bytes(video.read_bytes()[:200])
    for name in ("sound.wav", "sound.mp4"):
        write_sound(tmp_path / name)
    faults = {
        "vidoe.mp4": r"no such file; did you mean video\.mp4",
        "nowhere/video.mp4": "no such file; nor such a folder",
        ".": "is not a file",
        "empty.mp4": r"empty \(0 bytes\)",
        "text.mp4": "cannot be read: Invalid data",
        "text.txt": "is text, not video",
        "list.m3u8": "is text, not video",
        "half.mp4": "no video stream|cannot be read",
        "sound.wav": "no video stream, only audio",
        "sound.mp4": "no video stream, only audio",
    }
    for name, fault in faults.items():
        for read in (read_clip, probe):
            with pytest.raises(MediaError, match=fault) as caught:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".gif", ".avi"])
def test_a_truncated_file_is_refused_but_its_whole_windows_are_not(tmp_path, suffix):
    frames = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    path = tmp_path / f"a{suffix}"
    encode(path, frames, codec="mpeg4") if suffix == ".avi" else write_video(path, frames, fps=10)
    whole = read_clip(path, num_frames=2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert torch.equal(read_clip(path, num_frames=2).frames, whole.frames)
    for window in ({"num_frames": 40}, {})[: 1 if suffix == ".gif" else 2]:  # a GIF does not say how long it is
        with pytest.raises(MediaError, match=path.name):
            read_clip(path, **window)


def test_damaged_bytes_give_frames_or_a_media_error_and_nothing_else(tmp_path, capfd):
    generator = np.random.default_rng(0)
    for suffix in (".mp4", ".gif", ".mkv"):
        source, target = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
        write_video(source, generator.integers(0, 256, (4, 16, 16, 3), np.uint8), fps=8)
        for _ in range(15):
            data = bytearray(source.read_bytes())
            for position in generator.integers(0, len(data), 8):
                data[position] = generator.integers(256)
            target.write_bytes(data[: generator.integers(1, len(data) + 1)])
            for read in (probe, read_clip):
                with suppress(MediaError):
                    read(target)
    assert capfd.readouterr() == ("", ""), "the decoder's own complaints stay silent"


def test_no_file_is_left_open(tmp_path, video):
    (tmp_path / "half.mp4").write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read_clip(video, num_frames=1)
        for path in (tmp_path / "half.mp4", tmp_path):
            with pytest.raises(MediaError):
                read_clip(path)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_an_odd_size_is_refused_with_the_nearest_even_ones(tmp_path, suffix):
    with pytest.raises(ConfigError, match=r"got 33 x 48; nearest: 32 x 48 or 34 x 48; \.mkv"):
        write_video(tmp_path / f"a{suffix}", numbered(2, 33, 48), fps=8)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    frames = numbered(2)
    with pytest.raises(ConfigError, match=r"cannot write \.mp3; did you mean \.mp4"):
        VideoWriter(tmp_path / "a.mp3", fps=8)
    with pytest.raises(MediaError, match=r"the folder .*nowhere does not exist"):
        VideoWriter(tmp_path / "nowhere" / "a.mp4", fps=8)
    with pytest.raises(ConfigError, match="fps must be between"):
        VideoWriter(tmp_path / "a.mp4", fps=0)
    with pytest.raises(ConfigError, match=r"a \.png holds one frame, got 2"):
        write_video(tmp_path / "a.png", frames, fps=8)
    with pytest.raises(ConfigError, match=r"frames must be uint8 .*float32 \(2, 32, 48, 3\)"):
        write_video(tmp_path / "a.mp4", frames.astype(np.float32), fps=8)
    with pytest.raises(ConfigError, match=r"frames must be uint8"):
        write_video(tmp_path / "a.mp4", torch.zeros(3, 2, 32, 48, dtype=torch.uint8), fps=8)
    with pytest.raises(ConfigError, match="no frames to write"):
        write_video(tmp_path / "a.mp4", frames[:0], fps=8)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(MediaError, match="it is a folder"):
        write_video(tmp_path / "folder.mp4", frames, fps=8)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.mp4"]


def test_frames_written_in_pieces_equal_frames_written_at_once(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    write_video(tmp_path / "whole.mp4", frames, fps=8)
    with VideoWriter(tmp_path / "pieces.mp4", fps=8) as writer:
        for piece in (frames[:4], frames[4:4], frames[4:5], frames[5:]):
            writer.write(piece)
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def write_and_raise(path, *pieces, error=None):
    with VideoWriter(path, fps=8) as writer:
        for piece in pieces:
            writer.write(piece)
        if error:
            raise error


def test_ctrl_c_keeps_the_frames_written_so_far(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(tmp_path / "a.mp4", numbered(5), error=KeyboardInterrupt)
    assert numbers(read_clip(tmp_path / "a.mp4")) == [0, 1, 2, 3, 4]
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(tmp_path / "b.mp4", error=KeyboardInterrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_any_other_exception_leaves_nothing_and_spares_what_was_there(tmp_path, video):
    before = video.read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_and_raise(video, numbered(5), error=ZeroDivisionError)
    with pytest.raises(ConfigError, match="one size"):
        write_and_raise(video, numbered(5), numbered(5, 16, 16))
    assert video.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif", ".png"])
def test_a_full_disk_is_an_error_wherever_it_strikes_and_leaves_no_partial_file(tmp_path, suffix):
    frames = np.random.default_rng(0).integers(0, 256, (1 if suffix == ".png" else 4, 16, 16, 3), np.uint8)
    path = tmp_path / f"a{suffix}"
    write_video(path, frames, fps=8)
    full = path.stat().st_size
    path.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in [0, *np.linspace(1, full - 1, 12).astype(int).tolist()]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(MediaError, match=f"cannot write .*a{suffix}"):
                write_video(path, frames, fps=8)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(tmp_path.iterdir())


def test_a_contact_sheet_shows_the_first_and_the_last_frame_of_every_clip(tmp_path):
    clips = [numbered(9, 8, 10), torch.from_numpy(numbered(3, 8, 10) + 100)]
    write_contact_sheet(tmp_path / "sheet.png", clips, columns=5, gap=2)
    sheet = read_clip(tmp_path / "sheet.png").frames[0]
    assert sheet.shape == (2 * 8 + 2, 5 * 10 + 4 * 2, 3)
    assert sheet[4, 5::12, 0].tolist() == [0, 20, 40, 60, 80]
    assert sheet[14, 5::12, 0].tolist() == [100, 100, 110, 120, 120]
    with pytest.raises(ConfigError, match="one size"):
        write_contact_sheet(tmp_path / "b.png", [numbered(2), numbered(2, 8, 8)], columns=2)
    with pytest.raises(ConfigError, match="nothing to show"):
        write_contact_sheet(tmp_path / "b.png", [], columns=2)
