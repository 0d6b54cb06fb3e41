"""A voice by formant synthesis, and the mouth that would say it: syllables -> sound and articulation on one time line.

A glottal pulse train runs through a cascade of five moving resonators, noise makes the fricatives and bursts
(D. Klatt, Software for a cascade/parallel formant synthesizer, JASA 67, 1980). Lips, jaw and formants glide between the
same targets, so what is seen is what is heard.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import butter, sosfilt

from data_utils.demo_head.mesh import SHAPES
from utils.constants import FPS, SAMPLE_RATE

TICK = 80  # samples a control step: 5 ms
_TICKS = SAMPLE_RATE // TICK
VOWELS, CLOSURES, FRICATIVES = "aeiou", "mbp", "sf"

# symbol: F1, F2, F3 (Hz), voicing, hiss, and the mouth: jaw, wide, round, press, raise, lower, tuck (mesh.SHAPES)
_SOUNDS = {
    "a": ((740, 1150, 2480), 1.00, 0.0, (0.95, 0.20, 0.00, 0.0, 0.25, 0.25, 0.0)),
    "e": ((480, 1900, 2550), 0.90, 0.0, (0.46, 0.70, 0.00, 0.0, 0.30, 0.25, 0.0)),
    "i": ((280, 2250, 3000), 0.75, 0.0, (0.20, 1.00, 0.00, 0.0, 0.35, 0.35, 0.0)),
    "o": ((460, 830, 2400), 0.95, 0.0, (0.58, 0.00, 0.70, 0.0, 0.15, 0.15, 0.0)),
    "u": ((310, 720, 2250), 0.80, 0.0, (0.25, 0.00, 1.00, 0.0, 0.10, 0.15, 0.0)),
    "m": ((250, 1050, 2200), 0.42, 0.0, (0.10, 0.05, 0.00, 1.0, 0.00, 0.00, 0.0)),
    "b": ((200, 850, 2150), 0.16, 0.0, (0.12, 0.00, 0.00, 1.0, 0.00, 0.00, 0.0)),
    "p": ((200, 850, 2150), 0.00, 0.0, (0.10, 0.00, 0.00, 1.0, 0.00, 0.00, 0.0)),
    "n": ((260, 1650, 2650), 0.42, 0.0, (0.16, 0.30, 0.00, 0.0, 0.20, 0.25, 0.0)),
    "s": ((300, 1650, 2650), 0.00, 1.0, (0.05, 0.60, 0.00, 0.0, 0.40, 0.45, 0.0)),
    "f": ((300, 1100, 2200), 0.00, 0.6, (0.10, 0.20, 0.00, 0.0, 0.45, 0.00, 1.0)),
    " ": ((480, 1450, 2450), 0.00, 0.0, (0.00, 0.00, 0.00, 0.0, 0.00, 0.00, 0.0)),
}
_SECONDS = {"m": (0.10, 0.13), "b": (0.09, 0.12), "p": (0.11, 0.14), "n": (0.07, 0.09), "s": (0.11, 0.15), "f": (0.11, 0.14)}


@dataclasses.dataclass
class Utterance:
    """samples (S,) float32 16 kHz; articulation (F, 7) in mesh.SHAPES order, row i at time i / 25 s; the phonemes spoken."""

    samples: np.ndarray
    articulation: np.ndarray
    phonemes: list[tuple[str, float, float]]  # symbol (" " is silence), start and end in seconds


class _Bag:
    """Draws every item once before any comes twice, so that even a short clip holds the whole inventory."""

    def __init__(self, items: str, rng: np.random.Generator):
        self._items, self._rng, self._left = items, rng, []

    def draw(self) -> str:
        if not self._left:
            self._left = [self._items[i] for i in self._rng.permutation(len(self._items))]
        return self._left.pop()


def _script(seconds: float, rng: np.random.Generator) -> list[tuple[str, float, float, float]]:
    """Random words of 1 to 4 syllables with pauses: (symbol, start, end, stress), the time line covered without gaps."""
    vowels, consonants = _Bag(VOWELS, rng), _Bag("mbpsfn-mbpsf", rng)
    script, now, last = [], 0.0, max(seconds - 0.30, 0.0)

    def say(symbol: str, length: float, stress: float = 1.0) -> None:
        nonlocal now
        script.append((symbol, now, min(now + length, seconds), stress))
        now = script[-1][2]

    say(" ", min(0.24, seconds))
    while now < last - 0.35:
        syllables = int(rng.integers(1, 5))
        accent = rng.integers(0, syllables)
        for k in range(syllables):
            if now > last - 0.35:
                break
            stress = rng.uniform(0.95, 1.10) if k == accent else rng.uniform(0.72, 0.92)
            onset = consonants.draw()
            if onset != "-":
                say(onset, rng.uniform(*_SECONDS[onset]), stress)
            say(vowels.draw(), rng.uniform(0.13, 0.18) * (1.25 if k == accent else 1.0), stress)
            if rng.random() < 0.18 and now < last - 0.15:
                coda = "mns"[rng.integers(3)]
                say(coda, rng.uniform(*_SECONDS[coda]), stress)
        say(" ", rng.uniform(0.16, 0.46))
    if now < seconds:
        say(" ", seconds - now)
    return script


def speak(seconds: float, seed: int) -> Utterance:
    """A random utterance of exactly round(seconds * 25) frames; the same for the same seed."""
    rng = np.random.default_rng([seed, 7])
    frames = round(seconds * FPS)
    seconds = frames / FPS
    script = _script(seconds, rng)
    ticks = frames * _TICKS // FPS + 1
    time = np.arange(ticks) / _TICKS
    index = np.searchsorted([end for _, _, end, _ in script[:-1]], time, side="right")
    symbols = np.array([s for s, *_ in script])[index]
    stress = np.array([k for *_, k in script])[index]
    mouth = _mouth(script, symbols, stress, time)
    samples = _synthesise(script, symbols, stress, time, rng)[: round(seconds * SAMPLE_RATE)]
    at_frames = np.minimum(np.arange(frames) * _TICKS // FPS, ticks - 1)
    return Utterance(samples.astype(np.float32), mouth[at_frames], [(s, a, b) for s, a, b, _ in script])


def _mouth(script: list, symbols: np.ndarray, stress: np.ndarray, time: np.ndarray) -> np.ndarray:
    """(ticks, 7): targets glide into each other; where the lips must close, they do, whatever the neighbours want."""
    target = np.array([_SOUNDS[s][3] for s in symbols])
    target[:, 0] *= stress
    vowel = np.isin(symbols, list(VOWELS + "nf"))
    target[vowel] = np.clip(target[vowel], 0, 1)
    glide = gaussian_filter1d(target, 0.034 * _TICKS, axis=0, mode="nearest")
    closed = np.zeros(len(time))
    for symbol, start, end, _ in script:
        if symbol in CLOSURES:  # shut over the middle of the consonant, 35 ms to close and to part
            middle, half = 0.5 * (start + end), 0.5 * (end - start) - 0.012
            closed = np.maximum(closed, np.clip((half + 0.035 - np.abs(time - middle)) / 0.035, 0, 1))
    closed = closed * closed * (3 - 2 * closed)
    for name in ("jaw", "raise", "lower", "tuck"):
        glide[:, SHAPES.index(name)] *= 1 - closed
    glide[:, SHAPES.index("press")] = closed * 0.85
    return np.clip(glide, 0, 1.1)


def _synthesise(script: list, symbols: np.ndarray, stress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    formants = gaussian_filter1d(np.array([_SOUNDS[s][0] for s in symbols], float), 0.020 * _TICKS, axis=0, mode="nearest")
    voicing = gaussian_filter1d(np.array([_SOUNDS[s][1] for s in symbols]) * stress, 0.007 * _TICKS, mode="nearest")
    samples = np.arange(len(time) * TICK) / TICK

    def track(values: np.ndarray) -> np.ndarray:
        return np.interp(samples, np.arange(len(values)), values)

    # pitch: declination over each breath, a rise on the stressed syllables, a slow wander
    silent = symbols == " "
    breath = np.zeros(len(time))
    for t in range(1, len(time)):
        breath[t] = 0.0 if silent[t] else breath[t - 1] + 1 / _TICKS
    pitch = 128 - 14 * np.minimum(breath, 1.5) + 42 * gaussian_filter1d(np.where(silent, 0.9, stress) - 0.9, 0.05 * _TICKS)
    pitch += 2.0 * gaussian_filter1d(rng.normal(size=len(time)), 12) * 6
    phase = np.cumsum(track(pitch) / SAMPLE_RATE) % 1.0
    open_part = 0.62
    p = np.minimum(phase / open_part, 1.0)
    pulse = 2 * p - 3 * p**2  # derivative of the KLGLOTT88 flow
    noise = rng.normal(size=len(samples))
    voice = track(voicing) * (pulse + 0.035 * noise * (phase < open_part))
    sound = _cascade(voice, formants)

    for symbol, low, high, gain in (("s", 4200, 7600, 0.16), ("f", 1400, 7600, 0.045)):
        share = gaussian_filter1d((symbols == symbol).astype(float), 0.010 * _TICKS)
        band = butter(3, (low, high), "bandpass", fs=SAMPLE_RATE, output="sos")
        sound += gain * track(share * stress) * sosfilt(band, noise)
    burst_band = butter(2, (500, 3200), "bandpass", fs=SAMPLE_RATE, output="sos")
    for symbol, _, end, k in script:
        if symbol in "bp":
            at, strength = int(end * SAMPLE_RATE), (0.30 if symbol == "p" else 0.18) * k
            length = min(int((0.030 if symbol == "p" else 0.012) * SAMPLE_RATE), len(sound) - at)
            decay = np.exp(-np.arange(length) / (0.008 * SAMPLE_RATE))
            sound[at : at + length] += strength * decay * sosfilt(burst_band, rng.normal(size=length))
    return 0.75 * sound / max(np.abs(sound).max(), 1e-9) + 2e-4 * rng.normal(size=len(sound))


def _cascade(source: np.ndarray, formants: np.ndarray) -> np.ndarray:
    """Five resonators in a row, their centres renewed every TICK samples."""
    ticks = len(formants)
    centres = np.concatenate([formants, np.broadcast_to([3500.0, 4600.0], (ticks, 2))], 1)
    widths = np.array([60.0, 80.0, 120.0, 180.0, 250.0]) + 0.02 * centres
    radius = np.exp(-np.pi * widths / SAMPLE_RATE)
    b = -2 * radius * np.cos(2 * np.pi * centres / SAMPLE_RATE)
    c = radius**2
    zero, one = np.zeros_like(b), np.ones_like(b)
    sections = np.stack([1 + b + c, zero, zero, one, b, c], -1)  # unit gain at 0 Hz
    out, state = np.empty_like(source), np.zeros((5, 2))
    for t in range(ticks):
        at = slice(t * TICK, (t + 1) * TICK)
        out[at], state = sosfilt(sections[t], source[at], zi=state)
    return out
