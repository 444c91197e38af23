"""Small whole recordings of each format, which are then damaged."""

import json
import pickle
import zipfile

import h5py
import mne
import numpy as np
from scipy.io import savemat

from tests.data import matlab_73, release_files, vendor_files

RATE = 50
LABELS = ["Fz", "Cz", "Pz"]
BINS = 12 * RATE
FOLDERS = (
    "hdf5/t15.2023.08.11", "fif", "fif-epochs", "edf", "bdf", "set", "set-epochs", "brainvision",
    "pickle", "zuco", "zuco-73", "nwb", "labram", "mat", "mat-73", "numpy", "numpy-lines", "csv",
    "csv-zip", "ctf", "kit", "cnt", "egi", "mff",
)  # fmt: skip


def write_recordings(folder, t15_trial, write_edf, write_set):
    """Write one recording of each kind into a folder of its own."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    _write_release(folder / "hdf5", t15_trial)
    microvolts = 50 * np.random.default_rng(0).standard_normal((3, BINS))
    _write_fif(folder, microvolts * 1e-6)
    write_edf(folder / "edf" / "a.edf", microvolts, RATE, LABELS)
    write_edf(folder / "bdf" / "a.bdf", microvolts, RATE, LABELS)
    write_set(folder / "set" / "a.set", microvolts, RATE, LABELS)
    write_set(folder / "set-epochs" / "a.set", microvolts.reshape(3, RATE, 12), RATE, LABELS)
    release_files.write_brainvision(folder / "brainvision", microvolts[:2].T, 20000)
    release_files.write_bids(folder / "bids", {"01": folder / "edf" / "a.edf"})
    release_files.write_labram(folder / "labram" / "a.hdf5", microvolts, RATE, LABELS)
    trials = [(1.5 + 2 * n, 3.0 + 2 * n, "go", "val" if n == 3 else "train") for n in range(4)]
    release_files.write_nwb(folder / "nwb" / "a.nwb", microvolts.T, trials=trials, rate=50.0)
    _write_matlab(folder, microvolts.T)
    _write_arrays(folder, microvolts.T)
    _write_tables(folder, microvolts.T)
    _write_vendors(folder, microvolts)


def _write_release(folder, t15_trial):
    generator = np.random.default_rng(1)
    for split, count in (("train", 3), ("val", 1)):
        with h5py.File(folder / "t15.2023.08.11" / f"data_{split}.hdf5", "w") as file:
            for index in range(count):
                signal = generator.standard_normal((12 + index, 4)).astype(np.float32)
                group = file.create_group(f"trial_{index:04d}")
                t15_trial(group, signal, text="It is fine.", phonemes=[40, 3, 7], trial=index)


def _write_fif(folder, volts):
    info = mne.create_info(LABELS, RATE, "eeg")
    raw = mne.io.RawArray(volts, info, verbose="ERROR")
    raw.save(folder / "fif" / "a_raw.fif", verbose="ERROR")
    events = np.stack([np.arange(0, 600, 50), np.zeros(12), np.ones(12)], 1).astype(int)
    epochs = mne.EpochsArray(volts.reshape(3, 12, 50).swapaxes(0, 1), info, events, verbose="ERROR")
    epochs.save(folder / "fif-epochs" / "a-epo.fif", verbose="ERROR")


def _write_vendors(folder, microvolts):
    counts = np.round(100 * microvolts).astype(np.int64)
    vendor_files.write_ctf(folder / "ctf" / "a.ds", counts, RATE, events=[(60, "go")])
    vendor_files.write_kit(folder / "kit" / "a.sqd", counts, RATE)
    vendor_files.write_cnt(folder / "cnt" / "a.cnt", counts, RATE, LABELS, [(60, 3)])
    vendor_files.write_egi(folder / "egi" / "a.egi", microvolts, RATE, [(60, "go  ")])
    wide = 50 * np.random.default_rng(1).standard_normal((33, BINS))
    vendor_files.write_mff(folder / "mff" / "a.mff", wide, RATE)


def _write_matlab(folder, values):
    release_files.write_t12(folder / "t12", 5, columns=4)
    release_files.write_t12(folder / "t12-73", 7.3, columns=4)
    sentences = [s for seed in range(5) for s in release_files.zuco_sentences(2, seed)[:2]]
    savemat(
        folder / "zuco" / "resultsZAB_SR.mat",
        {"sentenceData": release_files.struct_array(sentences)},
    )
    matlab_73.save(folder / "zuco-73" / "resultsZAB_SR.mat", {"sentenceData": sentences})
    signal = {"y": values, "fs": np.array([[float(RATE)]]), "mark": np.zeros((BINS, 1))}
    savemat(folder / "mat" / "a.mat", signal)
    matlab_73.save(folder / "mat-73" / "a.mat", signal)


def _write_arrays(folder, values):
    np.save(folder / "numpy" / "a.npy", values)
    np.savez(folder / "numpy" / "b.npz", b=values[::-1])
    np.save(folder / "numpy-lines" / "a.npy", values[:90])
    np.save(folder / "numpy-lines" / "b.npy", values[90:150])
    lines = [
        {"file": "a.npy", "text": "go", "session": "d1", "split": "train", "phonemes": [7, 40]},
        {"file": "b.npy", "text": "stop", "session": "d1", "split": "val"},
    ]
    (folder / "numpy-lines" / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    content = {"train": release_files.days(), "test": release_files.days(1, 1), "competition": []}
    (folder / "pickle" / "a.pkl").write_bytes(pickle.dumps(content))


def _write_tables(folder, values):
    words = np.repeat(["go", "stop", "go", "on", "up", "no"], BINS // 6)
    rows = [
        f"{index / RATE},{index // (BINS // 12)},{words[index]},{','.join(map(repr, row))}"
        for index, row in enumerate(values.tolist())
    ]
    text = "\n".join([f"time,Epoch,word,{','.join(LABELS)}", *rows]) + "\n"
    (folder / "csv" / "a.csv").write_text(text)
    with zipfile.ZipFile(folder / "csv-zip" / "a.zip", "w") as archive:
        archive.writestr("a.csv", text)
