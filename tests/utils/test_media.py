"""Which files of a folder a command reads, what it says of the others, and how videos are turned."""

import re
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dat.utils import images
from dat.utils.errors import DataError, ImageError
from dat.utils.files import find_images, is_hidden
from dat.utils.media import Frames, Media, find_media, read_frames

HEIC = b"\0\0\0\x18ftypheic" + bytes(200)


@pytest.fixture
def without_heif(monkeypatch):
    formats = [form for form in images._formats() if form != "HEIF"]
    monkeypatch.setattr(images, "_formats", lambda: formats)


def write(path, size=(20, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, **options)


def test_hidden_and_system_files_are_in_no_list(tmp_path):
    write(tmp_path / "a/1.png")
    hidden = [
        ".ipynb_checkpoints/1-checkpoint.png", "a/.hidden.png", "a/._1.png", "@eaDir/1.png", "a/@eaDir/1.png/x.jpg",
        "__MACOSX/a/1.png", "$RECYCLE.BIN/1.png", "lost+found/1.png", "System Volume Information/1.png",
    ]  # fmt: skip
    for name in hidden:
        write(tmp_path / name)
    (tmp_path / "a/Thumbs.db").write_bytes(b"thumbs")
    (tmp_path / "a/.DS_Store").write_bytes(b"store")
    assert find_images(tmp_path) == ([tmp_path / "a/1.png"], [])
    # A folder that is named is read, and names that only begin alike are no system's.
    assert find_images(tmp_path / "a/@eaDir")[0] == [tmp_path / "a/@eaDir/1.png/x.jpg"]
    assert not any(map(is_hidden, ("eaDir", "..", ".", "a.b", "lost", "thumbs.db.png")))


def test_images_are_found_by_content_but_raw_files_are_not(tmp_path):
    write(tmp_path / "noext", format="JPEG")
    write(tmp_path / "photo.jpeg_1", format="JPEG")
    write(tmp_path / "scan", format="TIFF")
    write(tmp_path / "photo.NEF", format="TIFF")
    (tmp_path / "train.json").write_text("{}")
    found, others = ([path.name for path in paths] for paths in find_images(tmp_path))
    assert found == ["noext", "photo.jpeg_1", "scan"]
    assert others == ["photo.NEF", "train.json"]


def test_what_is_left_out_is_counted_with_the_reason(tmp_path, without_heif):
    for name in ("1.jpg", "2.jpg", "noext.jpg"):
        write(tmp_path / name)
    (tmp_path / "noext.jpg").rename(tmp_path / "noext")
    write(tmp_path / "dot.png", (1, 1))
    write(tmp_path / "line.png", (4, 4000))
    (tmp_path / "photo.HEIC").write_bytes(HEIC)
    (tmp_path / "renamed.jpg").write_bytes(HEIC)
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:300])
    frames = Frames(*find_media([tmp_path]), every=1)
    assert [frame.name for batch in frames.batches(2) for frame in batch] == ["1.jpg", "2.jpg", "noext"]
    counts, _, groups = frames.summary().partition(": ")
    assert counts == "3 images, 6 left out"
    # Pillow's own words are in brackets.
    groups = re.sub(r"half.jpg \(.*?runcated.*?\)", "half.jpg", groups)
    assert sorted(groups.split("; ")) == [
        "1 of 1x1 pixels (too small): dot.png",
        "1 of 4x4000 pixels (too thin): line.png",
        "1 of no image format: notes.txt",
        "1 that cannot be read: half.jpg",
        "2 HEIC (pip install pillow-heif): photo.HEIC, renamed.jpg",
    ]


def test_batches_of_large_images_are_shorter(tmp_path, monkeypatch):
    for name, size in (("1.png", (40, 50)), ("2.png", (200, 100)), ("3.png", (40, 50)), ("4.png", (40, 50))):
        write(tmp_path / name, size)
    monkeypatch.setattr("dat.utils.media.BATCH_PIXELS", 10_000)
    frames = Frames(*find_media([tmp_path]), every=1)
    assert [[frame.name for frame in batch] for batch in frames.batches(3)] == [["1.png", "2.png"], ["3.png", "4.png"]]
    assert frames.count == 4


def test_nothing_is_said_where_all_is_read(tmp_path):
    write(tmp_path / "1.jpg")
    frames = Frames(*find_media([tmp_path]), every=1)
    assert len(list(frames.batches(2))) == 1
    assert frames.summary() == ""


def write_frames(path, *sizes):
    """A video of frames of these sizes."""
    av = pytest.importorskip("av", reason="the extra 'video'")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuvj420p"
        for number, size in enumerate(sizes):
            write(path.with_suffix(".jpg"), size)
            packet = av.Packet(path.with_suffix(".jpg").read_bytes())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 5)
            container.mux(packet)


@pytest.mark.parametrize(
    ("size", "message"),
    [((3, 90), "frame 1: 3x90 pixels are too small"), ((16000, 12000), r"frames have more than \d+ pixels")],
)
def test_frames_of_another_size_end_a_video_but_not_the_others(tmp_path, size, message):
    path = tmp_path / "clip.mkv"
    write_frames(path, (96, 80), size)
    write(tmp_path / "later.png")
    frames = Frames([Media(path, path.name), Media(tmp_path / "later.png", "later.png")], [], every=1)
    assert [frame.name for batch in frames.batches(2) for frame in batch] == ["clip.mkv#0", "later.png"]
    assert "clip.mkv" in frames.summary()
    with pytest.raises(ImageError, match=f"clip.mkv: .*{message}"):
        list(read_frames(Media(path, path.name)))


def write_clip(path, times, codec="mpeg4", rate=10, **options):
    """A video of noise with frames at these times, in units of 1 / rate seconds."""
    av = pytest.importorskip("av", reason="the extra 'video'")
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    with av.open(str(path), "w", options=options) as container:
        # All frames have the same size in bytes.
        stream = container.add_stream(codec, rate=rate, options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.roll(noise, time, 0), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.ts", "mpeg2video"),
        ("a.MTS", "mpeg2video"),
        ("a.m2ts", "mpeg2video"),
        ("a.vob", "mpeg2video"),
        ("a.flv", "flv1"),
        ("a.asf", "wmv2"),
    ],
)
def test_videos_of_cameras_and_recorders_are_read(tmp_path, name, codec):
    write_clip(tmp_path / name, range(5), codec, rate=25)
    media, others = find_media([tmp_path])
    assert others == []
    assert [frame.name for frame in read_frames(media[0])] == [f"{name}#{number}" for number in range(5)]


def test_a_video_that_was_cut_off_is_named(tmp_path):
    write_clip(tmp_path / "card.avi", range(40))
    write_clip(tmp_path / "load.mp4", range(40), movflags="faststart")
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 6 // 10])
    write_clip(tmp_path / "whole.avi", range(10))
    frames = Frames(*find_media([tmp_path]), every=10)
    list(frames.batches(2))
    summary = re.sub(r"[12]\.\d of", "2.x of", frames.summary())
    cut_off = "card.avi (it ends after 2.x of 4.0 seconds), load.mp4 (it ends after 2.x of 4.0 seconds)"
    assert summary == f"{frames.count} images, 2 cut off: {cut_off}"


def test_videos_with_gaps_and_of_part_of_their_frames_are_whole(tmp_path):
    av = pytest.importorskip("av", reason="the extra 'video'")
    write_clip(tmp_path / "dropped.avi", [*range(5), *range(20, 25)])
    write_clip(tmp_path / "slides.mp4", [0, 10, 11, 40])
    write_clip(tmp_path / "all.mp4", range(20))
    # As phones do: the frames before the beginning stay in the file.
    with av.open(str(tmp_path / "all.mp4")) as source, av.open(str(tmp_path / "trimmed.mp4"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - int(1 / packet.time_base), packet.dts - int(1 / packet.time_base)
                packet.stream = stream
                container.mux(packet)
    frames = Frames(*find_media([tmp_path]), every=1)
    assert len(list(frames.batches(1))) == 20 + 10 + 4 + 10
    assert frames.summary() == ""


def test_a_video_without_a_decoder_is_named(tmp_path):
    path = tmp_path / "clip.mkv"
    write_frames(path, (96, 80))
    path.write_bytes(path.read_bytes().replace(b"V_MJPEG", b"V_OTHER"))
    with pytest.raises(ImageError, match=r"clip.mkv: cannot be read as a video: there is no decoder for it"):
        list(read_frames(Media(path, path.name)))


def test_a_file_without_video_is_named(tmp_path):
    av = pytest.importorskip("av", reason="the extra 'video'")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=80)
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ImageError, match=r"sound.mkv: cannot be read as a video: it holds no video"):
        list(read_frames(Media(tmp_path / "sound.mkv", "sound.mkv")))


def test_a_name_like_a_protocol_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_frames(tmp_path / "http:1.mkv", (96, 80))
    assert len(list(read_frames(Media(Path("http:1.mkv"), "http:1.mkv")))) == 1


def test_a_folder_without_readable_images_says_why(tmp_path, without_heif):
    (tmp_path / "photo.HEIC").write_bytes(HEIC)
    with pytest.raises(DataError, match=r"holds no images, but 1 HEIC \(pip install pillow-heif\)"):
        find_media([tmp_path])
    write(tmp_path / "dot.png", (1, 1))
    with pytest.raises(ImageError, match=r"dot.png: 1x1 pixels are too small"):
        list(Frames(*find_media([tmp_path]), every=1).batches(2))


FRAME = np.full((64, 96, 3), 90, np.uint8)
FRAME[:32, :48] = (220, 30, 30)
# Display matrices (a, b, c, d), and the frame as players show it.
MATRICES = {
    "upright": ((1, 0, 0, 1), FRAME),
    "90 clockwise": ((0, 1, -1, 0), np.rot90(FRAME, -1)),
    "180": ((-1, 0, 0, -1), np.rot90(FRAME, 2)),
    "90 counter-clockwise": ((0, -1, 1, 0), np.rot90(FRAME)),
    "mirrored": ((-1, 0, 0, 1), FRAME[:, ::-1]),
    "upside down": ((1, 0, 0, -1), FRAME[::-1]),
    "transposed": ((0, 1, 1, 0), FRAME.swapaxes(0, 1)),
    "transversed": ((0, -1, -1, 0), np.rot90(FRAME, 2).swapaxes(0, 1)),
}


def write_video(path, matrix):
    """An MP4 of two frames, whose track header says how it is displayed."""
    av = pytest.importorskip("av", reason="the extra 'video'")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.fromarray(FRAME))))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    # In a track header of version 0 the matrix is from byte 40 on, behind its name.
    start = content.index(b"tkhd") + 44
    assert struct.unpack(">9i", content[start : start + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("name", MATRICES)
def test_videos_are_turned_as_players_show_them(tmp_path, name):
    matrix, shown = MATRICES[name]
    write_video(tmp_path / "phone.MOV", matrix)
    frames = list(read_frames(Media(tmp_path / "phone.MOV", "phone.MOV")))
    assert len(frames) == 2
    for frame in frames:
        assert frame.image.size == shown.shape[1::-1]
        assert np.abs(np.asarray(frame.image).astype(int) - shown).mean() < 8
