"""Files of releases and archives, written from their descriptions."""

from datetime import datetime, timezone

import h5py
import numpy as np
from scipy.io import savemat

from tests.data import matlab_73

BANDS = ("t1", "t2", "a1", "a2", "b1", "b2", "g1", "g2")
SENTENCES = ["Bring it closer.", "It is fine.", "Where is it?"]


def cells(values):
    """A MATLAB cell array [1, N] for scipy."""
    array = np.empty((1, len(values)), object)
    for index, value in enumerate(values):
        array[0, index] = value
    return array


def write_t12(folder, version=5, *, columns=256, splits=("train", "test", "competitionHoldOut")):
    generator = np.random.default_rng(0)
    written = {}
    for split in splits:
        (folder / split).mkdir(parents=True)
        crossings = [generator.poisson(1, (20 + i, columns)).astype(float) for i in range(3)]
        power = [generator.gamma(1, 1, (20 + i, columns)) for i in range(3)]
        path = folder / split / "t12.2022.04.28.mat"
        blocks = np.array([[1], [1], [2]])
        if version == 5:
            content = {"tx1": cells(crossings), "spikePow": cells(power), "blockIdx": blocks}
            if split != "competitionHoldOut":
                content["sentenceText"] = np.array(SENTENCES)
            savemat(path, content)
        else:
            content = {"tx1": crossings, "spikePow": power, "blockIdx": blocks.astype(float)}
            if split != "competitionHoldOut":
                content["sentenceText"] = list(SENTENCES)
            matlab_73.save(path, content)
        written[split] = crossings, power
    return written


def days(count=2, seed=0):
    """Two days of the pickle, with ``count`` trials each."""
    generator = np.random.default_rng(seed)
    return [
        {
            "sentenceDat": [generator.standard_normal((12 + i, 6)) for i in range(count)],
            "transcriptions": SENTENCES[:count],
            "phonemes": [np.array([7, 3, 40] + [0] * 497) for _ in range(count)],
            "phoneLens": np.array([3] * count),
            "timeSeriesLens": np.array([12 + i for i in range(count)]),
        }
        for _ in range(2)
    ]


def zuco_sentences(electrodes=5, seed=0):
    """Sentences of ZuCo: the second word of the first was not looked at, the third not recorded."""
    generator = np.random.default_rng(seed)
    sentences = []
    for index, text in enumerate(SENTENCES):
        words = []
        for number, word in enumerate(text.split()):
            seen = (index, number) != (0, 1)
            features = {
                f"GD_{band}": generator.random((electrodes, 1)) if seen else np.zeros((0, 0))
                for band in BANDS
            }
            words.append({"content": word, **features})
        raw = generator.standard_normal((electrodes, 60 + index))
        if index == 2:
            words, raw = np.array([[np.nan]]), np.array([[np.nan]])
        sentences.append({"content": text, "rawData": raw, "word": words})
    return sentences


def struct_array(items):
    array = np.empty((1, len(items)), dtype=[(name, object) for name in items[0]])
    for index, item in enumerate(items):
        for name, value in item.items():
            array[0, index][name] = struct_array(value) if isinstance(value, list) else value
    return array


def write_nwb(path, values, *, spikes=(), trials=(), rate=100.0):
    """Write a series ``lfp`` in µV [samples, channels], spikes of units, a trials table."""
    import pynwb

    content = pynwb.NWBFile("b2t", "b2t", datetime(2024, 1, 1, tzinfo=timezone.utc))
    content.subject = pynwb.file.Subject(
        subject_id="monkey1", species="Macaca mulatta", sex="U", age="P1Y"
    )
    if values is not None:
        content.add_acquisition(
            pynwb.TimeSeries("lfp", values, unit="V", rate=rate, starting_time=1.0, conversion=1e-6)
        )
    if trials:
        content.add_trial_column("sentence", "what was said")
        content.add_trial_column("split", "its split")
    for start, stop, text, split in trials:
        content.add_trial(start_time=start, stop_time=stop, sentence=text, split=split)
    for times in spikes:
        content.add_unit(spike_times=times)
    with pynwb.NWBHDF5IO(str(path), "w") as io:
        io.write(content)


def write_labram(path, values, rate, channels, groups=("sub1", "sub2")):
    """Write one group for each recording, `eeg` [channels, samples] in each."""
    with h5py.File(path, "w") as file:
        for name in groups:
            data = file.create_group(name).create_dataset("eeg", data=values)
            data.attrs["rsFreq"], data.attrs["chOrder"] = rate, channels


def write_brainvision(folder, values, interval_us):
    """Write float32 values [samples, 2] in µV with one marker at sample 300."""
    (folder / "s1.eeg").write_bytes(values.astype("<f4").tobytes())
    (folder / "s1.vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n[Common Infos]\nDataFile=s1.eeg\n"
        "[Marker Infos]\nMk1=Stimulus,S  1,301,1,0\n"
    )
    (folder / "s1.vhdr").write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\nDataFile=s1.eeg\n"
        "MarkerFile=s1.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels=2\n"
        f"SamplingInterval={interval_us}\n[Binary Infos]\nBinaryFormat=IEEE_FLOAT_32\n"
        "[Channel Infos]\nCh1=Fz,,1,µV\nCh2=Cz,,1,µV\n"
    )


def write_bids(root, recordings):
    """Write recordings {subject: EDF file} as one study, with two annotations each."""
    import mne
    import mne_bids

    for subject, file in recordings.items():
        raw = mne.io.read_raw_edf(file, verbose="ERROR")
        raw.set_annotations(mne.Annotations([2.0, 5.0], [1.0, 1.0], ["yes", "no"]))
        raw.info["line_freq"] = 50
        place = mne_bids.BIDSPath(subject=subject, task="speak", root=root, datatype="eeg")
        mne_bids.write_raw_bids(raw, place, verbose="ERROR")
