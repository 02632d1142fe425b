"""The picture and the sound of a scene.

The picture is a function of the scene's visible draws alone, the sound of its impacts and of the
hidden draws: nothing of the latter can be seen.
"""

import dataclasses

import numpy as np
from scipy.signal import oaconvolve

from vcm_jax.impacts.scene import BOX, HIDDEN, LOOK, MARGIN, Scene

FPS = 25
SAMPLE_RATE = 16_000
SIZE = 112  # pixels, the side of the square picture
SCALE = SIZE / (BOX + 2 * MARGIN)  # pixels per metre


@dataclasses.dataclass(frozen=True)
class _Voice:
    """How a material sounds: modes at `pitch * ratios` Hz for a ball of radius `_RADIUS`.

    Mode k at f_k has the 60 dB decay time `decay / (1 + f_k / damping)` seconds and the amplitude
    `ratio_k ** -tilt`; `click` is the level of the contact noise, `click_decay` and `attack` are
    its time constant and that of the onset in seconds; `cutoff` (Hz, at the reference speed) is
    where the spectrum of the blow falls off. Chosen by ear and measurement to keep the materials
    apart when the pitch is hidden; the partials are close to those of free bars and plates.
    """

    pitch: float
    ratios: tuple[float, ...]
    decay: float
    damping: float
    tilt: float
    cutoff: float
    click: float
    click_decay: float
    attack: float


_VOICES = {
    "metal": _Voice(
        620, (1, 1.58, 2.24, 2.92, 3.46, 4.6, 5.9), 1.1, 8000, 0.4, 6000, 0.1, 1e-3, 1e-4
    ),
    "wood": _Voice(330, (1, 2.1, 3.3, 4.9, 6.8), 0.18, 1200, 0.9, 2500, 0.25, 3e-3, 3e-4),
    "glass": _Voice(1700, (1, 1.51, 2.2, 2.9, 3.7), 0.5, 6000, 0.1, 9000, 0.1, 1e-3, 1e-4),
    "rubber": _Voice(150, (1, 1.6, 2.4), 0.2, 400, 1.5, 500, 0.05, 4e-3, 2e-3),
    "stone": _Voice(
        1100, (1, 1.27, 1.61, 2.05, 2.6, 3.1, 3.9), 0.07, 8000, 0.2, 7000, 1.0, 4e-3, 1e-4
    ),
}
_RADIUS = 0.11  # metres: the size at which the pitches above hold
_SPEED = 5.0  # m/s: the fall from 1.3 metres, the speed at which the levels above hold
_LEVEL = 0.4  # peak amplitude of an impact at that speed


def _modes(rng: np.random.Generator, material: str, radius: float):
    """One ball's hidden voice: (modes M, n) unit responses, (M,) frequencies, (M,) amplitudes."""
    voice = _VOICES[material]
    ratios = np.array(voice.ratios)
    pitch = voice.pitch * (_RADIUS / radius) * 2 ** rng.uniform(-0.5, 0.5)
    freqs = pitch * ratios * (1 + 0.03 * rng.standard_normal(len(ratios)))
    amps = ratios**-voice.tilt * np.exp(0.5 * rng.standard_normal(len(ratios)))
    decay = voice.decay * 2 ** rng.uniform(-0.6, 0.6)
    t = np.arange(int(decay * SAMPLE_RATE), dtype=np.float32)[None] / SAMPLE_RATE
    rates = np.log(1000) * (1 + freqs / voice.damping) / decay
    response = np.exp(-rates[:, None].astype(np.float32) * t)
    response *= np.sin((2 * np.pi * freqs[:, None]).astype(np.float32) * t)
    click = voice.click * rng.standard_normal(t.shape, np.float32) * np.exp(-t / voice.click_decay)
    response = np.concatenate([response, click]) * (1 - np.exp(-t / voice.attack))
    freqs, amps = np.append(freqs, 0.0), np.append(amps * (freqs < 0.47 * SAMPLE_RATE), 1.0)
    peak = np.abs(_blow(freqs, amps, voice.cutoff) @ response).max()
    return response, freqs, amps / peak


def _blow(freqs, amps, cutoff):
    """Amplitudes of the modes after a blow whose spectrum falls off at `cutoff` Hz."""
    return (amps / np.sqrt(1 + (freqs / cutoff) ** 2)).astype(np.float32)


def _room(rng: np.random.Generator) -> np.ndarray:
    """Impulse response of a room with a hidden decay (60 dB in 0.08 to 0.45 s) and level."""
    decay = rng.uniform(0.08, 0.45)
    level = rng.uniform(0.05, 0.35)
    t = np.arange(int(decay * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(t.size) * np.exp(-np.log(1000) * t / decay) * (t > 0.004)
    tail *= level / np.linalg.norm(tail)
    tail[0] = 1.0
    return tail.astype(np.float32)


def _noise(rng: np.random.Generator, n: int) -> np.ndarray:
    """n samples of background noise: power ~ f**-colour, -62 to -52 dB under full scale."""
    colour = rng.uniform(0, 1.2)
    level = 10 ** (rng.uniform(-62, -52) / 20)
    spectrum = np.fft.rfft(rng.standard_normal(n))
    freqs = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    noise = np.fft.irfft(spectrum * np.maximum(freqs, 40) ** (-colour / 2), n)
    return level * noise / np.sqrt(np.mean(noise**2))


def render_sound(scene: Scene) -> np.ndarray:
    """The scene's sound at 16 kHz: float32 n, n = round(duration * 16000), within [-1, 1].

    An impact begins at the sample nearest to its time. Its amplitude is proportional to its speed,
    on one scale for all clips. Hidden draws, from `scene.hidden` alone: each ball's pitch (an
    octave wide, around what its size says), detuning, amplitudes and decay of its modes, where
    each blow falls on it, the room, and the noise.
    """
    n = round(scene.duration * SAMPLE_RATE)
    rng = np.random.default_rng([*scene.key, HIDDEN, scene.hidden])
    voices = [_modes(rng, ball.material, ball.radius) for ball in scene.balls]
    room = _room(rng)
    noise = _noise(rng, n)
    sound = np.zeros(n, np.float32)
    for impact in scene.impacts:
        response, freqs, amps = voices[impact.ball]
        strength = impact.speed / _SPEED
        amps = amps * np.exp(0.25 * rng.standard_normal(amps.size))
        gains = _blow(freqs, amps, _VOICES[impact.material].cutoff * np.sqrt(strength))
        start = min(round(impact.time * SAMPLE_RATE), n)
        rest = min(n - start, response.shape[1])
        sound[start : start + rest] += _LEVEL * strength * (gains @ response[:, :rest])
    sound = oaconvolve(sound, room)[:n] + noise
    return np.clip(sound, -1, 1).astype(np.float32)


# Colours: red, green, blue in 0..1.
_COLOURS = {
    "metal": (0.62, 0.66, 0.72),
    "wood": (0.70, 0.44, 0.20),
    "glass": (0.35, 0.85, 0.95),
    "rubber": (0.80, 0.12, 0.14),
    "stone": (0.42, 0.40, 0.38),
}
_LIGHT = np.array([-0.45, 0.60, 0.66])  # towards the light: right, up, to the viewer


def _surface(material: str, x, y, z, normal_z, light, phases):
    """Colour (..., 3) and opacity (...) of a ball's surface at the unit vectors (x, y, z).

    x, y, z turn with the ball (for the texture); normal_z and light (the cosine to the lamp) do
    not. phases: 4 fixed random angles of this ball.
    """
    colour = np.array(_COLOURS[material])
    shade = 0.35 + 0.65 * np.maximum(light, 0)
    opacity = np.ones_like(shade)
    shine = 0.0
    if material == "metal":
        shade = 0.35 + 0.9 * np.maximum(light, 0) ** 2 + 0.2 * np.cos(7 * normal_z)
        shine = np.maximum(light, 0) ** 30
    elif material == "wood":
        shade = shade * (0.8 + 0.3 * np.sin(9 * x + 2.5 * np.sin(2 * y + phases[0])))
    elif material == "glass":
        rim = (1 - normal_z) ** 2
        shade = 0.7 + 0.3 * rim
        opacity = 0.5 + 0.5 * rim
        shine = np.maximum(light, 0) ** 40
        opacity = np.maximum(opacity, shine)
    elif material == "rubber":
        band = np.abs(y + 0.3 * z) < 0.22
        colour = np.where(band[..., None], (0.95, 0.85, 0.30), colour)
    else:
        speckle = np.sin(11 * x + phases[1]) * np.sin(10 * y + 3 * z + phases[2])
        shade = shade * (1 + 0.55 * speckle * np.sin(6 * (x - y) + phases[3]))
    pixels = shade[..., None] * colour + np.asarray(shine)[..., None]
    return np.clip(pixels, 0, 1), opacity


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """The empty box: size, size, 3 in 0..1."""
    back, frame = rng.uniform(0.72, 0.92, 3), rng.uniform(0.15, 0.35, 3)
    rows, cols = (np.mgrid[:size, :size] + 0.5) / SCALE
    picture = back * (1 - 0.15 * rows / rows.max())[..., None]
    edge = (cols < MARGIN) | (cols > MARGIN + BOX) | (rows > MARGIN + BOX)
    picture[edge] = frame
    return picture


def render_frames(scene: Scene) -> np.ndarray:
    """The scene seen from the side: uint8 T, 112, 112, 3, T = ceil(duration * 25).

    Frame k shows the time k / 25 (an instant: no motion blur). A ball out of the box's open top is
    out of the picture. Balls further back are drawn first and pass behind the others.
    """
    num_frames = int(np.ceil(round(scene.duration * FPS, 6)))
    times = np.arange(num_frames) / FPS
    rng = np.random.default_rng([*scene.key, LOOK, 0])
    # The canvas has a rim on which the balls outside the picture land.
    rim = 2 * int(np.ceil(SCALE * max(b.radius for b in scene.balls))) + 4
    frames = np.pad(_background(rng, SIZE).astype(np.float32), [(rim, rim)] * 2 + [(0, 0)])
    frames = np.tile(frames, (num_frames, 1, 1, 1))
    for ball in scene.balls:
        phases = rng.uniform(0, 2 * np.pi, 4)
        radius = SCALE * ball.radius
        x, y = ball.position(times)
        col = SCALE * (MARGIN + x)
        row = np.maximum(SCALE * (MARGIN + BOX - y), -rim / 2)
        half = int(np.ceil(radius)) + 1
        span = np.arange(-half, half + 1)
        rows = np.floor(row).astype(int)[:, None] + span
        cols = np.floor(col).astype(int)[:, None] + span
        right = ((cols + 0.5 - col[:, None]) / radius).astype(np.float32)[:, None, :]
        up = ((row[:, None] - rows - 0.5) / radius).astype(np.float32)[:, :, None]
        square = right**2 + up**2
        depth = np.sqrt(np.maximum(1 - square, 0))
        light = _LIGHT[0] * right + _LIGHT[1] * up + _LIGHT[2] * depth
        angle = (phases[0] - x / ball.radius)[:, None, None]  # it rolls along
        turned = (
            np.cos(angle) * right - np.sin(angle) * up,
            np.sin(angle) * right + np.cos(angle) * up,
        )
        pixels, opacity = _surface(ball.material, *turned, depth, depth, light, phases)
        cover = np.clip((1 - np.sqrt(square)) * radius + 0.5, 0, 1) * opacity
        where = np.arange(num_frames)[:, None, None], rim + rows[:, :, None], rim + cols[:, None]
        behind = frames[where]
        frames[where] = behind + cover[..., None] * (pixels - behind)
    frames = frames[:, rim:-rim, rim:-rim]
    return np.round(255 * frames).astype(np.uint8)
