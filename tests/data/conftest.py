"""Files in the formats that users bring, written from their descriptions."""

import signal
from pathlib import Path

import h5py
import numpy as np
import pytest

SENTENCES = ("Bring it closer.", "It's all right, isn't it?", "I don't know what to do")


@pytest.fixture
def answers_interrupts():
    """Let this process and those it starts answer SIGINT, which a job in the background ignores."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture
def t15_trial():
    """Write one trial in the layout of the Brain-to-Text '25 release."""

    def write(
        group, signal, *, text=None, phonemes=None, session="t15.2023.08.11", block=1, trial=0
    ):
        group["input_features"] = signal
        group.attrs["n_time_steps"] = len(signal)
        group.attrs["session"] = session
        group.attrs["block_num"] = block
        group.attrs["trial_num"] = trial
        if text is not None:
            codes = np.zeros(500, np.int32)
            codes[: len(text)] = list(text.encode("ascii"))
            group["transcription"] = codes
            group.attrs["sentence_label"] = text
        if phonemes is not None:
            padded = np.zeros(500, np.int32)
            padded[: len(phonemes)] = phonemes
            group["seq_class_ids"] = padded
            group.attrs["seq_len"] = len(phonemes)

    return write


@pytest.fixture
def t15_release(tmp_path, t15_trial):
    """Write a release of two sessions; returns its folder and the trials by (session, split)."""

    def write(channels=512, trials=(4, 2, 2), *, name="release"):
        generator = np.random.default_rng(0)
        written = {}
        for session in ("t15.2023.08.13", "t15.2023.08.11"):
            folder = tmp_path / name / "hdf5_data_final" / session
            folder.mkdir(parents=True)
            for split, count in zip(("train", "val", "test"), trials, strict=True):
                with h5py.File(folder / f"data_{split}.hdf5", "w") as file:
                    for index in range(count):
                        signal = generator.standard_normal((20 + 3 * index, channels))
                        labels = {}
                        if split != "test":
                            labels = {
                                "text": SENTENCES[index % 3],
                                "phonemes": [40, 1 + index, 39, 40],
                            }
                        t15_trial(
                            file.create_group(f"trial_{index:04d}"),
                            signal.astype(np.float32),
                            session=session,
                            block=index // 2,
                            trial=index,
                            **labels,
                        )
                        written[session, split, index] = signal.astype(np.float32), labels
        return tmp_path / name, written

    return write


@pytest.fixture
def write_edf():
    """Write EDF (16 bit) or BDF (24 bit) from the published description of the format."""

    def write(path: Path, microvolts: np.ndarray, rate: int, labels: list[str]) -> None:
        bdf = path.suffix == ".bdf"
        channels, records = len(microvolts), microvolts.shape[1] // rate
        highest = 2**23 - 1 if bdf else 2**15 - 1
        largest = float(np.ceil(np.abs(microvolts).max()))

        def fields(width, values):
            return "".join(f"{value!s:<{width}}"[:width] for value in values)

        header = (
            f"{'subject x':<80}{'recording':<80}01.02.2301.00.00{256 * (channels + 1):<8}"
            f"{'24BIT' if bdf else '':<44}{records:<8}{1:<8}{channels:<4}"
        )
        columns = [
            fields(16, labels),
            fields(80, ["electrode"] * channels),
            fields(8, ["uV"] * channels),
            fields(8, [-largest] * channels),
            fields(8, [largest] * channels),
            fields(8, [-highest] * channels),
            fields(8, [highest] * channels),
            fields(80, [""] * channels),
            fields(8, [rate] * channels),
            fields(32, [""] * channels),
        ]
        start = b"\xffBIOSEMI" if bdf else f"{0:<8}".encode()
        digital = np.round(microvolts / largest * highest).astype("<i4")
        blocks = digital[:, : records * rate].reshape(channels, records, rate).swapaxes(0, 1)
        raw = blocks.astype("<i4").tobytes() if bdf else blocks.astype("<i2").tobytes()
        if bdf:
            raw = np.frombuffer(raw, np.uint8).reshape(-1, 4)[:, :3].tobytes()
        path.write_bytes(start + header.encode() + "".join(columns).encode() + raw)

    return write


@pytest.fixture
def write_set():
    """Write EEGLAB SET: a MATLAB struct EEG; [C, T] is continuous, [C, T, trials] epochs."""

    def write(path: Path, microvolts: np.ndarray, rate: float, labels: list[str]) -> None:
        from scipy.io import savemat

        trials = microvolts.shape[2] if microvolts.ndim == 3 else 1
        points = microvolts.shape[1]
        places = np.array(
            [(label, 0.0, 1.0, float(index)) for index, label in enumerate(labels)],
            dtype=[("labels", object), ("X", object), ("Y", object), ("Z", object)],
        )
        events = np.array(
            [("word", index * points + 1.0, index + 1.0) for index in range(trials)],
            dtype=[("type", object), ("latency", object), ("epoch", object)],
        )
        epochs = np.array(
            [(index + 1.0, "word", 0.0) for index in range(trials)],
            dtype=[("event", object), ("eventtype", object), ("eventlatency", object)],
        )
        eeg = {
            "setname": "test",
            "nbchan": float(len(labels)),
            "pnts": float(points),
            "trials": float(trials),
            "srate": float(rate),
            "xmin": 0.0,
            "xmax": (points - 1) / rate,
            "data": microvolts.astype(np.float32),
            "chanlocs": places,
            "event": events,
            "epoch": epochs if trials > 1 else np.array([]),
            "icawinv": np.array([]),
            "icasphere": np.array([]),
            "icaweights": np.array([]),
            "icaact": np.array([]),
            "ref": "common",
            "history": "",
            "comments": "",
        }
        savemat(path, {"EEG": eeg}, appendmat=False)

    return write
