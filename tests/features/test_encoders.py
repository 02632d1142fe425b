import numpy as np
import pytest

from vcm_jax.features.encoders import WeightsFreeEncoders, area_pool, encoders_from_spec
from vcm_jax.records.sequence import SequenceConfig

SHORT = SequenceConfig(duration=2.56)
ENCODERS = WeightsFreeEncoders(32, 48, 24)
CLIP = [-0.234684, -1.03533, 0.00273804]
SYNC = {1: [-3.26577, 1.88548, 5.28488], 2: [0.0727336, -0.404533, -0.907852]}
TEXT = [-0.860315, 1.30455, -1.95165]


def encode(video, sequence, encoders=ENCODERS):
    """video: seconds -> frame; sampled as extraction would."""
    frames = {
        fps: np.stack([transform(video(i / fps)) for i in range(round(sequence.duration * fps))])
        for fps, transform in encoders.frame_transforms(sequence).items()
    }
    return encoders.encode_frames(frames, sequence)


def blink(at: float, seed: int = 0):
    """A video of noise that changes once."""
    pictures = np.random.default_rng(seed).integers(0, 255, (2, 48, 64, 3)).astype(np.uint8)
    return lambda time: pictures[int(time >= at - 1e-6)]


def test_area_pool():
    frame = np.random.default_rng(0).integers(0, 255, (48, 80, 3)).astype(np.uint8)
    blocks = frame.reshape(8, 6, 8, 10, 3).mean((1, 3)) / 255
    np.testing.assert_allclose(area_pool(frame, 8), blocks, atol=1e-6)
    uneven = area_pool(np.full((37, 53, 3), 51, np.uint8), 16)
    np.testing.assert_allclose(uneven, np.full((16, 16, 3), 0.2), atol=1e-6)
    assert area_pool(frame[:5, :3], 8).shape == (8, 8, 3)


@pytest.mark.parametrize("sequence", [SHORT, SequenceConfig()], ids=["2.56 s", "8 s"])
def test_shapes(sequence):
    clip, sync = encode(blink(1.0), sequence)
    assert clip.shape == (sequence.clip_seq_len, 32) and clip.dtype == np.float32
    assert sync.shape == (sequence.sync_seq_len, 48) and sync.dtype == np.float32
    text = ENCODERS.encode_text("a metal ball", sequence)
    assert text.shape == (77, 24) and text.dtype == np.float32


@pytest.mark.parametrize("sequence", [SHORT, SequenceConfig()], ids=["2.56 s", "8 s"])
@pytest.mark.parametrize("at", [0.4, 1.2, 2.2])
def test_sync_rows_are_in_time(sequence, at):
    """The row at time (j + 1/2) / S says most when the picture changes there."""
    _, sync = encode(blink(at), sequence)
    energy = (sync.astype(float) ** 2).sum(1)
    times = (np.arange(len(sync)) + 0.5) / len(sync) * sequence.duration
    # The change happens between two frames; a row sees two and a half frames to either side.
    centre = at - 0.5 / 25
    assert abs((energy * times).sum() / energy.sum() - centre) < 0.5 / 25
    assert not energy[np.abs(times - centre) > 3.01 / 25].any()
    assert (energy[np.abs(times - centre) < 2 / 25] > 0).all()


def test_sync_sees_where_and_which_way():
    def ball(direction):
        def frame(time):
            picture = np.full((64, 64, 3), 30, np.uint8)
            top = int(32 + direction * (time - 1.28) * 20)
            picture[top : top + 8, 20:28] = 220
            return picture

        return frame

    (_, up), (_, down) = encode(ball(-1), SHORT), encode(ball(1), SHORT)
    cosine = (up * down).sum() / np.sqrt((up**2).sum() * (down**2).sum())
    assert cosine < 0.8


def test_compression_noise_is_no_motion():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (112, 112, 3))
    noisy = lambda _: np.clip(picture + rng.integers(-1, 2, picture.shape), 0, 255).astype(np.uint8)
    _, sync = encode(noisy, SHORT)
    assert np.mean(sync == 0) > 0.95


def test_features_have_a_std_of_about_one():
    def video(time):
        picture = np.full((112, 112, 3), 90, np.uint8)
        x, y = int(40 + 30 * np.sin(3 * time)), int(40 + 35 * np.cos(5 * time))
        picture[y : y + 14, x : x + 14] = (230, 200, 60)
        return picture

    clip, sync = encode(video, SHORT, WeightsFreeEncoders())
    assert 0.3 < clip.std() < 3 and 0.3 < sync.std() < 3
    assert np.abs(sync).max() < 100 and np.abs(clip).max() < 100


def test_still_or_black_video_is_finite():
    clip, sync = encode(lambda _: np.zeros((48, 64, 3), np.uint8), SHORT)
    assert np.isfinite(clip).all() and not sync.any()


def test_text():
    encode_text = lambda text: ENCODERS.encode_text(text, SHORT)
    assert not encode_text("").any() and not encode_text(" ,.").any()
    metal, glass = encode_text("a metal ball"), encode_text("A GLASS ball!")
    np.testing.assert_array_equal(metal[[0, 2]], glass[[0, 2]])  # the same words
    assert np.abs(metal[1] - glass[1]).max() > 0.5
    np.testing.assert_allclose(metal[3:], np.tile(metal[:3].sum(0) / 3**0.5, (74, 1)), rtol=1e-5)
    np.testing.assert_array_equal(metal[:2], encode_text("a metal")[:2])
    assert 0.7 < metal.std() < 1.4
    assert np.isfinite(encode_text("wörd, " * 500)).all()


@pytest.mark.parametrize("version", [1, 2])
def test_the_same_features_everywhere(version):
    """Golden values: when they change on purpose, add a version to WeightsFreeEncoders."""
    encoders = WeightsFreeEncoders(32, 48, 24, version)
    clip, sync = encode(blink(1.0), SHORT, encoders)
    assert encoders_from_spec(encoders.spec()).version == version
    text = ENCODERS.encode_text("a metal ball", SHORT)
    np.testing.assert_allclose(clip[0, :3], CLIP, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sync[21, :3], SYNC[version], rtol=1e-4)
    np.testing.assert_allclose(text[1, :3], TEXT, rtol=1e-5)


def test_spec():
    spec = ENCODERS.spec()
    again = encoders_from_spec(spec)
    assert again.spec() == spec and (again.clip_dim, again.sync_dim, again.text_dim) == (32, 48, 24)
    assert WeightsFreeEncoders(32, 48, 25).spec()["hash"] != spec["hash"]
    with pytest.raises(ValueError, match="unknown encoders 'other'"):
        encoders_from_spec(spec | {"name": "other"})
    with pytest.raises(ValueError, match="'version': 0"):
        encoders_from_spec(spec | {"version": 0})
